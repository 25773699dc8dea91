// Matrix product by tiles: sixteen rows of weights, loaded as they lie, by sixteen rows of x, which
// are transposed once for all weights. Few rows take no longer than memory does, and nothing of the
// weights passes through registers of ours.
#pragma once

#include <algorithm>

#include "quantize.h"
#include "tiles.h"
#include "transpose.h"

namespace jaxserve {

// Sixteen rows of x, word by word, and behind them the step of each.
inline int64_t group_bytes(int64_t words) { return kTileRows * 4 * (words + 1); }

static_assert(!kTiles || kLanes == kTileRows, "tiles are transposed in registers of 16 words");

// Rows beyond `count` may hold anything: nobody keeps what is made of them.
inline void put_group(const char* rows, int64_t stride, int64_t words, const RowScale* scales,
                      int64_t count, char* group) {
  for (int64_t i = 0; i < words; i += kTileWords, group += kTileBytes) {
    transpose_lines(rows + 4 * i, stride, [&](int j, U word) { store(group + 64 * j, word); });
  }
  if (!scales) return;
  F steps{};
  for (int i = 0; i < count; ++i) steps[i] = scales[i].scale;
  store(group, steps);
}

// Two tiles of rows of weights, or one: rows follow each other `stride` bytes apart. As much memory
// from `ahead` on as they take is brought into L2 while they are multiplied.
struct TileRows {
  const char *first, *second;
  int64_t stride;
  const char* ahead;
};

// Sums of C tiles of rows of weights by R groups of x: those of tile c and group r are the one at
// sums + (r * C + c) tiles.
template <class T, int C, int R>
void sum_tiles(TileRows w, const char* x, int64_t words, char* sums) {
  const char* y = x + group_bytes(words);
  Tiles::zero<0>();
  if constexpr (C > 1) Tiles::zero<1>();
  if constexpr (R > 1) Tiles::zero<2>();
  if constexpr (C > 1 && R > 1) Tiles::zero<3>();
  for (int64_t i = 0; i < 4 * words; i += 64) {
    Tiles::load<4>(w.first + i, w.stride);
    Tiles::load<6>(x + i * kTileRows, 64);
    if constexpr (C > 1) Tiles::load<5>(w.second + i, w.stride);
    if constexpr (R > 1) Tiles::load<7>(y + i * kTileRows, 64);
    if (w.ahead) {
      for (int line = 0; line < C * kTileRows; ++line, w.ahead += 64) {
        __builtin_prefetch(w.ahead, 0, 2);
      }
    }
    Tiles::dot<T, 0, 4, 6>();
    if constexpr (C > 1) Tiles::dot<T, 1, 5, 6>();
    if constexpr (R > 1) Tiles::dot<T, 2, 4, 7>();
    if constexpr (C > 1 && R > 1) Tiles::dot<T, 3, 5, 7>();
  }
  Tiles::store<0>(sums);
  if constexpr (C > 1) Tiles::store<1>(sums + kTileBytes);
  if constexpr (R > 1) Tiles::store<2>(sums + C * kTileBytes);
  if constexpr (C > 1 && R > 1) Tiles::store<3>(sums + 3 * kTileBytes);
}

// out[r][c] = sum of row c of the weights and row r of x, scaled where they are of eight bits.
template <class T>
void put_sums(const char* sums, const char* steps, const float* scales, int64_t rows, float* out,
              int64_t out_stride) {
  const auto* row_steps = reinterpret_cast<const float*>(steps);
  transpose_lines(sums, 64, [&](int r, U sum) {
    if (r >= rows) return;
    if constexpr (sizeof(T) == 1) {
      const F x = __builtin_convertvector(bitcast<I>(sum), F);
      store(out + r * out_stride, x * row_steps[r] * load<F>(scales));
    } else {
      store(out + r * out_stride, sum);
    }
  });
}

// out[r][c] = x[r] . w[c] for up to two groups of rows of x, and for the rows of w.
template <class T>
void multiply_tile_rows(const TileRows& w, const char* x, int64_t rows, int64_t words,
                        const float* scales, float* out, int64_t out_stride) {
  using Sum = void (*)(TileRows, const char*, int64_t, char*);
  static constexpr Sum kSums[2][2] = {{&sum_tiles<T, 1, 1>, &sum_tiles<T, 1, 2>},
                                      {&sum_tiles<T, 2, 1>, &sum_tiles<T, 2, 2>}};
  alignas(64) char sums[4 * kTileBytes];
  const int width = w.second ? 2 : 1, height = rows > kTileRows ? 2 : 1;
  kSums[width - 1][height - 1](w, x, words, sums);
  for (int i = 0; i < width * height; ++i) {
    const int64_t row = i / width * kTileRows, col = i % width * kTileRows;
    put_sums<T>(sums + i * kTileBytes, x + (i / width + 1) * group_bytes(words) - 4 * kTileRows,
                scales ? scales + col : nullptr, std::min(kTileRows, rows - row),
                out + row * out_stride + col, out_stride);
  }
}

// The same for all rows of x, in groups, and whole tiles of rows of w. The thread has its Tiles.
template <class T>
void multiply_tiles(const char* x, int64_t rows, const T* w, int64_t k, int64_t cols,
                    const float* scales, float* out, int64_t out_stride) {
  constexpr int64_t kPair = 2 * kTileRows;
  const int64_t stride = k * int64_t(sizeof(T)), words = stride / 4;
  for (int64_t r = 0; r < rows; r += kPair) {
    for (int64_t c = 0; c < cols; c += kPair) {
      const char* first = reinterpret_cast<const char*>(w) + c * stride;
      const char* second = cols - c > kTileRows ? first + kTileRows * stride : nullptr;
      const char* ahead = r == 0 ? first + kPair * stride : nullptr;
      multiply_tile_rows<T>({first, second, stride, ahead}, x + r / kTileRows * group_bytes(words),
                            std::min(kPair, rows - r), words, scales ? scales + c : nullptr,
                            out + r * out_stride + c, out_stride);
    }
  }
}

// out[r] = out[r] * factors[r] + a[r] . b for rows of words that lie `a_stride` elements apart, and
// b [words, cols]: bf16 in pairs. Rows up to the next sixteen are looked at, and not kept.
inline void add_tile_product(const bf16* a, int64_t a_stride, int64_t rows, const bf16* b,
                             int64_t words, int64_t cols, const float* factors, float* out) {
  alignas(64) float sums[2 * kTileRows][kTileWords];
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int64_t height = std::min(kTileRows, rows - r);
    for (int64_t c = 0; c < cols; c += 2 * kTileWords) {
      const bool both = cols - c > kTileWords;
      Tiles::zero<0>();
      Tiles::zero<1>();
      for (int64_t i = 0; i < words; i += kTileWords) {
        Tiles::load<2>(a + r * a_stride + 2 * i, 2 * a_stride);
        Tiles::load<3>(b + 2 * (i * cols + c), 4 * cols);
        Tiles::dot<bf16, 0, 2, 3>();
        if (!both) continue;
        Tiles::load<4>(b + 2 * (i * cols + c + kTileWords), 4 * cols);
        Tiles::dot<bf16, 1, 2, 4>();
      }
      Tiles::store<0>(sums[0]);
      if (both) Tiles::store<1>(sums[kTileRows]);
      for (int64_t i = 0; i < height; ++i) {
        float* to = out + (r + i) * cols + c;
        store(to, load<F>(to) * factors[r + i] + load<F>(sums[i]));
        if (!both) continue;
        store(to + kLanes, load<F>(to + kLanes) * factors[r + i] + load<F>(sums[kTileRows + i]));
      }
    }
  }
}

}  // namespace jaxserve
