// A pool whose helpers only ever help.
//
// The caller publishes a job of n chunks and starts on it at once; helpers claim chunks from the
// same counter. A helper that the system does not schedule therefore delays nobody, and a second
// handler that runs at the same time simply does all its chunks itself. Helpers keep off the
// caller's core: two that never sleep may share one for tens of milliseconds beside an idle one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace jaxserve {

class Pool {
 public:
  static Pool& shared();

  int num_threads() const { return num_helpers_ + 1; }

  // fn(0) .. fn(n - 1), in any order, on any thread; returns when all are done. Where one of them
  // has thrown std::bad_alloc, on whatever thread, so does this.
  template <class Fn>
  void run(int64_t n, const Fn& fn) {
    auto call = [](const void* f, int64_t chunk) { (*static_cast<const Fn*>(f))(chunk); };
    run(n, call, &fn);
  }

 private:
  using Call = void (*)(const void*, int64_t);

  explicit Pool(int num_threads);
  void run(int64_t n, Call call, const void* fn);
  void keep_apart();
  void drain();
  void help();
  void wait_for_work();
  bool has_work() const { return uint32_t(ticket_.load()) != 0; }

  int num_helpers_ = 0;
  std::vector<std::thread::native_handle_type> helpers_;
  int avoided_ = -1;  // the core that no helper may use; whoever is busy_ says which
  // High half: the job's number. Low half: its chunks not yet claimed. One word, so that a helper
  // that wakes up late can never claim a chunk of a job other than the one it looked at.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<Call> call_{nullptr};
  std::atomic<const void*> fn_{nullptr};
  std::atomic<int64_t> num_chunks_{0};
  std::atomic<bool> starved_{false};  // a chunk of the job had no memory
  std::atomic<bool> busy_{false};
  std::atomic<int> num_sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace jaxserve
