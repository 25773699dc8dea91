// What a task of attention works on: queries, blocks of keys and values, and memory of its own.
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
  // Sixteen queries as columns, where there are more. Members of a group take turns with rows.
  bool by_columns(const Task& task) const {
    return by_tiles() && !task.begin->common && task.num_rows() > kTileRows;
  }
  bool few(int64_t num_rows) const {
    return num_rows <= kFewRows && value_dim % (kOuterVecs * kLanes) == 0;
  }
  int64_t padded_values() const { return (value_dim + kLanes - 1) / kLanes * kLanes; }
};

// Working memory of one task. Rows of q, scores and so on are contiguous.
template <class T>
struct Work {
  T *q, *spare, *zeros, *keys, *values, *turned, *weights, *decoded;
  float *scores, *sums, *shrink, *base, *total, *floats;
  char* groups;  // of the rows of q that a stretch has, where products go by tiles

  Work(Scratch& scratch, const Attention<T>& job, int64_t num_rows) {
    const int64_t all_rows = round_up(num_rows, kPairRows);  // a tile may look past the last one
    const int64_t q_count = (all_rows + kStripRows) * padded_keys<T>(job.keys.width);
    const int64_t group_words = job.by_tiles() ? words_of<T>(job.keys.width) : 0;
    const int64_t group_count = all_rows / kTileRows * group_bytes(group_words);
    const int64_t spare_count = 2 * kLanes * padded_keys<T>(job.keys.width);
    const int64_t key_count = kBlockKeys * padded_keys<T>(job.keys.width);
    const int64_t value_count = kBlockKeys * job.padded_values();
    const int64_t score_count = (all_rows + kPairRows) * kBlockKeys;
    const int64_t sum_count = all_rows * job.padded_values();
    const int64_t turned_count = job.by_tiles() ? value_count : 0;
    const int64_t widest = std::max(job.keys.width, job.values.width);
    const int64_t decoded_count = job.coded_keys ? 2 * kBlockKeys * widest : 0;
    scratch.reset(Scratch::bytes<T>(decoded_count) + Scratch::bytes<float>(widest) +
                  Scratch::bytes<T>(q_count) + Scratch::bytes<T>(spare_count) +
                  Scratch::bytes<T>(job.padded_values()) +
                  Scratch::bytes<T>(key_count) +
                  Scratch::bytes<T>(value_count) + Scratch::bytes<T>(turned_count) +
                  Scratch::bytes<T>(score_count) +
                  Scratch::bytes<float>(score_count) + Scratch::bytes<float>(sum_count) +
                  3 * Scratch::bytes<float>(num_rows + kPairRows) +
                  Scratch::bytes<char>(group_count));
    q = scratch.take<T>(q_count);
    spare = scratch.take<T>(spare_count);
    zeros = scratch.take<T>(job.padded_values());
    keys = scratch.take<T>(key_count);
    values = scratch.take<T>(value_count);
    turned = scratch.take<T>(turned_count);
    weights = scratch.take<T>(score_count);
    decoded = scratch.take<T>(decoded_count);
    floats = scratch.take<float>(widest);
    scores = scratch.take<float>(score_count);
    sums = scratch.take<float>(sum_count);
    shrink = scratch.take<float>(num_rows + kPairRows);  // the three are written by whole registers
    base = scratch.take<float>(num_rows + kPairRows);
    total = scratch.take<float>(num_rows + kPairRows);
    groups = scratch.take<char>(group_count);
    std::memset(zeros, 0, job.padded_values() * sizeof(T));
    std::memset(sums, 0, sum_count * sizeof(float));
    std::fill(base, base + num_rows + kPairRows, kMinusInfinity);
    std::memset(total, 0, (num_rows + kPairRows) * sizeof(float));
  }

  // For the rows from that one on.
  Work from(const Attention<T>& job, int64_t row) const {
    Work work = *this;
    work.q += row * padded_keys<T>(job.keys.width);
    work.weights += row * kBlockKeys;
    work.scores += row * kBlockKeys;
    work.sums += row * job.padded_values();
    work.shrink += row;
    work.base += row;
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

template <class T>
void regroup(const Attention<T>& job, const Work<T>& work, int64_t num_rows) {
  const int64_t words = words_of<T>(job.keys.width), stride = padded_keys<T>(job.keys.width);
  for (int64_t i = 0; i < round_up(num_rows, kPairRows); i += kTileRows) {
    put_group(reinterpret_cast<const char*>(work.q + i * stride), 4 * words, words,
              work.groups + i / kTileRows * group_bytes(words));
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

}  // namespace jaxserve
