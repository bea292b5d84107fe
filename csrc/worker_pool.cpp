#include "worker_pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace vpgtrans {
namespace {

struct Loop {
  Loop(std::size_t item_count, const std::function<void(std::size_t)>& call) : count(item_count), item(call) {}

  void work() {
    std::size_t done_here = 0;
    for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++done_here) item(i);
    if (done_here == 0) return;
    const std::lock_guard lock(mutex);
    done += done_here;
    if (done == count) all_done.notify_one();
  }

  const std::size_t count;
  const std::function<void(std::size_t)>& item;  // the caller's; not touched once all items are handed out
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  std::size_t done = 0;  // under mutex
};

class WorkerPool {
 public:
  void invite(int helpers, const std::shared_ptr<Loop>& loop) {
    {
      const std::lock_guard lock(mutex_);
      while (worker_count_ < helpers && start_worker()) {
      }
      for (int i = 0; i < std::min(helpers, worker_count_); ++i) invitations_.push_back(loop);
    }
    invited_.notify_all();
  }

  const pid_t process = getpid();

 private:
  bool start_worker() {
    // Signals are for the threads of the interpreter.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread([this] { serve(); }).detach();
      ++worker_count_;
    } catch (const std::system_error&) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  void serve() {
    for (;;) {
      std::shared_ptr<Loop> loop;
      {
        std::unique_lock lock(mutex_);
        invited_.wait(lock, [this] { return !invitations_.empty(); });
        loop = std::move(invitations_.front());
        invitations_.pop_front();
      }
      loop->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable invited_;
  std::deque<std::shared_ptr<Loop>> invitations_;
  int worker_count_ = 0;
};

// Never destroyed: its threads end with the process. A fork copies the pool without its threads and perhaps with a
// locked mutex, so the child leaves it alone and makes another.
WorkerPool& pool_of_this_process() {
  static std::atomic<WorkerPool*> current{nullptr};
  WorkerPool* pool = current.load();
  while (pool == nullptr || pool->process != getpid()) {
    auto* fresh = new WorkerPool;
    if (current.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
  }
  return *pool;
}

}  // namespace

void for_each_item(std::size_t count, int threads, const std::function<void(std::size_t)>& item) {
  if (count == 0) return;
  const auto loop = std::make_shared<Loop>(count, item);
  const auto workers = std::min<std::size_t>(count, static_cast<std::size_t>(std::clamp(threads, 1, kMaxThreads)));
  try {
    if (workers > 1) pool_of_this_process().invite(static_cast<int>(workers) - 1, loop);
  } catch (const std::bad_alloc&) {
    // This thread does what nobody could be invited to.
  }
  loop->work();
  std::unique_lock lock(loop->mutex);
  loop->all_done.wait(lock, [&] { return loop->done == count; });
}

}  // namespace vpgtrans
