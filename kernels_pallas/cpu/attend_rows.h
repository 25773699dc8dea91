// One block of keys for rows of queries, which lie as rows do: scores, softmax, values.
#pragma once

#include "attention.h"

namespace jaxserve {

// work.scores = q . keys, where products go by tiles. Keys are used as they lie.
template <class T>
void score_by_tiles(const Attention<T>& job, int64_t num_rows, const Work<T>& work,
                    const Context<T>& now, const Context<T>& next) {
  const int64_t width = job.keys.width, words = words_of<T>(width);
  TileProducts<T, false> products;
  for (int64_t key = 0; key < now.keys.count; key += kPairRows) {
    const Run<T> first = run_of(now.keys, key, width, work.spare);
    Run<T> second{nullptr, first.stride};
    if (key + kTileRows < now.keys.count) {
      second = run_of(now.keys, key + kTileRows, width, work.spare + kTileRows * width);
    }
    const auto* ahead = reinterpret_cast<const char*>(next.keys.rows[key]);
    for (int64_t r = 0; r < num_rows; r += kPairRows) {
      const int64_t lines = ahead && r == 0 ? kPairRows : 0;
      products.add(
          {reinterpret_cast<const char*>(first.rows), reinterpret_cast<const char*>(second.rows),
           first.stride * int64_t(sizeof(T)), ahead, lines},
          work.groups + r / kTileRows * group_bytes(words), words,
          {work.scores + r * kBlockKeys + key, kBlockKeys, std::min(kPairRows, num_rows - r),
           second.rows ? kPairRows : kTileRows});
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

// Adds one block of keys to every row of a stretch.
template <class T>
void attend_rows(const Attention<T>& job, const Stretch& stretch, const Work<T>& work,
                  const Context<T>& now, const Context<T>& next) {
  const int64_t num_rows = stretch.num_rows;
  score(job, num_rows, work, now, next);
  for (int64_t i = 0; i < num_rows; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, num_rows - i);
    Span seen[kLanes];
    see(job, stretch, now, i, count, seen);
    Rows{work.base + i, work.total + i}.add(seen, count, job.scores, work.scores + i * kBlockKeys,
                                            work.weights + i * kBlockKeys, work.shrink + i);
  }
  weigh(job, num_rows, work, now, next);
}

}  // namespace jaxserve
