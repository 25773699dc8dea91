// Attention of tasks: rows of queries pass by blocks of keys and values.
#pragma once

#include "coded.h"
#include "dot.h"
#include "pages.h"
#include "scratch.h"
#include "softmax.h"
#include "tasks.h"

namespace jaxserve {

// Up to here (the heads of a group that decodes) keys and values are used as they lie: packing them
// would cost more than it saves.
constexpr int64_t kFewRows = 2 * kOuterRows;

template <class T>
struct Attention {
  Batch batch;
  Pages<T> keys, values;  // values may be keys themselves: then a value is the head of its key
  // Where pages are of eight or four bits: then those of T have no data, only sizes.
  const CodedPages *coded_keys = nullptr, *coded_values = nullptr;
  const float* q;         // [T, N, H]
  float* out;             // [T, N, Hv]
  float* lse;             // [T, N]
  const float* sinks;     // [N] or null
  int64_t num_heads, value_dim, window;
  Scores scores;

  int64_t group() const { return num_heads / keys.num_heads; }
  // Floats by tiles add up in another order, so the number of rows has no say in it.
  bool by_tiles() const {
    return std::is_same_v<T, bf16> && keys.width % (2 * kTileWords) == 0 && have_tiles();
  }
  bool few(int64_t num_rows) const {
    return num_rows <= kFewRows && value_dim % (kOuterVecs * kLanes) == 0;
  }
  int64_t padded_values() const { return (value_dim + kLanes - 1) / kLanes * kLanes; }
};

// Working memory of one task. Rows of q, scores and so on are contiguous.
template <class T>
struct Work {
  T *q, *spare, *zeros, *keys, *values, *weights, *decoded;
  float *scores, *sums, *shrink, *most, *total, *floats;
  char* groups;  // of the rows of q that a stretch has, where products go by tiles

  Work(Scratch& scratch, const Attention<T>& job, int64_t num_rows) {
    const int64_t q_count = (num_rows + kStripRows) * padded_keys<T>(job.keys.width);
    const int64_t group_words = job.by_tiles() ? words_of<T>(job.keys.width) : 0;
    const int64_t group_count = ceil_div(num_rows, kTileRows) * group_bytes(group_words);
    const int64_t spare_count = 2 * kLanes * padded_keys<T>(job.keys.width);
    const int64_t key_count = kBlockKeys * padded_keys<T>(job.keys.width);
    const int64_t value_count = kBlockKeys * job.padded_values();
    // a tile may look at rows past the last one
    const int64_t score_count = (num_rows + kTileRows) * kBlockKeys;
    const int64_t sum_count = num_rows * job.padded_values();
    const int64_t widest = std::max(job.keys.width, job.values.width);
    const int64_t decoded_count = job.coded_keys ? 2 * kBlockKeys * widest : 0;
    scratch.reset(Scratch::bytes<T>(decoded_count) + Scratch::bytes<float>(widest) +
                  Scratch::bytes<T>(q_count) + Scratch::bytes<T>(spare_count) +
                  Scratch::bytes<T>(job.padded_values()) +
                  Scratch::bytes<T>(key_count) +
                  Scratch::bytes<T>(value_count) + Scratch::bytes<T>(score_count) +
                  Scratch::bytes<float>(score_count) + Scratch::bytes<float>(sum_count) +
                  3 * Scratch::bytes<float>(num_rows + kLanes) +
                  Scratch::bytes<char>(group_count));
    q = scratch.take<T>(q_count);
    spare = scratch.take<T>(spare_count);
    zeros = scratch.take<T>(job.padded_values());
    keys = scratch.take<T>(key_count);
    values = scratch.take<T>(value_count);
    weights = scratch.take<T>(score_count);
    decoded = scratch.take<T>(decoded_count);
    floats = scratch.take<float>(widest);
    scores = scratch.take<float>(score_count);
    sums = scratch.take<float>(sum_count);
    shrink = scratch.take<float>(num_rows + kLanes);  // the three are written by whole registers
    most = scratch.take<float>(num_rows + kLanes);
    total = scratch.take<float>(num_rows + kLanes);
    groups = scratch.take<char>(group_count);
    std::memset(zeros, 0, job.padded_values() * sizeof(T));
    std::memset(sums, 0, sum_count * sizeof(float));
    std::fill(most, most + num_rows + kLanes, kMinusInfinity);
    std::memset(total, 0, (num_rows + kLanes) * sizeof(float));
  }

