// A step of many sequences as tasks for threads: which rows of queries attend to which keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pages.h"
#include "threads.h"
#include "tiles.h"

namespace jaxserve {

// Enough rows (query tokens times the heads that share a kv head) to pay for packing a block of
// keys, few enough that scores, keys, values and sums stay in L2. By tiles a row costs less, and
// more of them pay, if threads have enough to do.
constexpr int64_t kRowsPerTask = kTiles ? 4 * kTileRows : 11 * kOuterRows;
constexpr int64_t kMostRowsPerTask = kTiles ? 4 * kRowsPerTask : kRowsPerTask;

// Sequences firsts[g] to ends[g] begin with the same pages[g] pages, and write none of them.
struct Groups {
  const int32_t *firsts, *ends, *pages;  // [C] each
  int64_t count;
};

struct Batch {
  const int32_t* row_starts;  // [R + 1]
  const int32_t* kv_lens;     // [R]
  const int32_t* tables;      // [R, M]
  int64_t table_width;
  int64_t num_seqs;
  Groups groups;

  int64_t num_queries(int64_t seq) const { return row_starts[seq + 1] - row_starts[seq]; }
  int64_t first_position(int64_t seq) const { return kv_lens[seq] - num_queries(seq); }
  const int32_t* table(int64_t seq) const { return tables + seq * table_width; }
};

// Keys at positions [begin, end), from the beginning of a block, and the rows of a task that attend
// to them. Those are rows of one sequence, the first of them its query token `first_row / heads`,
// head `first_row % heads` of those that share a kv head; or, where `common`, all rows of the task,
// which see all of these keys.
struct Stretch {
  int64_t seq, begin, end;
  int64_t row, num_rows;
  int64_t first_row;
  bool common;
};

// One kv head of some stretches. If the first is common, the others, each of a sequence by itself,
// go on from there.
struct Task {
  int64_t kv_head;
  const Stretch *begin, *end;

  int64_t num_rows() const { return end[-1].row + end[-1].num_rows; }
  const Stretch* own() const { return begin + begin->common; }
};

class Tasks {
 public:
  // `heads` of queries share each of the kv heads. A `window` leaves nothing to share.
  Tasks(const Batch& batch, int64_t num_kv_heads, int64_t heads, int64_t window, int64_t page_size)
      : batch_(batch), num_kv_heads_(num_kv_heads), heads_(heads), window_(window) {
    const int64_t even = even_rows(0, batch.num_seqs) / kRowsPerTask * kRowsPerTask;
    rows_alone_ = std::clamp(even, kRowsPerTask, kMostRowsPerTask);
    int64_t seq = 0;
    const Groups& groups = batch.groups;
    for (int64_t g = 0; g < groups.count && window == 0; ++g) {
      const int64_t first = groups.firsts[g], end = groups.ends[g];
      const int64_t shared = shared_keys(first, end, groups.pages[g] * page_size);
      if (first < seq || shared <= 0) continue;
      while (seq < first) alone(seq++);
      together(first, end, shared);
      seq = end;
    }
    while (seq < batch.num_seqs) alone(seq++);
    cut();
  }

  int64_t num_chunks() const { return int64_t(chunks_.size()) - 1; }
  const Task* begin(int64_t chunk) const { return &tasks_[chunks_[chunk]]; }
  const Task* end(int64_t chunk) const { return tasks_.data() + chunks_[chunk + 1]; }

 private:
  struct Run {
    size_t begin, end;  // of stretches
  };

  int64_t num_rows(int64_t seq) const { return batch_.num_queries(seq) * heads_; }

  // Whole blocks of keys that lie before all that members write.
  int64_t shared_keys(int64_t first, int64_t end, int64_t shared) const {
    if (end - first < 2 || first < 0 || end > batch_.num_seqs) return 0;
    for (int64_t seq = first; seq < end; ++seq) {
      shared = batch_.num_queries(seq) > 0 ? std::min(shared, batch_.first_position(seq)) : 0;
    }
    return shared / kBlockKeys * kBlockKeys;
  }

