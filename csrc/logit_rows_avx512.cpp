// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL). Nothing with code may be included after the pragma.
#include <cstddef>

#include "logit_rows.h"

#ifdef OMNIGRPO_X86_VARIANTS
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define OMNIGRPO_KERNELS kLogitRowsAvx512
#define OMNIGRPO_ISA "avx512"
#include "logit_rows_kernel.inc"
#endif
