// One decode step on CPU: what the op wrappers (decode.cpp) and the kernels of each instruction set agree on.
//
// Legend: M rows (samples), K summed width, N outputs, H head width, V vocabulary.
//
// What a row gets does not depend on the rows beside it: every sum runs in one order, whatever tile the row is in.
//
// This header is included before `#pragma GCC target`, so it holds declarations only: an inline function shared by
// two ISAs could otherwise be linked from the wrong one and fault on an older CPU.
#pragma once

#include <cstdint>

#include "head.h"

namespace omnigrpo {

// `Stat` is float for float32 and bfloat16, double for float64, as in head.h.

// out[m][n] = x[m] . weight[n] + bias[n].
struct SkinnyLinear {
  HeadType type;
  const void* rows;    // [M, K]
  int64_t num_rows;    // M
  int64_t width;       // K
  const void* weight;  // [N, K]
  const void* bias;    // [N], or null
  int64_t num_outputs;  // N
  void* packed;        // [M, packed_bytes of one row], written by `pack`, read by `multiply`
  void* out;           // [M, N], of the input's type, or Stat where `wide`
  bool wide;
};

// Cached tokens lie in blocks of this many.
constexpr int64_t kCacheBlock = 32;

// Attention of one new token per row: over its group's prefix, then over the row's own tokens, which end with the new
// one.
struct DecodeAttention {
  HeadType type;
  const void* q;       // [M, heads, H]
  void* out;           // [M, heads, H]
  int64_t num_rows;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_width;
  const void* keys;    // [blocks, kv heads, H, kCacheBlock]
  const void* values;  // [blocks, kv heads, kCacheBlock, H]
  const int64_t* groups;         // [M]: which prefix a row follows; rows of one group are neighbours
  const int64_t* prefix_blocks;  // [groups, prefix_stride]
  int64_t prefix_stride;
  const int64_t* prefix_lengths;  // [groups]
  const int64_t* own_blocks;      // [M, own_stride]
  int64_t own_stride;
  const int64_t* own_lengths;     // [M], the new token included
  double scale;
  int64_t rows_per_task;  // neighbours that read their prefix together
};

// Inverse CDF of softmax(logits / temperature), and the log-prob of what it gives.
struct DrawTokens {
  const float* logits;    // [M, V]
  int64_t vocabulary;
  double temperature;
  const double* uniform;  // [M], in [0, 1)
  int64_t* token;         // [M]
  float* logprob;         // [M]
};

// Ranges are tasks of any split: [begin, end) rows or outputs, as the comment says.
struct DecodeKernels {
  int64_t (*packed_bytes)(HeadType, int64_t width);                               // of one row
  void (*pack)(const SkinnyLinear&, int64_t begin, int64_t end);                  // rows
  void (*multiply)(const SkinnyLinear&, int64_t begin, int64_t end);              // outputs
  void (*attend)(const DecodeAttention&, int64_t begin, int64_t end);             // kv heads times row tasks
  void (*draw)(const DrawTokens&, int64_t begin, int64_t end);                    // rows
};

extern const DecodeKernels kDecodeBaseline;
#ifdef OMNIGRPO_X86_VARIANTS
extern const DecodeKernels kDecodeAvx2;
extern const DecodeKernels kDecodeAvx512;
extern const DecodeKernels kDecodeAvx512Bf16;
#endif

}  // namespace omnigrpo
