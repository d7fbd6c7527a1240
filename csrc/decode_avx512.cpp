// The decode kernels for x86-64 with AVX-512 (F, BW, DQ, VL). Nothing with code may be included after the pragma, and before
// it only the compiler's own intrinsics, which carry their target.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "decode.h"

#ifdef OMNIGRPO_X86_VARIANTS
#include <immintrin.h>
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define OMNIGRPO_DECODE_KERNELS kDecodeAvx512
#define OMNIGRPO_VECTOR_BYTES 64
#include "decode_kernel.inc"
#endif
