// Threads that live as long as the process and share out the items of a loop.
#pragma once

#include <cstddef>
#include <functional>

namespace vpgtrans {

constexpr int kMaxThreads = 256;

// Calls item(i) once for every i in 0..count - 1, from the calling thread and up to threads - 1 others, and returns
// when all calls have. Several threads may call this at once, and so may the child of a fork, which gets threads of its
// own. Items are handed out in order, one by one. `item` must not throw. Where the system grants no further thread,
// fewer work.
void for_each_item(std::size_t count, int threads, const std::function<void(std::size_t)>& item);

}  // namespace vpgtrans
