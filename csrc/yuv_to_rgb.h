// Pictures of 8-bit YUV 4:2:0 to interleaved RGB: what the op wrapper and the rows of each instruction set agree on.
//
// Chroma samples lie in the middle of four luma samples and are interpolated bilinearly, so each pixel has a sum of
// four of them with weights that add up to 16. All is exact in integers up to the last shift:
//
//     y = 16 Y - luma_offset        u = sum 9|3|3|1 U - 2048        v = sum 9|3|3|1 V - 2048
//     R = (luma y + red_v v + 2^16) >> 17        G = (luma y + green_u u + green_v v + 2^16) >> 17        B: blue_u u
//
// clamped to 0 .. 255. The arithmetic is that of FFmpeg's swscale (yuv2rgb_write_full in libswscale/output.c).
//
// This header is included before `#pragma GCC target`: declarations only, see head.h.
#pragma once

#include <cstdint>

namespace omnigrpo {

// Multiplied by 2^13, as swscale has them; each fits 16 bits.
struct YuvCoefficients {
  int32_t luma_offset;
  int32_t luma;
  int32_t red_v;
  int32_t green_u;
  int32_t green_v;
  int32_t blue_u;
};

constexpr int32_t kYuvShift = 17;
constexpr int32_t kYuvRounding = 1 << (kYuvShift - 1);
constexpr int32_t kChromaMiddle = 2048;

// One row of pixels. `u` and `v` hold three times the nearer chroma row plus the farther one, [width / 2] with one more
// element on each side, which repeats the one at the edge.
struct YuvRow {
  const uint8_t* y;  // [width]
  const int16_t* u;
  const int16_t* v;
  uint8_t* rgb;  // [width][3]
  int64_t width;  // even
};

// At least kYuvAvx2Width pixels wide.
constexpr int64_t kYuvAvx2Width = 32;
void yuv_row_avx2(const YuvRow& row, const YuvCoefficients& coefficients);

}  // namespace omnigrpo
