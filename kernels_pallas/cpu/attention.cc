// Causal attention over a paged KV cache that first receives this step's keys and values.

#include <vector>

#include "buffers.h"
#include "coded.h"
#include "dot.h"
#include "pages.h"
#include "scratch.h"
#include "softmax.h"
#include "threads.h"

namespace jaxserve {
namespace {

// Enough rows (query tokens times the heads that share a kv head) to pay for packing a block of
// keys, few enough that scores, keys, values and sums stay in L2.
constexpr int64_t kRowsPerTask = 11 * kOuterRows;
// Up to here (the heads of a group that decodes) keys and values are used as they lie: packing them
// would cost more than it saves.
constexpr int64_t kFewRows = 2 * kOuterRows;

struct Batch {
  const int32_t* row_starts;  // [R + 1]
  const int32_t* kv_lens;     // [R]
  const int32_t* tables;      // [R, M]
  int64_t table_width;
  int64_t num_seqs;

  int64_t num_queries(int64_t seq) const { return row_starts[seq + 1] - row_starts[seq]; }
  int64_t first_position(int64_t seq) const { return kv_lens[seq] - num_queries(seq); }
  const int32_t* table(int64_t seq) const { return tables + seq * table_width; }
};

// A row of a task: query token `row / group` of the sequence, head `row % group` of the kv head.
struct Task {
  int64_t seq, kv_head, begin, end;
};

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
  bool few(int64_t num_rows) const {
    return num_rows <= kFewRows && value_dim % (kOuterVecs * kLanes) == 0;
  }
  int64_t padded_values() const { return (value_dim + kLanes - 1) / kLanes * kLanes; }
};

// Working memory of one task. Rows of q, scores and so on are contiguous.
template <class T>
struct Work {
  T *q, *spare, *zeros, *keys, *values, *weights, *decoded;
  float *scores, *sums, *shrink, *row;
  Row* rows;

  Work(Scratch& scratch, const Attention<T>& job, int64_t num_rows) {
    const int64_t q_count = (num_rows + kStripRows) * padded_keys<T>(job.keys.width);
    const int64_t spare_count = kLanes * padded_keys<T>(job.keys.width);
    const int64_t key_count = kBlockKeys * padded_keys<T>(job.keys.width);
    const int64_t value_count = kBlockKeys * job.padded_values();
    const int64_t score_count = num_rows * kBlockKeys, sum_count = num_rows * job.padded_values();
    const int64_t widest = std::max(job.keys.width, job.values.width);
    const int64_t decoded_count = job.coded_keys ? 2 * kBlockKeys * widest : 0;
    scratch.reset(Scratch::bytes<T>(decoded_count) + Scratch::bytes<float>(widest) +
                  Scratch::bytes<T>(q_count) + Scratch::bytes<T>(spare_count) +
                  Scratch::bytes<T>(job.padded_values()) +
                  Scratch::bytes<T>(key_count) +
                  Scratch::bytes<T>(value_count) + Scratch::bytes<T>(score_count) +
                  Scratch::bytes<float>(score_count) + Scratch::bytes<float>(sum_count) +
                  Scratch::bytes<float>(num_rows) + Scratch::bytes<Row>(num_rows));
    q = scratch.take<T>(q_count);
    spare = scratch.take<T>(spare_count);
    zeros = scratch.take<T>(job.padded_values());
    keys = scratch.take<T>(key_count);
    values = scratch.take<T>(value_count);
    weights = scratch.take<T>(score_count);
    decoded = scratch.take<T>(decoded_count);
    row = scratch.take<float>(widest);
    scores = scratch.take<float>(score_count);
    sums = scratch.take<float>(sum_count);
    shrink = scratch.take<float>(num_rows);
    rows = scratch.take<Row>(num_rows);
    std::memset(zeros, 0, job.padded_values() * sizeof(T));
    std::memset(sums, 0, sum_count * sizeof(float));
    std::fill(rows, rows + num_rows, Row{});
  }
};

// Index of a task's row in the [T, N] grid of all query heads.
template <class T>
int64_t query_of(const Attention<T>& job, const Task& task, int64_t row) {
  const int64_t token = job.batch.row_starts[task.seq] + row / job.group();
  return token * job.num_heads + task.kv_head * job.group() + row % job.group();
}

template <class T>
void load_queries(const Attention<T>& job, const Task& task, const Work<T>& work) {
  T* to = work.q;
  const int64_t width = job.keys.width;
  const int64_t stride = padded_keys<T>(width);
  for (int64_t row = task.begin; row < task.end; ++row, to += stride) {
    const float* from = job.q + query_of(job, task, row) * width;
    if (job.coded_keys) {
      convert(work.row, from, width);
      job.coded_keys->turn(work.row, width);
      from = work.row;
    }
    convert(to, from, width);
    std::memset(to + width, 0, (stride - width) * sizeof(T));
  }
}

// Positions whose keys a task sees, from the beginning of a block.
struct Span {
  int64_t begin, end;
};

template <class T>
Span span_of(const Attention<T>& job, const Task& task) {
  const int64_t start = job.batch.first_position(task.seq);
  const int64_t oldest = start + task.begin / job.group();
  const int64_t seen = job.window > 0 ? std::max<int64_t>(0, oldest - job.window + 1) : 0;
  return {seen / kBlockKeys * kBlockKeys, start + (task.end - 1) / job.group() + 1};
}

// The keys and values at positions [first, first + kBlockKeys), as far as the task sees them.
template <class T>
struct Context {
  int64_t first;
  Block<T> keys, values;

