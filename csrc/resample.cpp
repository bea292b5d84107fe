#include "resample.h"

#include <algorithm>
#include <cmath>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VPGTRANS_AVX2 1
#include <immintrin.h>
#endif

namespace vpgtrans {
namespace {

constexpr int kPrecisionBits = 32 - 8 - 2;
constexpr int kLowBits = 11;
constexpr std::int32_t kHalf = 1 << (kPrecisionBits - 1);

// Keys' cubic convolution with a = -0.5, support 2.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

std::uint8_t clip(std::int32_t sum) { return static_cast<std::uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255)); }

void filter_row_plain(const FilterTable& table, const std::uint8_t* source, std::uint8_t* target) {
  for (int x = 0; x < table.output_size; ++x) {
    const std::int32_t* weight = table.weight.data() + static_cast<std::size_t>(x) * table.stride;
    const std::uint8_t* pixel = source + 3 * static_cast<std::size_t>(table.first[x]);
    std::int32_t red = kHalf, green = kHalf, blue = kHalf;
    for (int k = 0; k < table.count[x]; ++k, pixel += 3) {
      red += pixel[0] * weight[k];
      green += pixel[1] * weight[k];
      blue += pixel[2] * weight[k];
    }
    target[3 * x] = clip(red);
    target[3 * x + 1] = clip(green);
    target[3 * x + 2] = clip(blue);
  }
}

void filter_columns_plain(const std::int32_t* weight, int count, const std::uint8_t* const* rows, std::size_t bytes,
                          std::uint8_t* target) {
  constexpr std::size_t kBlock = 64;
  for (std::size_t start = 0; start < bytes; start += kBlock) {
    const std::size_t size = std::min(kBlock, bytes - start);
    std::int32_t sum[kBlock];
    std::fill(sum, sum + kBlock, kHalf);
    for (int k = 0; k < count; ++k) {
      const std::uint8_t* row = rows[k] + start;
      for (std::size_t i = 0; i < size; ++i) sum[i] += row[i] * weight[k];
    }
    for (std::size_t i = 0; i < size; ++i) target[start + i] = clip(sum[i]);
  }
}

#if VPGTRANS_AVX2

// The sums wrap modulo 2^32 on the way; the result fits, as it does in Pillow.
__attribute__((target("avx2"))) inline __m256i joined(__m256i high, __m256i low) {
  return _mm256_add_epi32(_mm256_slli_epi32(high, kLowBits), low);
}

// kGroups is table.groups where it is known, so that the loop over them is unrolled, or 0.
template <int kGroups>
__attribute__((target("avx2"))) void filter_rows_avx2(const FilterTable& table, const std::uint8_t* const* source,
                                                      std::uint8_t* const* target) {
  // Four pixels, 12 bytes, to 16-bit r0 r1 r2 r3 g0 g1 g2 g3 | b0 b1 b2 b3 0 0 0 0.
  const __m256i to_planes =
      _mm256_setr_epi8(0, -1, 3, -1, 6, -1, 9, -1, 1, -1, 4, -1, 7, -1, 10, -1,  //
                       2, -1, 5, -1, 8, -1, 11, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i half = _mm256_set1_epi32(kHalf);
  const int groups = kGroups > 0 ? kGroups : table.groups;
  const std::int16_t* split = table.split.data();
  for (int x = 0; x < table.output_size; ++x) {
    const std::size_t offset = 3 * static_cast<std::size_t>(table.group_first[static_cast<std::size_t>(x)]);
    __m256i high[kRowsAtOnce], low[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) high[r] = low[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g, split += 8) {
      std::int64_t four_high, four_low;
      __builtin_memcpy(&four_high, split, sizeof(four_high));
      __builtin_memcpy(&four_low, split + 4, sizeof(four_low));
      const __m256i weights_high = _mm256_set1_epi64x(four_high), weights_low = _mm256_set1_epi64x(four_low);
#pragma GCC unroll 4
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source[r] + offset + 12 * g));
        const __m256i planes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), to_planes);
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(planes, weights_high));
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(planes, weights_low));
      }
    }
    // Neighbours hold sums of different inputs: added, two rows a register, r g r g | b 0 b 0.
    __m256i rows01 = _mm256_hadd_epi32(joined(high[0], low[0]), joined(high[1], low[1]));
    __m256i rows23 = _mm256_hadd_epi32(joined(high[2], low[2]), joined(high[3], low[3]));
    rows01 = _mm256_srai_epi32(_mm256_add_epi32(rows01, half), kPrecisionBits);
    rows23 = _mm256_srai_epi32(_mm256_add_epi32(rows23, half), kPrecisionBits);
    const __m256i words = _mm256_packs_epi32(rows01, rows23);
    const __m256i levels = _mm256_packus_epi16(words, words);
    const __m128i pixels = _mm_unpacklo_epi16(_mm256_castsi256_si128(levels), _mm256_extracti128_si256(levels, 1));
    // Four bytes a pixel, of which the next pixel overwrites the last.
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int pixel = r == 0   ? _mm_cvtsi128_si32(pixels)
                        : r == 1 ? _mm_extract_epi32(pixels, 1)
                        : r == 2 ? _mm_extract_epi32(pixels, 2)
                                 : _mm_extract_epi32(pixels, 3);
      __builtin_memcpy(target[r] + 3 * x, &pixel, sizeof(pixel));
    }
  }
}

