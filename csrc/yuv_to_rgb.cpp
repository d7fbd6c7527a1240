// The op omnigrpo::yuv420_to_rgb on CPU tensors: checks, chroma rows, and the rows of pixels for any CPU.
#include "yuv_to_rgb.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "head.h"

namespace omnigrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

uint8_t clamped(int32_t value) { return static_cast<uint8_t>(std::clamp(value >> kYuvShift, 0, 255)); }

void yuv_row_baseline(const YuvRow& row, const YuvCoefficients& c) {
  for (int64_t x = 0; x < row.width; ++x) {
    const int64_t near = x / 2, far = near + (x % 2 == 0 ? -1 : 1);
    const int32_t u = 3 * row.u[near] + row.u[far] - kChromaMiddle;
    const int32_t v = 3 * row.v[near] + row.v[far] - kChromaMiddle;
    const int32_t luma = (16 * row.y[x] - c.luma_offset) * c.luma + kYuvRounding;
    row.rgb[3 * x] = clamped(luma + c.red_v * v);
    row.rgb[3 * x + 1] = clamped(luma + c.green_u * u + c.green_v * v);
    row.rgb[3 * x + 2] = clamped(luma + c.blue_u * u);
  }
}

using RowFunction = void (*)(const YuvRow&, const YuvCoefficients&);

RowFunction row_function(int64_t width) {
#ifdef OMNIGRPO_X86_VARIANTS
  const bool is_active = &head_kernels() != &kHeadBaseline;  // A test may have asked for the baseline.
  if (is_active && width >= kYuvAvx2Width && __builtin_cpu_supports("avx2")) return yuv_row_avx2;
#endif
  return yuv_row_baseline;
}

struct Plane {
  const uint8_t* data;
  int64_t stride;
  int64_t height;
  int64_t width;

  Plane(const Tensor& tensor, int64_t height, int64_t width)
      : data(static_cast<const uint8_t*>(tensor.data_ptr())), stride(0), height(height), width(width) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.dim() == 2 && tensor.stride(1) == 1,
                    "yuv420_to_rgb: planes must be uint8 matrices with dense rows");
    STD_TORCH_CHECK(tensor.size(0) == height && tensor.size(1) == width, "yuv420_to_rgb: a plane is ", tensor.size(0),
                    " x ", tensor.size(1), ", but this picture needs ", height, " x ", width);
    stride = tensor.stride(0);
  }

  const uint8_t* row(int64_t at) const { return data + std::clamp<int64_t>(at, 0, height - 1) * stride; }
};

// Chroma for the pixels of one row, between the two chroma rows that enclose it.
class ChromaRow {
 public:
  explicit ChromaRow(int64_t width) : sums_(width + 2) {}

  const int16_t* between(const uint8_t* near, const uint8_t* far) {
    const int64_t width = static_cast<int64_t>(sums_.size()) - 2;
    int16_t* sums = sums_.data() + 1;
    for (int64_t x = 0; x < width; ++x) sums[x] = static_cast<int16_t>(3 * near[x] + far[x]);
    sums[-1] = sums[0];
    sums[width] = sums[width - 1];
    return sums;
  }

 private:
  std::vector<int16_t> sums_;
};

YuvCoefficients checked(const std::vector<int64_t>& values) {
  STD_TORCH_CHECK(values.size() == 6, "yuv420_to_rgb: six coefficients are needed, got ", values.size());
  for (const int64_t value : values) {
    STD_TORCH_CHECK(std::abs(value) <= std::numeric_limits<int16_t>::max(),
                    "yuv420_to_rgb: coefficients must fit 16 bits, got ", value);
  }
  const auto at = [&](size_t place) { return static_cast<int32_t>(values[place]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

void yuv420_to_rgb(const Tensor& y, const Tensor& u, const Tensor& v, Tensor rgb, std::vector<int64_t> coefficients) {
  STD_TORCH_CHECK(y.dim() == 2 && y.size(0) > 0 && y.size(1) > 0 && y.size(0) % 2 == 0 && y.size(1) % 2 == 0,
                  "yuv420_to_rgb: luma must be a matrix of even, positive height and width");
  const int64_t height = y.size(0), width = y.size(1);
  const Plane luma(y, height, width), blue(u, height / 2, width / 2), red(v, height / 2, width / 2);
  STD_TORCH_CHECK(rgb.scalar_type() == ScalarType::Byte && rgb.dim() == 3 && rgb.is_contiguous() &&
                      rgb.size(0) == height && rgb.size(1) == width && rgb.size(2) == 3,
                  "yuv420_to_rgb: the result must be contiguous uint8 [", height, ", ", width, ", 3]");
  const YuvCoefficients checked_coefficients = checked(coefficients);
  const RowFunction convert = row_function(width);
  uint8_t* out = static_cast<uint8_t*>(rgb.data_ptr());
  ChromaRow u_row(width / 2), v_row(width / 2);
  for (int64_t at = 0; at < height; ++at) {
    const int64_t near = at / 2, far = near + (at % 2 == 0 ? -1 : 1);
    convert({luma.row(at), u_row.between(blue.row(near), blue.row(far)), v_row.between(red.row(near), red.row(far)),
             out + at * width * 3, width},
            checked_coefficients);
  }
}

}  // namespace
}  // namespace omnigrpo

STABLE_TORCH_LIBRARY_IMPL(omnigrpo, CPU, m) { m.impl("yuv420_to_rgb", TORCH_BOX(&omnigrpo::yuv420_to_rgb)); }
