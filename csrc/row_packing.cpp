#include "row_packing.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace vpgtrans {
namespace {

// Open rows by the free space they have left: one min-heap of row numbers per amount of free space, and a
// binary tree over the amounts that tells which heaps hold anything.
class FreeSpaceIndex {
 public:
  explicit FreeSpaceIndex(std::size_t budget) : rows_by_free_(budget + 1) {
    while (leaf_count_ < budget + 1) leaf_count_ *= 2;
    occupied_.assign(2 * leaf_count_, 0);
  }

  void add(std::size_t free, std::int32_t row) {
    std::vector<std::int32_t>& rows = rows_by_free_[free];
    rows.push_back(row);
    std::push_heap(rows.begin(), rows.end(), std::greater<>());
    for (std::size_t node = leaf_count_ + free; node >= 1 && !occupied_[node]; node /= 2) occupied_[node] = 1;
  }

  // The least amount of free space >= length that a row has; kNone where there is no such row.
  std::size_t tightest_fit(std::size_t length) const {
    std::size_t node = leaf_count_ + length;
    if (occupied_[node]) return length;
    // Up until an occupied subtree lies to the right, then down along its left edge.
    for (;; node /= 2) {
      if (node == 1) return kNone;
      const bool is_left_child = node % 2 == 0;
      if (is_left_child && occupied_[node + 1]) break;
    }
    ++node;
    while (node < leaf_count_) node = occupied_[2 * node] ? 2 * node : 2 * node + 1;
    return node - leaf_count_;
  }

  std::int32_t take_lowest_row(std::size_t free) {
    std::vector<std::int32_t>& rows = rows_by_free_[free];
    std::pop_heap(rows.begin(), rows.end(), std::greater<>());
    const std::int32_t row = rows.back();
    rows.pop_back();
    if (rows.empty()) {
      occupied_[leaf_count_ + free] = 0;
      for (std::size_t node = (leaf_count_ + free) / 2; node >= 1; node /= 2)
        occupied_[node] = occupied_[2 * node] | occupied_[2 * node + 1];
    }
    return row;
  }

  static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

 private:
  std::vector<std::vector<std::int32_t>> rows_by_free_;
  std::size_t leaf_count_ = 1;
  std::vector<unsigned char> occupied_;
};

template <typename Length>
void check_arguments(const Length* lengths, std::size_t item_count, std::int64_t budget) {
  if (budget < 1 || budget > kMaxRowBudget)
    throw std::invalid_argument("pack_rows: budget is " + std::to_string(budget) + ", expected 1.." +
                                std::to_string(kMaxRowBudget) + " tokens a row");
  if (item_count > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
    throw std::invalid_argument("pack_rows: " + std::to_string(item_count) +
                                " items, expected at most 2147483647; pack them in several calls");
  for (std::size_t i = 0; i < item_count; ++i)
    if (lengths[i] < 1 || static_cast<std::int64_t>(lengths[i]) > budget)
      throw std::invalid_argument("pack_rows: lengths[" + std::to_string(i) + "] is " + std::to_string(lengths[i]) +
                                  ", expected 1.." + std::to_string(budget) +
                                  " (the budget); drop or cut the item, or raise the budget");
}

}  // namespace

template <typename Length>
void pack_rows(const Length* lengths, std::size_t item_count, std::int64_t budget, std::int32_t* row_of_item) {
  check_arguments(lengths, item_count, budget);
  const auto row_tokens = static_cast<std::size_t>(budget);
  std::vector<std::size_t> items_of_length(row_tokens + 1, 0);
  for (std::size_t i = 0; i < item_count; ++i) ++items_of_length[static_cast<std::size_t>(lengths[i])];

  // Rows in the order of placement, longest first. The packing depends on the lengths alone, so the items are not
  // sorted: memory is walked in order, which over a million items costs less than following sorted indices.
  std::vector<std::int32_t> row_of_placement(item_count);
  std::vector<std::size_t> next_placement(row_tokens + 1, 0);  // of each length
  FreeSpaceIndex open_rows(row_tokens);
  std::int32_t row_count = 0;
  std::size_t placement = 0;
  for (std::size_t length = row_tokens; length >= 1; --length) {
    next_placement[length] = placement;
    for (std::size_t k = 0; k < items_of_length[length]; ++k) {
      std::size_t free = open_rows.tightest_fit(length);
      std::int32_t row;
      if (free == FreeSpaceIndex::kNone) {
        row = row_count++;
        free = row_tokens;
      } else {
        row = open_rows.take_lowest_row(free);
      }
      row_of_placement[placement++] = row;
      // A full row is dropped: no item of length >= 1 can enter it.
      if (free > length) open_rows.add(free - length, row);
    }
  }

  // Equal lengths were placed in the order of their index.
  for (std::size_t i = 0; i < item_count; ++i)
    row_of_item[i] = row_of_placement[next_placement[static_cast<std::size_t>(lengths[i])]++];
}

template void pack_rows<std::int32_t>(const std::int32_t*, std::size_t, std::int64_t, std::int32_t*);
template void pack_rows<std::int64_t>(const std::int64_t*, std::size_t, std::int64_t, std::int32_t*);

}  // namespace vpgtrans