__attribute__((target("avx2"))) void filter_columns_avx2(const std::int16_t* split, int count,
                                                         const std::uint8_t* const* rows, std::size_t bytes,
                                                         std::uint8_t* target) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i half = _mm256_set1_epi32(kHalf);
  for (std::size_t start = 0; start < bytes; start += 32) {
    __m256i high[4], low[4];
    for (int i = 0; i < 4; ++i) high[i] = low[i] = zero;
    for (int k = 0; k < count; k += 2) {
      // An odd last row is paired with itself; its second weight is 0.
      const std::uint8_t* next = rows[k + 1 < count ? k + 1 : k];
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[k] + start));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next + start));
      const std::int16_t* weights = split + 8 * (k / 4) + k % 4;
      std::int32_t pair_high, pair_low;
      __builtin_memcpy(&pair_high, weights, sizeof(pair_high));
      __builtin_memcpy(&pair_low, weights + 4, sizeof(pair_low));
      const __m256i weights_high = _mm256_set1_epi32(pair_high), weights_low = _mm256_set1_epi32(pair_low);
      const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
      const __m256i pairs[4] = {_mm256_unpacklo_epi8(ab_low, zero), _mm256_unpackhi_epi8(ab_low, zero),
                                _mm256_unpacklo_epi8(ab_high, zero), _mm256_unpackhi_epi8(ab_high, zero)};
      for (int i = 0; i < 4; ++i) {
        high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(pairs[i], weights_high));
        low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(pairs[i], weights_low));
      }
    }
    __m256i sum[4];
    for (int i = 0; i < 4; ++i)
      sum[i] = _mm256_srai_epi32(_mm256_add_epi32(joined(high[i], low[i]), half), kPrecisionBits);
    const __m256i result =
        _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + start), result);
  }
}

#endif

}  // namespace