  // For the rows from that one on.
  Work from(const Attention<T>& job, int64_t row) const {
    Work work = *this;
    work.q += row * padded_keys<T>(job.keys.width);
    work.weights += row * kBlockKeys;
    work.scores += row * kBlockKeys;
    work.sums += row * job.padded_values();
    work.shrink += row;
    work.most += row;
    work.total += row;
    return work;
  }
};

// Where row i of a stretch is in the [T, N] grid of all query heads.
template <class T>
int64_t query_of(const Attention<T>& job, int64_t kv_head, const Stretch& stretch, int64_t i) {
  const int64_t row = stretch.first_row + i;
  const int64_t token = job.batch.row_starts[stretch.seq] + row / job.group();
  return token * job.num_heads + kv_head * job.group() + row % job.group();
}

template <class T>
void load_queries(const Attention<T>& job, int64_t kv_head, const Stretch& stretch,
                  const Work<T>& work) {
  T* to = work.q;
  const int64_t width = job.keys.width;
  const int64_t stride = padded_keys<T>(width);
  auto row = [&](int64_t i) { return job.q + query_of(job, kv_head, stretch, i) * width; };
  for (int64_t i = 0; i < stretch.num_rows; ++i, to += stride) {
    const float* from = row(i);
    if (i + 1 < stretch.num_rows) fetch(row(i + 1), width * int64_t(sizeof(float)));
    if (job.coded_keys) {
      convert(work.floats, from, width);
      job.coded_keys->turn(work.floats, width);
      from = work.floats;
    }
    convert(to, from, width);
    std::memset(to + width, 0, (stride - width) * sizeof(T));
  }
}

// The keys and values at positions [first, first + kBlockKeys), as far as a stretch goes.
template <class T>
struct Context {
  int64_t first;
  Block<T> keys, values;

  Context(const Attention<T>& job, int64_t kv_head, const Stretch& stretch, int64_t first)
      : first(first),
        keys(job.keys, job.batch.table(stretch.seq), kv_head, first, stretch.end),
        values(job.values, job.batch.table(stretch.seq), kv_head, first, stretch.end) {}

