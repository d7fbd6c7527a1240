// The kernels for x86-64 with AVX2 and FMA. Nothing with code may be included after the pragma.
#include <cstddef>
#include <type_traits>

#include "head.h"

#ifdef OMNIGRPO_X86_VARIANTS
#pragma GCC target("avx2,fma")
#define OMNIGRPO_KERNELS kHeadAvx2
#define OMNIGRPO_ISA "avx2"
#define OMNIGRPO_VECTOR_BYTES 32
#define OMNIGRPO_TILE_ROWS 6
#include "head_kernel.inc"
#endif