  Context(const Attention<T>& job, const Task& task, int64_t first, int64_t end)
      : first(first),
        keys(job.keys, job.batch.table(task.seq), task.kv_head, first, end),
        values(job.values, job.batch.table(task.seq), task.kv_head, first, end) {}

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
Context<T> decode(const Attention<T>& job, const Task& task, const Work<T>& work, int64_t first,
                  int64_t end) {
  const int32_t* table = job.batch.table(task.seq);
  const Block<T> keys =
      decode(*job.coded_keys, table, task.kv_head, first, end, work.row, work.decoded);
  if (job.coded_values == job.coded_keys) return {first, keys, keys};
  T* to = work.decoded + kBlockKeys * job.keys.width;
  return {first, keys, decode(*job.coded_values, table, task.kv_head, first, end, work.row, to)};
}

// work.scores = q . keys
template <class T>
void score(const Attention<T>& job, int64_t num_rows, const Work<T>& work, const Context<T>& now,
           const Context<T>& next) {
  const int64_t width = job.keys.width, stride = padded_keys<T>(width);
  const int64_t words = words_of<T>(width), count = now.keys.count;
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
  const int64_t padded = job.padded_values(), words = words_of<T>(now.values.count);
  if (!job.few(num_rows)) {
    pack_values(now.values, next.values, job.value_dim, padded, work.values);
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

// Adds one block of keys to every row of the task.
template <class T>
void attend_block(const Attention<T>& job, const Task& task, const Work<T>& work,
                  const Context<T>& now, const Context<T>& next) {
  const int64_t num_rows = task.end - task.begin, start = job.batch.first_position(task.seq);
  score(job, num_rows, work, now, next);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t position = start + (task.begin + i) / job.group();
    const int64_t begin = job.window > 0 ? position - job.window + 1 - now.first : 0;
    const int64_t end = std::min(now.keys.count, position + 1 - now.first);
    float* scores = work.scores + i * kBlockKeys;
    work.shrink[i] = work.rows[i].add(scores, begin, end, job.scores);
    convert(work.weights + i * kBlockKeys, scores, kBlockKeys);
  }
  weigh(job, num_rows, work, now, next);
}

template <class T>
void finish(const Attention<T>& job, const Task& task, const Work<T>& work) {
  const int64_t padded = job.padded_values();
  for (int64_t i = 0; i < task.end - task.begin; ++i) {
    const int64_t query = query_of(job, task, task.begin + i);
    Row row = work.rows[i];
    float shrink = 1.0f;
    if (job.sinks) shrink = row.add_sink(job.sinks[query % job.num_heads]);
    const float factor = row.sum > 0 ? shrink / row.sum : 0.0f;
    const float* sums = work.sums + i * padded;
    float* out = job.out + query * job.value_dim;
    for (int64_t j = 0; j < job.value_dim; ++j) out[j] = sums[j] * factor;
    if (job.coded_values) job.coded_values->turn(out, job.value_dim);
    job.lse[query] = row.log_sum();
  }
}

// The same for pages that have to be decoded.
template <class T>
void attend_coded(const Attention<T>& job, const Task* tasks, int64_t num_tasks,
                  Scratch& scratch) {
  for (const Task* task = tasks; task < tasks + num_tasks; ++task) {
    const Work<T> work(scratch, job, task->end - task->begin);
    load_queries(job, *task, work);
    const Span span = span_of(job, *task);
    for (int64_t first = span.begin; first < span.end; first += kBlockKeys) {
      const Context<T> context = decode(job, *task, work, first, span.end);
      attend_block(job, *task, work, context, context);
    }
    finish(job, *task, work);
  }
}

// Tasks in turn. While one block is worked on, the next comes into L2, be it another task's.
template <class T>
void attend(const Attention<T>& job, const Task* tasks, int64_t num_tasks) {
  thread_local Scratch scratch;
  if (job.coded_keys) return attend_coded(job, tasks, num_tasks, scratch);
  auto begin = [&](const Task& task) {
    const Span span = span_of(job, task);
    return Context<T>(job, task, span.begin, span.end);
  };
  Context<T> now = begin(tasks[0]);
  for (int64_t i = 0; i < num_tasks; ++i) {
    const Task& task = tasks[i];
    const Work<T> work(scratch, job, task.end - task.begin);
    load_queries(job, task, work);
    const int64_t end = span_of(job, task).end;
    for (bool last = false; !last;) {
      last = now.first + kBlockKeys >= end;
      const Context<T> next = last && i + 1 < num_tasks
                                  ? begin(tasks[i + 1])
                                  : Context<T>(job, task, now.first + kBlockKeys, end);
      attend_block(job, task, work, now, next);
      now = next;
    }
    finish(job, task, work);
  }
}

// Late queries see the most keys: they go first, so that the last chunk claimed is a small one.
std::vector<Task> cut(const Batch& batch, int64_t num_kv_heads, int64_t group) {
  std::vector<Task> tasks;
  for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
    for (int64_t end = batch.num_queries(seq) * group; end > 0;) {
      const int64_t begin = (end - 1) / kRowsPerTask * kRowsPerTask;
      for (int64_t head = 0; head < num_kv_heads; ++head) tasks.push_back({seq, head, begin, end});
      end = begin;
    }
  }
  return tasks;
}

// put(table, head, position, row) for x [T, K, width], the rows of this step's tokens.
template <class Put>
void write(const Batch& batch, int64_t num_heads, int64_t width, const float* x, const Put& put) {
  constexpr int64_t kTokensPerChunk = 32;  // positions that share a byte are in one chunk
  for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
    const int64_t first = batch.first_position(seq), odd = first % 2;
    const int64_t count = batch.num_queries(seq);
    Pool::shared().run(ceil_div(count + odd, kTokensPerChunk), [&](int64_t chunk) {
      const int64_t begin = std::max<int64_t>(0, chunk * kTokensPerChunk - odd);
      const int64_t end = std::min(count, (chunk + 1) * kTokensPerChunk - odd);
      for (int64_t i = begin; i < end; ++i) {
        const float* from = x + (batch.row_starts[seq] + i) * num_heads * width;
        for (int64_t head = 0; head < num_heads; ++head, from += width) {
          put(batch.table(seq), head, first + i, from);
        }
      }
    });
  }
}

template <class T>
void write(const Pages<T>& pages, const Batch& batch, const float* x) {
  const int64_t width = pages.width;
  write(batch, pages.num_heads, width, x,
        [&](const int32_t* table, int64_t head, int64_t position, const float* from) {
          T* to = pages.find(table, head, position);
          if (to) convert(to, from, width);
        });
}

void write(const CodedPages& pages, const Batch& batch, const float* x) {
  const int64_t width = pages.width;
  write(batch, pages.num_heads, width, x,
        [&](const int32_t* table, int64_t head, int64_t position, const float* from) {
          thread_local std::vector<float> row;
          thread_local std::vector<int8_t> spare;
          row.assign(from, from + width);
          spare.resize(width + kLanes);  // quantize() writes whole registers
          pages.put(table, head, position, row.data(), spare.data());
        });
}

template <class T>
void run(const Attention<T>& job, int64_t num_tokens) {
  const Batch& batch = job.batch;
  const int64_t used = batch.num_seqs > 0 ? batch.row_starts[batch.num_seqs] : 0;
  const int64_t unused = (num_tokens - used) * job.num_heads;
  std::memset(job.out + used * job.num_heads * job.value_dim, 0,
              unused * job.value_dim * sizeof(float));
  std::memset(job.lse + used * job.num_heads, 0, unused * sizeof(float));
  const std::vector<Task> tasks = cut(batch, job.keys.num_heads, job.group());
  constexpr int64_t kChunksPerThread = 8, kMostTasks = 16;
  const int64_t count = int64_t(tasks.size());
  const int64_t even = ceil_div(count, Pool::shared().num_threads() * kChunksPerThread);
  const int64_t size = std::clamp<int64_t>(even, 1, kMostTasks);
  Pool::shared().run(ceil_div(count, size), [&](int64_t chunk) {
    const int64_t first = chunk * size;
    attend(job, &tasks[first], std::min(size, count - first));
  });
}

// The operands every form of attention has.
struct Operands {
  Floats q, k;
  Scalar layer;
  Ints row_starts, kv_lens, tables;
  Scalar num_seqs, window;
  Floats sinks;
  FloatsOut out, lse;
  float scale, soft_cap;
};

template <class T>
Pages<T> pages_of(ffi::AnyBuffer array, Scalar layer) {
  auto [dims, offset] = slice(array, layer, 4);
  return {static_cast<T*>(array.untyped_data()) + offset, dims[0], dims[1], dims[2], dims[3]};
}

using Parts = ffi::Span<const int64_t>;

// Nibbles are bytes without sign, two slots in each.
CodedPages coded_pages_of(ffi::AnyBuffer values, FloatsOut scales, Scalar layer, Parts parts) {
  const bool nibbles = values.element_type() == ffi::U8;
  auto [dims, offset] = slice(values, layer, 4);
  const int64_t first_scale = slice(*scales, layer, parts.size() ? 3 : 2).offset;
  return {static_cast<uint8_t*>(values.untyped_data()) + offset,
          scales->typed_data() + first_scale,
          dims[0],
          dims[1],
          nibbles ? 2 * dims[2] : dims[2],
          dims[3],
          parts.begin(),
          int64_t(parts.size()),
          nibbles};
}

// Sizes alone, for what reads and writes pages of T.
template <class T>
Pages<T> sizes_of(const CodedPages& pages) {
  return {nullptr, pages.num_pages, pages.num_heads, pages.page_size, pages.width};
}

template <class T>
Attention<T> attention_of(Operands in) {
  Attention<T> job;
  const int64_t num_seqs = int64_t(in.kv_lens.element_count());
  job.batch = {in.row_starts.typed_data(), in.kv_lens.typed_data(), in.tables.typed_data(),
               in.tables.dimensions()[1], std::clamp<int64_t>(value(in.num_seqs), 0, num_seqs)};
  job.q = in.q.typed_data();
  job.out = in.out->typed_data();
  job.lse = in.lse->typed_data();
  job.num_heads = in.q.dimensions()[1];
  job.value_dim = in.out->dimensions()[2];
  job.window = value(in.window);
  job.scores = {in.scale, in.soft_cap};
  const bool stacked = in.sinks.dimensions().size() == 2;
  const int64_t first = stacked ? value(in.layer) * job.num_heads : 0;
  job.sinks = in.sinks.element_count() > 0 ? in.sinks.typed_data() + first : nullptr;
  return job;
}

ffi::Error paged_attention(Floats q, Floats k, Floats v, ffi::AnyBuffer, ffi::AnyBuffer,
                           Scalar layer, Ints row_starts, Ints kv_lens, Ints tables,
                           Scalar num_seqs, Scalar window, Floats sinks, FloatsOut out,
                           FloatsOut lse, ffi::Result<ffi::AnyBuffer> k_pages,
                           ffi::Result<ffi::AnyBuffer> v_pages, float scale, float soft_cap) {
  return visit(*k_pages, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    auto job = attention_of<T>({q, k, layer, row_starts, kv_lens, tables, num_seqs, window, sinks,
                                out, lse, scale, soft_cap});
    job.keys = pages_of<T>(*k_pages, layer);
    job.values = pages_of<T>(*v_pages, layer);
    write(job.keys, job.batch, k.typed_data());
    write(job.values, job.batch, v.typed_data());
    run(job, q.dimensions()[0]);
    return ffi::Error::Success();
  });
}