  Context(int64_t first, const Block<T>& keys, const Block<T>& values)
      : first(first), keys(keys), values(values) {}
};

// The rows at positions [first, end) as T in `to`. Meanwhile those of the next block come into L2.
template <class T>
Block<T> decode(const CodedPages& pages, const int32_t* table, int64_t head, int64_t first,
                int64_t end, float* spare, T* to) {
  Block<T> block(std::min(kBlockKeys, end - first), true);
  for (int64_t i = 0; i < block.count; ++i, to += pages.width) {
    const int64_t position = first + i, page = pages.page_of(table, position);
    if (position + kBlockKeys < end) pages.prefetch(table, head, position + kBlockKeys);
    if (!pages.has(page)) {
      block.in_runs = false;
      continue;
    }
    pages.take(page, head, position % pages.page_size, spare);
    convert(to, spare, pages.width);
    block.rows[i] = to;
  }
  return block;
}

template <class T>
Context<T> decode(const Attention<T>& job, int64_t kv_head, const Stretch& stretch,
                  const Work<T>& work, int64_t first) {
  const int32_t* table = job.batch.table(stretch.seq);
  auto decode = [&](const CodedPages& pages, T* to) {
    return jaxserve::decode(pages, table, kv_head, first, stretch.end, work.floats, to);
  };
  const Block<T> keys = decode(*job.coded_keys, work.decoded);
  if (job.coded_values == job.coded_keys) return {first, keys, keys};
  return {first, keys, decode(*job.coded_values, work.decoded + kBlockKeys * job.keys.width)};
}

template <class T>
void regroup(const Attention<T>& job, const Work<T>& work, int64_t num_rows) {
  const int64_t words = words_of<T>(job.keys.width), stride = padded_keys<T>(job.keys.width);
  for (int64_t i = 0; i < num_rows; i += kTileRows) {
    put_group(reinterpret_cast<const char*>(work.q + i * stride), 4 * words, words, nullptr, 0,
              work.groups + i / kTileRows * group_bytes(words));
  }
}

// work.scores = q . keys, where products go by tiles. Keys are used as they lie.
template <class T>
void score_by_tiles(const Attention<T>& job, int64_t num_rows, const Work<T>& work,
                    const Context<T>& now, const Context<T>& next) {
  constexpr int64_t kRows = TileProducts<T>::kRows;
  const int64_t width = job.keys.width, words = words_of<T>(width);
  TileProducts<T> products;
  for (int64_t key = 0; key < now.keys.count; key += TileProducts<T>::kCols) {
    const Run<T> first = run_of(now.keys, key, width, work.spare);
    Run<T> second{nullptr, first.stride};
    if (key + kTileRows < now.keys.count) {
      second = run_of(now.keys, key + kTileRows, width, work.spare + kTileRows * width);
    }
    const auto* ahead = reinterpret_cast<const char*>(next.keys.rows[key]);
    for (int64_t r = 0; r < num_rows; r += kRows) {
      const int64_t lines = ahead && r == 0 ? TileProducts<T>::kCols : 0;
      products.add(
          {reinterpret_cast<const char*>(first.rows), reinterpret_cast<const char*>(second.rows),
           first.stride * int64_t(sizeof(T)), ahead, lines},
          work.groups + r / kTileRows * group_bytes(words), std::min(kRows, num_rows - r), words,
          nullptr, work.scores + r * kBlockKeys + key, kBlockKeys);
    }
  }
}

// work.scores = q . keys, packed or by strips, unless products go by tiles.
template <class T>
void score(const Attention<T>& job, int64_t num_rows, const Work<T>& work, const Context<T>& now,
           const Context<T>& next) {
  const int64_t width = job.keys.width, stride = padded_keys<T>(width);
  const int64_t words = words_of<T>(width), count = now.keys.count;
  if (job.by_tiles()) return score_by_tiles(job, num_rows, work, now, next);
  if (!job.few(num_rows)) {
    pack_keys(now.keys, next.keys, width, work.spare, work.keys);
    outer_product<T>(work.q, stride, num_rows, work.keys, kBlockKeys * Vec<T>::kPerLane, words,
                     work.scores, kBlockKeys, round_up(count, kLanes), {});
    return;
  }
  const Strip<T> run = strip_for<T>(num_rows);
  for (int64_t key = 0; key < count; key += kLanes) {
    const Run<T> keys = run_of(now.keys, key, width, work.spare);
    run(work.q, stride, keys.rows, keys.stride, round_up(words, kQuarter), work.scores + key,
        kBlockKeys, num_rows, {}, reinterpret_cast<const char*>(next.keys.rows[key]));
  }
}

// sums[r] = sums[r] * shrink[r] + weights[r] . values, for R rows and C registers of columns.
template <class T, int R, int C>
void weigh_tile(const T* weights, const T* const* values, int64_t words, float* sums,
                int64_t stride, const float* shrink) {
  constexpr int64_t kPerLane = Vec<T>::kPerLane;
  F sum[R][C] = {};
  for (int64_t w = 0; w < words; ++w, weights += kPerLane, values += kPerLane) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const auto pair = pair_of(values[0] + c * kLanes, values[kPerLane - 1] + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto weight = Vec<T>::broadcast(weights + r * kBlockKeys);
        sum[r][c] = Vec<T>::dot(sum[r][c], weight, pair);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) add_to(sums + r * stride + c * kLanes, sum[r][c], {true, shrink}, r);
  }
}

template <class T>
using WeighTile = void (*)(const T*, const T* const*, int64_t, float*, int64_t, const float*);

template <class T, int... R>
constexpr std::array<WeighTile<T>, sizeof...(R)> weigh_tiles(std::integer_sequence<int, R...>) {
  return {&weigh_tile<T, R + 1, kOuterVecs>...};
}