  // Rows [begin, end) of a sequence, which are rows of their task from `row` on.
  void add(int64_t seq, int64_t row, int64_t begin, int64_t end, int64_t shared) {
    const int64_t start = batch_.first_position(seq), oldest = start + begin / heads_;
    const int64_t seen = window_ > 0 ? std::max<int64_t>(0, oldest - window_ + 1) : shared;
    const int64_t last = start + (end - 1) / heads_ + 1;
    const int64_t block = seen / kBlockKeys * kBlockKeys;
    stretches_.push_back({seq, block, last, row, end - begin, begin, false});
  }

  // Late queries see the most keys: they go first, so that the last chunk claimed is a small one.
  void alone(int64_t seq) {
    for (int64_t end = num_rows(seq); end > 0;) {
      const int64_t begin = (end - 1) / rows_alone_ * rows_alone_;
      add(seq, 0, begin, end, 0);
      runs_.push_back({stretches_.size() - 1, stretches_.size()});
      end = begin;
    }
  }

  // Packs consecutive members into tasks of at most `rows_per_task` rows.
  void together(int64_t first, int64_t end, int64_t shared) {
    const int64_t most = rows_per_task(first, end);
    for (int64_t seq = first; seq < end;) {
      int64_t rows = 0, stop = seq;
      while (stop < end && rows + num_rows(stop) <= most) rows += num_rows(stop++);
      if (stop - seq < 2) {
        alone(seq++);
        continue;
      }
      const size_t before = stretches_.size();
      stretches_.push_back({seq, 0, shared, 0, rows, 0, true});
      for (int64_t row = 0; seq < stop; row += num_rows(seq++)) {
        add(seq, row, 0, num_rows(seq), shared);
      }
      runs_.push_back({before, stretches_.size()});
    }
  }

  // Rows of a task if every thread gets some tasks of those sequences.
  int64_t even_rows(int64_t first, int64_t end) const {
    const int64_t rows = (batch_.row_starts[end] - batch_.row_starts[first]) * heads_;
    return ceil_div(rows * num_kv_heads_, Pool::shared().num_threads() * kTasksPerThread);
  }

  // Row limit: room for two decoding members.
  int64_t rows_per_task(int64_t first, int64_t end) const {
    return std::min(kRowsPerTask, std::max(even_rows(first, end), 2 * heads_));
  }

  // Tasks of about as much work fall to a thread at a time.
  void cut() {
    int64_t total = 0;
    for (const Run& run : runs_) {
      for (int64_t head = 0; head < num_kv_heads_; ++head) {
        tasks_.push_back({head, &stretches_[run.begin], stretches_.data() + run.end});
      }
      total += work(tasks_.back()) * num_kv_heads_;
    }
    const int64_t fair = ceil_div(total, Pool::shared().num_threads() * kChunksPerThread);
    int64_t taken = 0;
    chunks_.push_back(0);
    for (int64_t i = 0; i < int64_t(tasks_.size()); ++i) {
      if (i > chunks_.back() && (taken >= fair || i - chunks_.back() == kMostTasks)) {
        chunks_.push_back(i);
        taken = 0;
      }
      taken += work(tasks_[i]);
    }
    if (!tasks_.empty()) chunks_.push_back(int64_t(tasks_.size()));
  }

  // Reading and packing a block of keys is worth a few rows of products.
  static int64_t work(const Task& task) {
    int64_t sum = 0;
    for (const Stretch* s = task.begin; s < task.end; ++s) {
      sum += (s->end - s->begin) * (s->num_rows + kOuterRows);
    }
    return sum;
  }

  static constexpr int64_t kTasksPerThread = 4, kChunksPerThread = 8, kMostTasks = 16;

  const Batch& batch_;
  int64_t num_kv_heads_, heads_, window_;
  int64_t rows_alone_;
  std::vector<Stretch> stretches_;
  std::vector<Run> runs_;
  std::vector<Task> tasks_;
  std::vector<int64_t> chunks_;
};

}  // namespace jaxserve