// Multi-head latent attention: one kv head, and a value is the first value_dim lanes of its key.
ffi::Error latent_attention(Floats q, Floats k, ffi::AnyBuffer, Scalar layer, Ints row_starts,
                            Ints kv_lens, Ints tables, Scalar num_seqs, Scalar window, Floats sinks,
                            FloatsOut out, FloatsOut lse, ffi::Result<ffi::AnyBuffer> k_pages,
                            float scale, float soft_cap) {
  return visit(*k_pages, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    auto job = attention_of<T>({q, k, layer, row_starts, kv_lens, tables, num_seqs, window, sinks,
                                out, lse, scale, soft_cap});
    job.keys = job.values = pages_of<T>(*k_pages, layer);
    write(job.keys, job.batch, k.typed_data());
    run(job, q.dimensions()[0]);
    return ffi::Error::Success();
  });
}

// Eight and four bits hold less than bf16 does: rows become that, and queries meet them so.
ffi::Error coded_attention(Floats q, Floats k, Floats v, ffi::AnyBuffer, Floats, ffi::AnyBuffer,
                           Floats, Scalar layer, Ints row_starts, Ints kv_lens, Ints tables,
                           Scalar num_seqs, Scalar window, Floats sinks, FloatsOut out,
                           FloatsOut lse, ffi::Result<ffi::AnyBuffer> k_pages, FloatsOut k_scales,
                           ffi::Result<ffi::AnyBuffer> v_pages, FloatsOut v_scales, float scale,
                           float soft_cap, Parts k_parts, Parts v_parts) {
  auto job = attention_of<bf16>(
      {q, k, layer, row_starts, kv_lens, tables, num_seqs, window, sinks, out, lse, scale, soft_cap});
  const CodedPages keys = coded_pages_of(*k_pages, k_scales, layer, k_parts);
  const CodedPages values = coded_pages_of(*v_pages, v_scales, layer, v_parts);
  job.coded_keys = &keys;
  job.coded_values = &values;
  job.keys = sizes_of<bf16>(keys);
  job.values = sizes_of<bf16>(values);
  write(keys, job.batch, k.typed_data());
  write(values, job.batch, v.typed_data());
  run(job, q.dimensions()[0]);
  return ffi::Error::Success();
}