// work.sums += weights . values
template <class T>
void weigh(const Attention<T>& job, int64_t num_rows, const Work<T>& work, const Context<T>& now,
           const Context<T>& next) {
  constexpr int64_t kPerLane = Vec<T>::kPerLane, kCols = kOuterVecs * kLanes;
  const int64_t padded = job.padded_values(), count = now.values.count;
  const int64_t words = words_of<T>(count);
  if constexpr (std::is_same_v<T, bf16>) {
    if (job.by_tiles()) {
      const int64_t whole = round_up(count, 2 * kTileWords);
      pack_values(now.values, next.values, whole, job.value_dim, padded, work.values);
      add_tile_product(work.weights, kBlockKeys, num_rows, work.values, whole / 2, padded,
                       work.shrink, work.sums);
      return;
    }
  }
  if (!job.few(num_rows)) {
    pack_values(now.values, next.values, count, job.value_dim, padded, work.values);
    outer_product<T>(work.weights, kBlockKeys, num_rows, work.values, padded * kPerLane, words,
                     work.sums, padded, padded, {true, work.shrink});
    return;
  }
  static constexpr auto kTiles = weigh_tiles<T>(std::make_integer_sequence<int, kOuterRows>{});
  for (int64_t c = 0; c < job.value_dim; c += kCols) {
    const T* columns[kBlockKeys];
    for (int64_t i = 0; i < words * kPerLane; ++i) {
      columns[i] = now.values.rows[i] ? now.values.rows[i] + c : work.zeros;
      prefetch_row(next.values.rows[i] + c, kCols);
    }
    for (int64_t r = 0; r < num_rows; r += kOuterRows) {
      const int64_t height = std::min<int64_t>(kOuterRows, num_rows - r);
      kTiles[height - 1](work.weights + r * kBlockKeys, columns, words, work.sums + r * padded + c,
                         padded, work.shrink + r);
    }
  }
}

// Which keys of a block `count` rows of a stretch see, from that one on.
template <class T>
void see(const Attention<T>& job, const Stretch& stretch, const Context<T>& now, int64_t first,
         int64_t count, Span* seen) {
  if (stretch.common) {
    std::fill(seen, seen + count, Span{0, now.keys.count});
    return;
  }
  const int64_t row = stretch.first_row + first, group = job.group();
  int64_t position = job.batch.first_position(stretch.seq) + row / group - now.first;
  for (int64_t i = 0, head = row % group; i < count; ++i, ++head) {
    if (head == group) head = 0, ++position;
    const int64_t begin = job.window > 0 ? position - job.window + 1 : 0;
    seen[i] = {begin, std::min(now.keys.count, position + 1)};
  }
}

// Adds one block of keys to every row of a stretch.
template <class T>
void attend_block(const Attention<T>& job, const Stretch& stretch, const Work<T>& work,
                  const Context<T>& now, const Context<T>& next) {
  const int64_t num_rows = stretch.num_rows;
  score(job, num_rows, work, now, next);
  for (int64_t i = 0; i < num_rows; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, num_rows - i);
    Span seen[kLanes];
    see(job, stretch, now, i, count, seen);
    Rows{work.most + i, work.total + i}.add(seen, count, job.scores, work.scores + i * kBlockKeys,
                                            work.weights + i * kBlockKeys, work.shrink + i);
  }
  weigh(job, num_rows, work, now, next);
}

template <class T>
void finish(const Attention<T>& job, int64_t kv_head, const Stretch& stretch,
            const Work<T>& work) {
  const int64_t padded = job.padded_values();
  for (int64_t i = 0; i < stretch.num_rows; ++i) {
    const int64_t query = query_of(job, kv_head, stretch, i);
    Row row{work.most[i], work.total[i]};
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
    for (const Stretch* s = task->own(); s < task->end; ++s) {
      load_queries(job, head, *s, work.from(job, s->row));
    }
    for (const Stretch* s = task->begin; s < task->end; ++s) {
      const Work<T> rows = work.from(job, s->row);
      if (job.by_tiles()) regroup(job, rows, s->num_rows);
      for (int64_t first = s->begin; first < s->end; first += kBlockKeys) {
        if (job.coded_keys) now = decode(job, head, *s, rows, first);
        const Context<T> next = after(task, s, first);
        attend_block(job, *s, rows, now, next);
        now = next;
      }
    }
    for (const Stretch* s = task->own(); s < task->end; ++s) {
      finish(job, head, *s, work.from(job, s->row));
    }
  }
}

}  // namespace jaxserve
