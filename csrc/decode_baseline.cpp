// The decode kernels for any CPU that the compiler's default target covers.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "decode.h"

#define OMNIGRPO_DECODE_KERNELS kDecodeBaseline
#define OMNIGRPO_VECTOR_BYTES 16
#include "decode_kernel.inc"
