// Best-fit-decreasing packing of items into rows of a fixed token budget.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vpgtrans {

// Largest token budget of one row: the free-space index takes about 40 bytes per token of budget.
constexpr std::int64_t kMaxRowBudget = std::int64_t{1} << 20;

// Writes to row_of_item[i] the row (0-based, numbered in the order the rows are opened) of item i.
//
// Items are placed longest first, equal lengths in the order of their index. Each goes to the row with the
// least free space that still holds it, the lowest-numbered one where several have the same; where none
// holds it, a row is opened. Time O(n log n + budget) at worst, in practice linear in n.
//
// Throws std::invalid_argument for a budget outside 1..kMaxRowBudget, for a length outside 1..budget (naming
// the first such item) and for more than 2^31 - 1 items.
template <typename Length>
void pack_rows(const Length* lengths, std::size_t item_count, std::int64_t budget, std::int32_t* row_of_item);

}  // namespace vpgtrans
