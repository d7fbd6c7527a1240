// The decode kernels for x86-64 with AVX2 and FMA. Nothing with code may be included after the pragma, and before
// it only the compiler's own intrinsics, which carry their target.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "decode.h"

#ifdef OMNIGRPO_X86_VARIANTS
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#define OMNIGRPO_DECODE_KERNELS kDecodeAvx2
#define OMNIGRPO_VECTOR_BYTES 32
#include "decode_kernel.inc"
#endif