void FilterTable::build(int input_size, float start, float stop, int outputs, Use use) {
  if (input_size == input_size_ && start == start_ && stop == stop_ && outputs == output_size && use == use_) return;
  input_size_ = -1;  // stays so where an allocation fails halfway
  const double scale = static_cast<double>(stop - start) / outputs;
  const double filter_scale = std::max(scale, 1.0);
  const double inverse = 1.0 / filter_scale;
  const double support = 2.0 * filter_scale;
  const int most = static_cast<int>(std::ceil(support)) * 2 + 1;
  output_size = outputs;
  stride = (most + 3) / 4 * 4;
  const auto places = static_cast<std::size_t>(outputs);
  first.assign(places, 0);
  count.assign(places, 0);
  weight.assign(places * static_cast<std::size_t>(stride), 0);
  exact_.resize(static_cast<std::size_t>(most));
  for (int x = 0; x < outputs; ++x) {
    const double centre = start + (x + 0.5) * scale;
    const int low = std::max(static_cast<int>(centre - support + 0.5), 0);
    const int inputs = std::min(static_cast<int>(centre + support + 0.5), input_size) - low;
    double total = 0;
    for (int k = 0; k < inputs; ++k) total += exact_[k] = bicubic((k + low - centre + 0.5) * inverse);
    const auto place = static_cast<std::size_t>(use == Use::kMirroredRows ? outputs - 1 - x : x);
    first[place] = low;
    count[place] = inputs;
    std::int32_t* weights = weight.data() + place * static_cast<std::size_t>(stride);
    for (int k = 0; k < inputs; ++k) {
      const double share = (total != 0 ? exact_[k] / total : exact_[k]) * (1 << kPrecisionBits);
      weights[k] = static_cast<std::int32_t>(share < 0 ? share - 0.5 : share + 0.5);
    }
  }
  split_weights(input_size, use);
  input_size_ = input_size;
  start_ = start;
  stop_ = stop;
  use_ = use;
}

void FilterTable::split_weights(int input_size, Use use) {
  groups = (*std::max_element(count.begin(), count.end()) + 3) / 4;
  group_first = first;
  split.assign(first.size() * static_cast<std::size_t>(groups) * 8, 0);
  for (std::size_t place = 0; place < first.size(); ++place) {
    // Rows read all groups: near the right edge they begin further left, so that they end with the row.
    if (use != Use::kColumns) group_first[place] = std::max(0, std::min(first[place], input_size - 4 * groups));
    const int shift = first[place] - group_first[place];
    const std::int32_t* weights = weight.data() + place * static_cast<std::size_t>(stride);
    std::int16_t* splits = split.data() + place * static_cast<std::size_t>(groups) * 8;
    for (int k = 0; k < count[place]; ++k) {
      const int slot = (k + shift) / 4 * 8 + (k + shift) % 4;
      splits[slot] = static_cast<std::int16_t>(weights[k] >> kLowBits);
      splits[slot + 4] = static_cast<std::int16_t>(weights[k] & ((1 << kLowBits) - 1));
    }
  }
}

bool has_vector_code() {
#if VPGTRANS_AVX2
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

void filter_rows(const FilterTable& table, const std::uint8_t* const* source, std::uint8_t* const* target,
                 [[maybe_unused]] bool vector) {
#if VPGTRANS_AVX2
  if (vector) {
    switch (table.groups) {
      case 1: return filter_rows_avx2<1>(table, source, target);
      case 2: return filter_rows_avx2<2>(table, source, target);
      case 3: return filter_rows_avx2<3>(table, source, target);
      case 4: return filter_rows_avx2<4>(table, source, target);
      case 5: return filter_rows_avx2<5>(table, source, target);
      default: return filter_rows_avx2<0>(table, source, target);
    }
  }
#endif
  for (int r = 0; r < kRowsAtOnce; ++r) filter_row_plain(table, source[r], target[r]);
}

void filter_columns(const FilterTable& table, int y, const std::uint8_t* const* rows, std::size_t bytes,
                    std::uint8_t* target, [[maybe_unused]] bool vector) {
  const auto place = static_cast<std::size_t>(y);
  const int count = table.count[place];
#if VPGTRANS_AVX2
  if (vector) {
    const std::int16_t* split = table.split.data() + place * static_cast<std::size_t>(table.groups) * 8;
    return filter_columns_avx2(split, count, rows, bytes, target);
  }
#endif
  filter_columns_plain(table.weight.data() + place * static_cast<std::size_t>(table.stride), count, rows, bytes,
                       target);
}

}  // namespace vpgtrans
