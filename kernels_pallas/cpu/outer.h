// Matrix product as a sum of outer products: lanes are output columns, so nothing is folded at the
// end. Used where one side is packed anyway (attention); each output sums its words in order.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "simd.h"

namespace jaxserve {

constexpr int kOuterRows = kManyRegisters ? 6 : 2;
constexpr int kOuterVecs = 4;  // 6 x 4 sums + 4 + 1 registers

// One word holds one float or one pair of bf16: what a lane takes in per multiply-add.
template <class T>
constexpr int64_t words_of(int64_t elements) {
  return (elements + Vec<T>::kPerLane - 1) / Vec<T>::kPerLane;
}

// c[r] = (rescale ? c[r] * rescale[r] : 0) + sum over words of a[r][word] * b[word]
template <class T, int R, int C>
void outer_tile(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t words, float* c,
                int64_t c_stride, const float* rescale) {
  using Reg = typename Vec<T>::Reg;
  F sum[R][C] = {};
  if (rescale) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < C; ++j) {
        sum[r][j] = load<F>(c + r * c_stride + j * kLanes) * rescale[r];
      }
    }
  }
  for (int64_t w = 0; w < words; ++w, a += Vec<T>::kPerLane, b += b_stride) {
    Reg cols[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) cols[j] = load<Reg>(b + j * Vec<T>::kSize);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Reg row = Vec<T>::broadcast(a + r * a_stride);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sum[r][j] = Vec<T>::dot(sum[r][j], row, cols[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(c + r * c_stride + j * kLanes, sum[r][j]);
  }
}

template <class T>
using OuterTile = void (*)(const T*, int64_t, const T*, int64_t, int64_t, float*, int64_t,
                           const float*);

template <class T, int C, int... R>
constexpr std::array<OuterTile<T>, sizeof...(R)> outer_tiles(std::integer_sequence<int, R...>) {
  return {&outer_tile<T, R + 1, C>...};
}

// The whole product: a [rows, words], b [words, cols] with cols a multiple of kLanes, c [rows, cols].
template <class T>
void outer_product(const T* a, int64_t a_stride, int64_t rows, const T* b, int64_t b_stride,
                   int64_t words, float* c, int64_t c_stride, int64_t cols, const float* rescale) {
  using Rows = std::make_integer_sequence<int, kOuterRows>;
  static constexpr auto kFull = outer_tiles<T, kOuterVecs>(Rows{});
  static constexpr auto kOne = outer_tiles<T, 1>(Rows{});
  for (int64_t j = 0, width; j < cols; j += width) {
    const bool full = cols - j >= kOuterVecs * kLanes;
    width = full ? kOuterVecs * kLanes : kLanes;
    for (int64_t r = 0; r < rows; r += kOuterRows) {
      const int64_t height = std::min<int64_t>(kOuterRows, rows - r);
      (full ? kFull : kOne)[height - 1](a + r * a_stride, a_stride, b + j * Vec<T>::kPerLane,
                                        b_stride, words, c + r * c_stride + j, c_stride,
                                        rescale ? rescale + r : nullptr);
    }
  }
}

}  // namespace jaxserve
