// Working memory that survives from one call to the next, so that no call pays page faults.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, size)
#define ASAN_UNPOISON_MEMORY_REGION(start, size)
#endif

namespace jaxserve {

// An arena for the length of one call: take() hands out 64-byte aligned arrays.
class Scratch {
 public:
  // Reserves for everything that will be taken; earlier pointers become invalid. Throws
  // std::bad_alloc where the system has no more, which becomes the handler's error (`guarded`).
  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes > size_) {
      size_ = 0;
      data_.reset();  // free before allocating, or the peak is the sum of both
      data_.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes))));
      if (!data_) throw std::bad_alloc();
      size_ = round_up(bytes);
    }
    ASAN_POISON_MEMORY_REGION(data_.get(), size_);
  }

  template <class T>
  T* take(int64_t count) {
    char* start = data_.get() + used_;
    used_ += bytes<T>(count);
    ASAN_UNPOISON_MEMORY_REGION(start, count * sizeof(T));
    return reinterpret_cast<T*>(start);
  }

  template <class T>
  static int64_t bytes(int64_t count) {
    return round_up(count * int64_t(sizeof(T))) + kGap;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGap = 64;  // an overrun hits poisoned memory, not the next array
#else
  static constexpr int64_t kGap = 0;
#endif

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

// The working memory of a call that all helpers share in. There are as many as calls run at once,
// not one for each of XLA's threads, which take turns at calling; the one used last is lent first.
class SharedScratch {
 public:
  SharedScratch() {
    List& list = shared();
    std::lock_guard<std::mutex> lock(list.mutex);
    if (list.first) {
      mine_ = std::move(list.first);
      list.first = std::move(mine_->next);
    } else {
      mine_ = std::make_unique<Node>();
    }
  }
  ~SharedScratch() {
    List& list = shared();
    std::lock_guard<std::mutex> lock(list.mutex);
    mine_->next = std::move(list.first);
    list.first = std::move(mine_);
  }
  SharedScratch(const SharedScratch&) = delete;
  SharedScratch& operator=(const SharedScratch&) = delete;

  Scratch& operator*() const { return mine_->scratch; }

 private:
  struct Node {
    Scratch scratch;
    std::unique_ptr<Node> next;
  };
  struct List {
    std::mutex mutex;
    std::unique_ptr<Node> first;
  };

  static List& shared() {
    static List* list = new List;  // never destroyed: calls may outlive main
    return *list;
  }

  std::unique_ptr<Node> mine_;
};

}  // namespace jaxserve
