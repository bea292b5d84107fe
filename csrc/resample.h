// Antialiased bicubic resampling of 8-bit interleaved RGB in the fixed-point arithmetic of Pillow's resize: equal to it
// bit for bit. Rows are filtered horizontally as they arrive, then columns vertically, rounded to 8 bits between.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vpgtrans {

// Rows that filter_rows takes at once.
constexpr int kRowsAtOnce = 4;

// Bytes behind the last pixel of a source row, a filtered row or a finished row that the vector code may touch.
constexpr std::size_t kRowSlack = 64;

// For each output position the inputs it is a weighted sum of: weights in units of 2^-22, as Pillow has them.
struct FilterTable {
  // What the table is for: filter_rows, filter_rows with the output mirrored, filter_columns.
  enum class Use { kRows, kMirroredRows, kColumns };

  int output_size = 0;
  int stride = 0;                    // weights an output position has room for, a multiple of 4; those past count are 0
  std::vector<std::int32_t> first;   // [output_size], index of the first input
  std::vector<std::int32_t> count;   // [output_size]
  std::vector<std::int32_t> weight;  // [output_size, stride]

  // The same for vector code, which takes `groups` times four inputs from group_first on for every output position of
  // rows, and count inputs from first on for columns. Each weight is high * 2^11 + low: 16-bit multiply-adds of pairs
  // are exact on these and cost half of 32-bit multiplications.
  int groups = 0;
  std::vector<std::int32_t> group_first;  // [output_size]
  std::vector<std::int16_t> split;        // [output_size, groups, {4 high, 4 low}]

  // Output position x covers inputs start + x * (stop - start) / output_size and on; inputs outside 0..input_size - 1
  // have no weight.
  void build(int input_size, float start, float stop, int output_size, Use use);

 private:
  void split_weights(int input_size, Use use);

  int input_size_ = -1;
  float start_ = 0, stop_ = 0;
  Use use_ = Use::kColumns;
  std::vector<double> exact_;
};

// Whether the vector code of this processor is there (AVX2).
bool has_vector_code();

// Filters kRowsAtOnce rows of interleaved RGB: target[r] gets table.output_size pixels from source[r].
void filter_rows(const FilterTable& table, const std::uint8_t* const* source, std::uint8_t* const* target, bool vector);

// Filters output row `y` of `bytes` columns from the rows table.first[y] and on, whose addresses `rows` holds.
void filter_columns(const FilterTable& table, int y, const std::uint8_t* const* rows, std::size_t bytes,
                    std::uint8_t* target, bool vector);

}  // namespace vpgtrans
