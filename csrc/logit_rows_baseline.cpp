// The kernels for any CPU that the compiler's default target covers.
#include <cstddef>

#include "logit_rows.h"

#define OMNIGRPO_KERNELS kLogitRowsBaseline
#define OMNIGRPO_ISA "baseline"
#include "logit_rows_kernel.inc"
