// Matrix product of two operands that are both contiguous along the summed axis: x [rows, K]
// against weights [cols, K] as Hugging Face stores them.
//
// Every output is summed in one fixed shape, whatever tile computes it: K is cut into blocks of
// kDepth registers; within a block lane l sums elements l, l + lanes, ...; lanes fold by a fixed
// tree; blocks add up in order. Hence a row's result never depends on its neighbours.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "simd.h"

namespace jaxserve {

constexpr int kTileRows = kManyRegisters ? 4 : 2;  // of x
constexpr int kTileCols = kManyRegisters ? 6 : 4;  // of weights: 4 x 6 sums + 6 + 1 registers
constexpr int kWideCols = 2 * kTileCols;  // for one or two rows: more pages of memory in flight
constexpr int64_t kDepth = 64;  // registers per block: a tile of weights (24 KiB) stays in L1

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of x in the order the tile reads them: for each tile of kTileRows rows, for each register
// along K, that register of every row. Zero-padded to whole registers. A view: owns nothing.
template <class T>
struct Packed {
  T* data;
  int64_t num_rows;
  int64_t steps;  // registers per row

  static int64_t steps_of(int64_t k) { return ceil_div(k, Vec<T>::kSize); }
  static int64_t count(int64_t num_rows, int64_t k) {
    return num_rows * steps_of(k) * Vec<T>::kSize;
  }

  int64_t height(int64_t row) const {  // rows in the tile that holds `row`
    return std::min<int64_t>(kTileRows, num_rows - row / kTileRows * kTileRows);
  }
  T* at(int64_t row, int64_t step) const {
    int64_t first = row / kTileRows * kTileRows;
    return data + (first * steps + step * height(row) + row - first) * Vec<T>::kSize;
  }

  // Writes elements [begin, begin + n) of a row; begin must be a multiple of the register size.
  template <class From>
  void put(int64_t row, int64_t begin, const From* from, int64_t n) const {
    constexpr int64_t kSize = Vec<T>::kSize;
    const int64_t stride = height(row) * kSize;
    T* to = at(row, begin / kSize);
    for (; n >= kSize; n -= kSize, from += kSize, to += stride) convert(to, from, kSize);
    if (n <= 0) return;
    std::memset(to, 0, kSize * sizeof(T));
    convert(to, from, n);
  }
};

// A tile's weights, and the rows of weights to bring into L2 meanwhile for a tile to come.
template <class T>
struct Weights {
  const T* data;
  int64_t stride;
  int64_t steps, tail;  // whole registers along K, and elements after them
  const T* ahead;
  int64_t num_ahead;
};

// Where a tile keeps row r of its results. sum_lanes writes four columns at a time: what it writes
// past the last column is overwritten by the next row or lies in the slack.
constexpr int64_t result_stride(int64_t cols) { return std::max<int64_t>(4, cols); }
constexpr int64_t kResults = kTileRows * std::max(4, kTileCols) + 4;

// out[r * result_stride(C) + c] = x[r] . w[c]
template <class T, int R, int C>
void dot_tile(const T* x, const Weights<T>& w, float* out) {
  using Reg = typename Vec<T>::Reg;
  constexpr int64_t kSize = Vec<T>::kSize;
  F sum[R][C] = {};
  auto step = [&](const Reg (&weights)[C]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Reg row = load<Reg>(x + r * kSize);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = Vec<T>::dot(sum[r][c], row, weights[c]);
    }
    x += R * kSize;
  };
  Reg weights[C];
  const T* from = w.data;
  const T* ahead = w.ahead;
  for (int64_t s = 0; s < w.steps; ++s, from += kSize, ahead += kSize) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) weights[c] = load<Reg>(from + c * w.stride);
    for (int64_t c = 0; c < w.num_ahead; ++c) __builtin_prefetch(ahead + c * w.stride, 0, 2);
    step(weights);
  }
  if (w.tail > 0) {
    for (int c = 0; c < C; ++c) {
      weights[c] = load_partial<Reg>(from + c * w.stride, w.tail * int64_t(sizeof(T)));
    }
    step(weights);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c += 4) {
      F four[4] = {};
      for (int i = 0; i < std::min(4, C - c); ++i) four[i] = sum[r][c + i];
      sum_lanes(four, out + r * result_stride(C) + c);
    }
  }
}

template <class T>
using DotTile = void (*)(const T*, const Weights<T>&, float*);

template <class T, int C, int... R>
constexpr std::array<DotTile<T>, sizeof...(R)> dot_tiles(std::integer_sequence<int, R...>) {
  return {&dot_tile<T, R + 1, C>...};
}

// The kernel for a tile of `rows` rows; `cols` is kWideCols (of two rows at most), kTileCols or 1.
template <class T>
DotTile<T> dot_tile_for(int64_t rows, int64_t cols) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  static constexpr auto kWide = dot_tiles<T, kWideCols>(std::make_integer_sequence<int, 2>{});
  static constexpr auto kFull = dot_tiles<T, kTileCols>(Rows{});
  static constexpr auto kOne = dot_tiles<T, 1>(Rows{});
  if (cols == kWideCols) return kWide[rows - 1];
  return (cols == kTileCols ? kFull : kOne)[rows - 1];
}

// out[r][c] = x[begin + r] . w[c] for rows [begin, end) of x, begin a multiple of kTileRows.
// Weights are the outer loop: each tile of them is read from memory once and serves all rows,
// and while it does, every tile of rows prefetches its share of the next tile of weights.
template <class T>
void dot_block(const Packed<T>& x, int64_t begin, int64_t end, const T* w, int64_t k, int64_t cols,
               float* out, int64_t out_stride) {
  constexpr int64_t kSize = Vec<T>::kSize;
  alignas(64) float results[kResults];
  const int64_t num_tiles = ceil_div(end - begin, kTileRows);
  // Rows whole pages apart share one L1 set, which twelve of them would overflow.
  const bool wide = end - begin <= 2 && k * int64_t(sizeof(T)) % 4096 != 0;
  const int64_t widest = wide ? kWideCols : kTileCols;
  for (int64_t s = 0; s < x.steps; s += kDepth) {
    const int64_t block_k = std::min(kDepth * kSize, k - s * kSize);
    for (int64_t c = 0, width; c < cols; c += width) {
      width = cols - c >= widest ? widest : cols - c >= kTileCols ? kTileCols : 1;
      const T* from = w + c * k + s * kSize;
      for (int64_t i = 0; i < num_tiles; ++i) {
        const int64_t row = begin + i * kTileRows, rows = x.height(row);
        const int64_t ahead = width * i / num_tiles, ahead_end = width * (i + 1) / num_tiles;
        dot_tile_for<T>(rows, width)(x.at(row, s),
                                     {from, k, block_k / kSize, block_k % kSize,
                                      from + (width + ahead) * k, ahead_end - ahead},
                                     results);
        float* to = out + i * kTileRows * out_stride + c;
        for (int64_t r = 0; r < rows; ++r, to += out_stride) {
          for (int64_t j = 0; j < width; ++j) {
            to[j] = (s == 0 ? 0.0f : to[j]) + results[r * result_stride(width) + j];
          }
        }
      }
    }
  }
}

}  // namespace jaxserve
