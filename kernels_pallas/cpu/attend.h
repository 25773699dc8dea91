// Attention of tasks: rows of queries pass by blocks of keys and values.
#pragma once

#include "attend_columns.h"
#include "attend_rows.h"

namespace jaxserve {

template <class T>
void finish(const Attention<T>& job, int64_t kv_head, const Stretch& stretch,
            const Work<T>& work) {
  const int64_t padded = job.padded_values();
  for (int64_t i = 0; i < stretch.num_rows; ++i) {
    const int64_t query = query_of(job, kv_head, stretch, i);
    Row row{work.base[i], work.total[i]};
    float shrink = 1.0f;
    if (job.sinks) shrink = row.add_sink(job.sinks[query % job.num_heads]);
    const float factor = row.sum == 0 ? 0.0f : shrink / row.sum;
    const float* sums = work.sums + i * padded;
    float* out = job.out + query * job.value_dim;
    for (int64_t j = 0; j < job.value_dim; ++j) out[j] = sums[j] * factor;
    if (job.coded_values) job.coded_values->turn(out, job.value_dim);
    job.lse[query] = row.log_sum();
  }
}

// Sums of sixteen rows at a time become rows.
template <class T>
void finish_columns(const Attention<T>& job, int64_t kv_head, const Stretch& stretch,
                    const Work<T>& work) {
  const int64_t padded = job.padded_values();
  float* rows = reinterpret_cast<float*>(work.values);
  for (int64_t row = 0; row < stretch.num_rows; row += kTileRows) {
    for (int64_t col = 0; col < padded; col += kTileRows) {
      transpose_lines(work.sums + row * padded + col * kTileRows, 4 * kTileRows,
                      [&](int64_t i, U sums) { store(rows + i * padded + col, sums); });
    }
    Stretch part = stretch;
    part.first_row += row;
    part.num_rows = std::min(kTileRows, stretch.num_rows - row);
    Work<T> some = work.from(job, row);
    some.sums = rows;
    finish(job, kv_head, part, some);
  }
}

// Tasks in turn. While one block is worked on, the next comes into L2, be it another task's.
template <class T>
void attend(const Attention<T>& job, const Task* task, const Task* end) {
  thread_local Scratch scratch;
  const Tiles tiles(job.by_tiles());
  auto open = [&](const Task* task, const Stretch* s, int64_t first) {
    // pages that have to be decoded are, each block when its turn comes
    return Context<T>(job, task->kv_head, *s, job.coded_keys ? s->end : first);
  };
  auto after = [&](const Task* task, const Stretch* s, int64_t first) {
    if (first + kBlockKeys < s->end) return open(task, s, first + kBlockKeys);
    if (s + 1 < task->end) return open(task, s + 1, s[1].begin);
    if (task + 1 < end) return open(task + 1, task[1].begin, task[1].begin->begin);
    return open(task, s, s->end);  // none
  };
  Context<T> now = open(task, task->begin, task->begin->begin);
  for (; task < end; ++task) {
    const int64_t head = task->kv_head;
    const Work<T> work(scratch, job, task->num_rows());
    const bool columns = job.by_columns(*task);
    for (const Stretch* s = task->own(); s < task->end; ++s) {
      load_queries(job, head, *s, work.from(job, s->row));
    }
    for (const Stretch* s = task->begin; s < task->end; ++s) {
      const Work<T> rows = work.from(job, s->row);
      if (job.by_tiles()) regroup(job, rows, s->num_rows);
      for (int64_t first = s->begin; first < s->end; first += kBlockKeys) {
        if (job.coded_keys) now = decode(job, head, *s, rows, first);
        const Context<T> next = after(task, s, first);
        if constexpr (std::is_same_v<T, bf16>) {
          (columns ? attend_columns : attend_rows<T>)(job, *s, rows, now, next);
        } else {
          attend_rows(job, *s, rows, now, next);
        }
        now = next;
      }
    }
    for (const Stretch* s = task->own(); s < task->end; ++s) {
      const Work<T> rows = work.from(job, s->row);
      columns ? finish_columns(job, head, *s, rows) : finish(job, head, *s, rows);
    }
  }
}

}  // namespace jaxserve