ffi::Error coded_latent_attention(Floats q, Floats k, ffi::AnyBuffer, Floats, Scalar layer,
                                  Ints row_starts, Ints kv_lens, Ints tables, Scalar num_seqs,
                                  Scalar window, Floats sinks, FloatsOut out, FloatsOut lse,
                                  ffi::Result<ffi::AnyBuffer> k_pages, FloatsOut k_scales,
                                  float scale, float soft_cap, Parts k_parts) {
  auto job = attention_of<bf16>(
      {q, k, layer, row_starts, kv_lens, tables, num_seqs, window, sinks, out, lse, scale, soft_cap});
  const CodedPages keys = coded_pages_of(*k_pages, k_scales, layer, k_parts);
  job.coded_keys = job.coded_values = &keys;
  job.keys = job.values = sizes_of<bf16>(keys);
  write(keys, job.batch, k.typed_data());
  run(job, q.dimensions()[0]);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_paged_attention, paged_attention,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()          // q
                                  .Arg<Floats>()          // k
                                  .Arg<Floats>()          // v
                                  .Arg<ffi::AnyBuffer>()  // k_pages, aliased to a result
                                  .Arg<ffi::AnyBuffer>()  // v_pages, aliased to a result
                                  .Arg<Scalar>()          // layer
                                  .Arg<Ints>()            // row_starts
                                  .Arg<Ints>()            // kv_lens
                                  .Arg<Ints>()            // tables
                                  .Arg<Scalar>()          // num_seqs
                                  .Arg<Scalar>()          // window
                                  .Arg<Floats>()          // sinks
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_latent_attention, latent_attention,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()          // q
                                  .Arg<Floats>()          // k
                                  .Arg<ffi::AnyBuffer>()  // k_pages, aliased to a result
                                  .Arg<Scalar>()          // layer
                                  .Arg<Ints>()            // row_starts
                                  .Arg<Ints>()            // kv_lens
                                  .Arg<Ints>()            // tables
                                  .Arg<Scalar>()          // num_seqs
                                  .Arg<Scalar>()          // window
                                  .Arg<Floats>()          // sinks
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_coded_attention, coded_attention,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()          // q
                                  .Arg<Floats>()          // k
                                  .Arg<Floats>()          // v
                                  .Arg<ffi::AnyBuffer>()  // k_pages, aliased to a result
                                  .Arg<Floats>()          // k_scales, aliased to a result
                                  .Arg<ffi::AnyBuffer>()  // v_pages, aliased to a result
                                  .Arg<Floats>()          // v_scales, aliased to a result
                                  .Arg<Scalar>()          // layer
                                  .Arg<Ints>()            // row_starts
                                  .Arg<Ints>()            // kv_lens
                                  .Arg<Ints>()            // tables
                                  .Arg<Scalar>()          // num_seqs
                                  .Arg<Scalar>()          // window
                                  .Arg<Floats>()          // sinks
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<Parts>("k_parts")
                                  .Attr<Parts>("v_parts"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_coded_latent_attention, coded_latent_attention,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()          // q
                                  .Arg<Floats>()          // k
                                  .Arg<ffi::AnyBuffer>()  // k_pages, aliased to a result
                                  .Arg<Floats>()          // k_scales, aliased to a result
                                  .Arg<Scalar>()          // layer
                                  .Arg<Ints>()            // row_starts
                                  .Arg<Ints>()            // kv_lens
                                  .Arg<Ints>()            // tables
                                  .Arg<Scalar>()          // num_seqs
                                  .Arg<Scalar>()          // window
                                  .Arg<Floats>()          // sinks
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<Parts>("k_parts"));

}  // namespace jaxserve
