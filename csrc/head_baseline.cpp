// The kernels for any CPU that the compiler's default target covers.
#include <cstddef>
#include <type_traits>

#include "head.h"

#define OMNIGRPO_KERNELS kHeadBaseline
#define OMNIGRPO_ISA "baseline"
#define OMNIGRPO_VECTOR_BYTES 16
#define OMNIGRPO_TILE_ROWS 4
#include "head_kernel.inc"
