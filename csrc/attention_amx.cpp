// The kernels of attention.h for x86-64 with AMX-BF16. Nothing with code may be included after the pragma, and before it
// only the compiler's own intrinsics, which carry their target.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "attention.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#define OMNIGRPO_VECTOR_BYTES 64
#define OMNIGRPO_TILE_ROWS 14
#define OMNIGRPO_BF16_DOT 1
#include "head_numbers.inc"
#include "head_tile.inc"
#include "head_amx.inc"
#include "attention_pack.inc"
#include "attention_kernel.inc"

namespace omnigrpo {
const AttentionKernels* attention_amx(int64_t head_width) {
  switch (head_width) {
    case 32: return &Attention<32>::kernels;
    case 64: return &Attention<64>::kernels;
    case 96: return &Attention<96>::kernels;
    case 128: return &Attention<128>::kernels;
    default: return nullptr;
  }
}
}  // namespace omnigrpo
#else
namespace omnigrpo {
const AttentionKernels* attention_amx(int64_t) { return nullptr; }
}  // namespace omnigrpo
#endif
