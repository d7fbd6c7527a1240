// The kernels for x86-64 with AVX2 and FMA. Nothing with code may be included after the pragma.
#include <cstddef>

#include "logit_rows.h"

#ifdef OMNIGRPO_X86_VARIANTS
#pragma GCC target("avx2,fma")
#define OMNIGRPO_KERNELS kLogitRowsAvx2
#define OMNIGRPO_ISA "avx2"
#include "logit_rows_kernel.inc"
#endif
