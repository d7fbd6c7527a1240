// Backward of shared-prefix attention on CPUs with AMX, in bfloat16: what the op (attention.cpp) and the kernels
// (attention_amx.cpp) agree on.
//
// Legend: T tokens, N query heads, K key/value heads, J = N / K, H head width. A query row is a token and one of the
// J heads that share a key/value head; rows of a token lie together. A strip is 32 keys of one segment, a unit 32 query
// rows of one segment; a segment is a prefix or a completion. What is missing in either is zeros.
//
// Like head.h, it is included before `#pragma GCC target`: declarations only.
#pragma once

#include <cstdint>

namespace omnigrpo {

constexpr int64_t kStripKeys = 32;
constexpr int64_t kUnitRows = 32;

// [T, heads, H] in bfloat16; the elements of a head lie next to each other.
struct HeadRows {
  const uint16_t* data;
  int64_t token_stride;
  int64_t head_stride;
};

// Strips [begin, begin + ceil(length / 32)) hold rows [first, first + length) of k and v.
struct KeySegment {
  int64_t first;
  int64_t length;
  int64_t begin;
};

// Query rows of tokens [first_token, first_token + num_tokens) of a segment, token `offset` of it and on. They see all of
// `prefix` (of no length for a prefix's own queries) and `own` causally.
struct QueryBlock {
  int64_t first_token;
  int64_t num_tokens;
  int64_t offset;
  KeySegment prefix;
  KeySegment own;
};

// Some blocks of one group and key/value head, with sums of their own for the gradients of the keys they see.
struct AttentionChunk {
  int64_t kv_head;
  const QueryBlock* blocks;
  int64_t num_blocks;
  int64_t prefix_begin;  // strips of the group's prefix, and those of completions that the chunk sees
  int64_t prefix_end;
  int64_t own_begin;
  int64_t own_end;
  float* sums;  // [prefix strips + own strips], a strip's in `sum_floats`
};

struct AttentionBackward {
  HeadRows grad_out;
  HeadRows q;
  HeadRows k;
  HeadRows v;
  HeadRows out;
  const float* lse;  // natural log-sum-exp of token t and head n at [n * lse_head_stride + t * lse_token_stride]
  int64_t lse_head_stride;
  int64_t lse_token_stride;
  int64_t num_heads;
  int64_t num_kv_heads;
  float scale;
  int64_t num_strips;
  void* packed;      // [K][num_strips], a strip in `strip_bytes`
  uint16_t* grad_q;  // contiguous, as are grad_k and grad_v
  uint16_t* grad_k;
  uint16_t* grad_v;
};

struct AttentionKernels {
  int64_t strip_bytes;
  int64_t sum_floats;
  void (*pack_keys)(const AttentionBackward&, const KeySegment&, int64_t kv_head, int64_t strip);
  void (*run)(const AttentionBackward&, const AttentionChunk*, int64_t num_chunks);
  // Writes a strip's gradients: the total of `num_sums` sums, in their order.
  void (*finish_keys)(const AttentionBackward&, const KeySegment&, int64_t kv_head, int64_t strip,
                      const float* const* sums, int64_t num_sums);
};

// Null where there is none for a head width.
const AttentionKernels* attention_amx(int64_t head_width);

}  // namespace omnigrpo
