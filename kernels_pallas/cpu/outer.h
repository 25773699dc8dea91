// Matrix product as a sum of outer products: lanes are output columns, so nothing is folded at the
// end, and each output sums its words in order, whatever tile computes it.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace jaxserve {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int kOuterRows = kManyRegisters ? 6 : 2;
constexpr int kOuterVecs = 4;  // 6 x 4 sums + 4 + 1 registers

// One word holds one float or one pair of bf16: what a lane takes in per multiply-add.
template <class T>
constexpr int64_t words_of(int64_t elements) {
  return ceil_div(elements, Vec<T>::kPerLane);
}

// Rows of memory that somebody will need soon; a tile brings their next words into L2 as it goes,
// for scattered rows are more than the hardware foresees.
struct Ahead {
  const char* rows = nullptr;
  int64_t stride = 0, count = 0;  // bytes between rows
};

// What a product adds to: nothing, what is there, or what is there times a factor per row.
struct Start {
  bool keep = false;
  const float* factors = nullptr;
};

inline void add_to(float* c, F sum, Start start, int row) {
  if (start.factors) {
    sum += load<F>(c) * start.factors[row];
  } else if (start.keep) {
    sum += load<F>(c);
  }
  store(c, sum);
}

// Sums of integers wait as integers where their floats will be.
inline void add_to(float* c, U sum, Start start, int) {
  store(c, start.keep ? sum + load<U>(c) : sum);
}

// c[r] = start + sum over words of a[r][word] * b[word]
template <class T, int R, int C>
void outer_tile(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t words, float* c,
                int64_t c_stride, Start start, Ahead ahead) {
  using Reg = typename Vec<T>::Reg;
  constexpr int64_t kLine = 16;  // words
  typename Vec<T>::Sum sum[R][C] = {};
  for (int64_t w = 0; w < words;) {
    for (int64_t i = 0; i < ahead.count; ++i) {
      __builtin_prefetch(ahead.rows + i * ahead.stride + w * 4, 0, 2);
    }
    for (const int64_t end = std::min(words, w + kLine); w < end; ++w) {
      Reg cols[C];
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) cols[j] = load<Reg>(b + j * Vec<T>::kSize);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Reg row = Vec<T>::broadcast(a + r * a_stride);
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) sum[r][j] = Vec<T>::dot(sum[r][j], row, cols[j]);
      }
      a += Vec<T>::kPerLane;
      b += b_stride;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) add_to(c + r * c_stride + j * kLanes, sum[r][j], start, r);
  }
}

template <class T>
using OuterTile = void (*)(const T*, int64_t, const T*, int64_t, int64_t, float*, int64_t, Start,
                           Ahead);

template <class T, int C, int... R>
constexpr std::array<OuterTile<T>, sizeof...(R)> outer_tiles(std::integer_sequence<int, R...>) {
  return {&outer_tile<T, R + 1, C>...};
}

// The whole product: a [rows, words], b [words, cols] with cols a multiple of kLanes, c [rows, cols].
// Tiles of rows share what is to be brought in ahead.
template <class T>
void outer_product(const T* a, int64_t a_stride, int64_t rows, const T* b, int64_t b_stride,
                   int64_t words, float* c, int64_t c_stride, int64_t cols, Start start,
                   Ahead ahead = {}) {
  using Rows = std::make_integer_sequence<int, kOuterRows>;
  static constexpr auto kFull = outer_tiles<T, kOuterVecs>(Rows{});
  static constexpr auto kOne = outer_tiles<T, 1>(Rows{});
  for (int64_t j = 0, width; j < cols; j += width) {
    const bool full = cols - j >= kOuterVecs * kLanes;
    width = full ? kOuterVecs * kLanes : kLanes;
    for (int64_t r = 0; r < rows; r += kOuterRows) {
      const int64_t height = std::min<int64_t>(kOuterRows, rows - r);
      const int64_t first = ahead.count * r / rows, last = ahead.count * (r + height) / rows;
      (full ? kFull : kOne)[height - 1](
          a + r * a_stride, a_stride, b + j * Vec<T>::kPerLane, b_stride, words,
          c + r * c_stride + j, c_stride, {start.keep, start.factors ? start.factors + r : nullptr},
          {ahead.rows + first * ahead.stride, ahead.stride, last - first});
    }
  }
}

}  // namespace jaxserve
