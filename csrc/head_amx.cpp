// The kernels for x86-64 with AMX-BF16 beside AVX-512 and AVX512-BF16. Nothing with code may be included after the
// pragma, and before it only the compiler's own intrinsics, which carry their target.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "head.h"

#ifdef OMNIGRPO_X86_VARIANTS
#include <immintrin.h>
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#define OMNIGRPO_KERNELS kHeadAmx
#define OMNIGRPO_ISA "amx_bf16"
#define OMNIGRPO_VECTOR_BYTES 64
#define OMNIGRPO_TILE_ROWS 14
#define OMNIGRPO_BF16_DOT 1
#define OMNIGRPO_AMX 1
#include "head_kernel.inc"
#endif
