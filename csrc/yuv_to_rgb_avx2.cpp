// Rows of pixels with AVX2, 32 pixels at a time.
#include "head.h"
#include "yuv_to_rgb.h"

#ifdef OMNIGRPO_X86_VARIANTS
#include <immintrin.h>

#pragma GCC target("avx2")

namespace omnigrpo {
namespace {

constexpr int64_t kPixels = kYuvAvx2Width;

// 16-bit values of 32 pixels as unpacking leaves them: pixels 0-7 and 16-23, pixels 8-15 and 24-31.
struct Halves {
  __m256i low;
  __m256i high;
};

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

Halves luma_of(const uint8_t* y, __m256i offset) {
  const __m256i bytes = load(y), zero = _mm256_setzero_si256();
  const auto scaled = [&](__m256i values) { return _mm256_sub_epi16(_mm256_slli_epi16(values, 4), offset); };
  return {scaled(_mm256_unpacklo_epi8(bytes, zero)), scaled(_mm256_unpackhi_epi8(bytes, zero))};
}

// Sixteen chroma sums become those of 32 pixels.
Halves chroma_of(const int16_t* sums) {
  const __m256i here = load(sums);
  const __m256i triple = _mm256_sub_epi16(_mm256_add_epi16(here, _mm256_add_epi16(here, here)),
                                          _mm256_set1_epi16(kChromaMiddle));
  const __m256i even = _mm256_add_epi16(triple, load(sums - 1)), odd = _mm256_add_epi16(triple, load(sums + 1));
  return {_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)};
}

// a * weights.first + b * weights.second, where `weights` repeats the two.
struct Products {
  __m256i low;
  __m256i high;

  Products(__m256i a, __m256i b, __m256i weights)
      : low(_mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), weights)),
        high(_mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), weights)) {}
  Products(__m256i low, __m256i high) : low(low), high(high) {}

  Products operator+(const Products& other) const {
    return {_mm256_add_epi32(low, other.low), _mm256_add_epi32(high, other.high)};
  }

  __m256i shifted() const {
    const __m256i rounding = _mm256_set1_epi32(kYuvRounding);
    return _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(low, rounding), kYuvShift),
                              _mm256_srai_epi32(_mm256_add_epi32(high, rounding), kYuvShift));
  }
};

__m256i pair(int32_t first, int32_t second) {
  return _mm256_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(second) << 16 | (static_cast<uint32_t>(first) & 0xFFFF)));
}

struct Weights {
  __m256i offset, red, green, green_rest, blue;

  explicit Weights(const YuvCoefficients& c)
      : offset(_mm256_set1_epi16(static_cast<int16_t>(c.luma_offset))),
        red(pair(c.luma, c.red_v)),
        green(pair(c.luma, c.green_v)),
        green_rest(pair(c.green_u, 0)),
        blue(pair(c.luma, c.blue_u)) {}
};

// Where byte `at` of the 48 that interleave 16 pixels of three channels comes from; -128 for other channels' bytes.
constexpr int8_t source(int at, int channel) { return static_cast<int8_t>(at % 3 == channel ? at / 3 : -128); }

__m256i shuffle_of(int part, int channel) {
  alignas(16) int8_t from[16];
  for (int at = 0; at < 16; ++at) from[at] = source(16 * part + at, channel);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
}

struct Interleaver {
  __m256i shuffles[3][3];  // [part][channel]

  Interleaver() {
    for (int part = 0; part < 3; ++part) {
      for (int channel = 0; channel < 3; ++channel) shuffles[part][channel] = shuffle_of(part, channel);
    }
  }

  void store(__m256i red, __m256i green, __m256i blue, uint8_t* rgb) const {
    for (int part = 0; part < 3; ++part) {
      const __m256i bytes = _mm256_or_si256(_mm256_or_si256(_mm256_shuffle_epi8(red, shuffles[part][0]),
                                                            _mm256_shuffle_epi8(green, shuffles[part][1])),
                                            _mm256_shuffle_epi8(blue, shuffles[part][2]));
      __m128i* to = reinterpret_cast<__m128i*>(rgb + 16 * part);
      _mm_storeu_si128(to, _mm256_castsi256_si128(bytes));
      _mm_storeu_si128(to + 3, _mm256_extracti128_si256(bytes, 1));
    }
  }
};

void convert(const YuvRow& row, int64_t at, const Weights& weights, const Interleaver& interleaver) {
  const Halves y = luma_of(row.y + at, weights.offset), u = chroma_of(row.u + at / 2), v = chroma_of(row.v + at / 2);
  const __m256i zero = _mm256_setzero_si256();
  const auto both = [](__m256i low, __m256i high) { return _mm256_packus_epi16(low, high); };
  const auto green = [&](__m256i y_half, __m256i u_half, __m256i v_half) {
    return (Products(y_half, v_half, weights.green) + Products(u_half, zero, weights.green_rest)).shifted();
  };
  interleaver.store(both(Products(y.low, v.low, weights.red).shifted(), Products(y.high, v.high, weights.red).shifted()),
                    both(green(y.low, u.low, v.low), green(y.high, u.high, v.high)),
                    both(Products(y.low, u.low, weights.blue).shifted(), Products(y.high, u.high, weights.blue).shifted()),
                    row.rgb + 3 * at);
}

}  // namespace

void yuv_row_avx2(const YuvRow& row, const YuvCoefficients& coefficients) {
  const Weights weights(coefficients);
  const Interleaver interleaver;
  int64_t at = 0;
  for (; at + kPixels <= row.width; at += kPixels) convert(row, at, weights, interleaver);
  if (at < row.width) convert(row, row.width - kPixels, weights, interleaver);  // Some pixels twice.
}

}  // namespace omnigrpo
#endif
