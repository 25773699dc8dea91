#include "threads.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace jaxserve {
namespace {

// Long enough to bridge the small XLA ops between two of our handlers, short enough to be cheap.
constexpr auto kSpin = std::chrono::microseconds(200);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int default_num_threads() {
#if defined(__linux__)
  cpu_set_t mine;
  if (sched_getaffinity(0, sizeof(mine), &mine) == 0) return CPU_COUNT(&mine);
#endif
  return int(std::thread::hardware_concurrency());
}

int wanted_num_threads() {
  const char* text = std::getenv("JAXSERVE_NUM_THREADS");
  int n = text ? std::atoi(text) : 0;
  return n > 0 ? n : default_num_threads();
}

}  // namespace

Pool& Pool::shared() {
  static Pool* pool = new Pool(wanted_num_threads());  // never destroyed: helpers outlive main
  return *pool;
}

// The system may refuse threads (a limit, no memory): those that exist wait for this very pool, so
// it goes on with them.
Pool::Pool(int num_threads) {
  const int wanted = std::max(num_threads - 1, 0);
  helpers_.reserve(size_t(wanted));
  try {
    while (int(helpers_.size()) < wanted) {
      std::thread helper([this] { help(); });
      helpers_.push_back(helper.native_handle());
      helper.detach();
    }
  } catch (const std::exception& error) {  // std::system_error, or std::bad_alloc
    std::fprintf(stderr,
                 "jaxserve: native CPU kernels run on %d of %d threads: the system refused another "
                 "(%s); raise its limits, or set JAXSERVE_NUM_THREADS\n",
                 int(helpers_.size()) + 1, num_threads, error.what());
  }
  num_helpers_ = int(helpers_.size());
}

void Pool::run(int64_t n, Call call, const void* fn) {
  if (n <= 1 || num_helpers_ == 0 || busy_.exchange(true)) {
    for (int64_t i = 0; i < n; ++i) call(fn, i);
    return;
  }
  keep_apart();
  call_.store(call, std::memory_order_relaxed);
  fn_.store(fn, std::memory_order_relaxed);
  num_chunks_.store(n, std::memory_order_relaxed);
  unfinished_.store(n, std::memory_order_relaxed);
  ticket_.store(((ticket_.load() >> 32) + 1) << 32 | uint64_t(n));
  if (num_sleeping_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }  // a helper between its check and its sleep
    wake_.notify_all();
  }
  drain();
  for (int spins = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < 2000) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  const bool starved = starved_.exchange(false, std::memory_order_relaxed);
  busy_.store(false);
  if (starved) throw std::bad_alloc();
}

// A woken helper may be put beside the caller, if other cores are busy at that moment, and Linux
// moves it only when it next balances cores, which may be after the step. Callers are threads of
// XLA, whose cores are their own affair.
void Pool::keep_apart() {
#if defined(__linux__)
  const int core = sched_getcpu();
  if (core == avoided_) return;
  avoided_ = core;
  cpu_set_t others;  // the caller's cores are those of the process: helpers have fewer
  if (core < 0 || sched_getaffinity(0, sizeof(others), &others) != 0) return;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) < num_helpers_) return;
  for (auto helper : helpers_) pthread_setaffinity_np(helper, sizeof(others), &others);
#endif
}

void Pool::drain() {
  uint64_t ticket = ticket_.load();
  while (uint32_t unclaimed = uint32_t(ticket)) {
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1)) continue;
    // We hold a chunk, so the job cannot end and these fields cannot change.
    int64_t chunk = num_chunks_.load(std::memory_order_relaxed) - unclaimed;
    try {
      call_.load(std::memory_order_relaxed)(fn_.load(std::memory_order_relaxed), chunk);
    } catch (const std::bad_alloc&) {
      starved_.store(true, std::memory_order_relaxed);
    }
    unfinished_.fetch_sub(1, std::memory_order_release);
    ticket = ticket_.load();
  }
}

void Pool::help() {
  for (;;) {
    wait_for_work();
    drain();
  }
}

void Pool::wait_for_work() {
  auto give_up = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (has_work()) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < give_up);
  std::unique_lock<std::mutex> lock(mutex_);
  num_sleeping_.fetch_add(1);
  wake_.wait(lock, [this] { return has_work(); });
  num_sleeping_.fetch_sub(1);
}

}  // namespace jaxserve
