// Matrix products by tiles: sixteen rows as they lie by sixteen others that are turned, word by
// word. For few rows of x those are turned, once for all weights: these come as memory gives them,
// and nothing of them passes through registers of ours. Sums then have to be turned on their way
// out. For many rows of x that is more work than turning weights.
#pragma once

#include <algorithm>

#include "quantize.h"
#include "tiles.h"
#include "transpose.h"

namespace jaxserve {

constexpr int64_t kPairRows = 2 * kTileRows;

// Sixteen rows, word by word. One more line behind them: a power of two would put all groups into
// one set of L1.
inline int64_t group_bytes(int64_t words) { return kTileRows * 4 * (words + 1); }

static_assert(!kTiles || kLanes == kTileRows, "tiles are transposed in registers of 16 words");

inline void put_group(const char* rows, int64_t stride, int64_t words, char* group) {
  for (int64_t i = 0; i < words; i += kTileWords, group += kTileBytes) {
    transpose_lines(rows + 4 * i, stride, [&](int j, U word) { store(group + 64 * j, word); });
  }
}

// Two tiles of rows as they lie, or one: rows follow each other `stride` bytes apart. For every step
// of a product so many `lines` of memory from `ahead` on are brought into L2.
struct TileRows {
  const char *first, *second;
  int64_t stride;
  const char* ahead = nullptr;
  int64_t lines = 0;
};

// Rows and columns of an output, at most two tiles of either. Sums of integers are scaled on their
// way there, and added to what is there if `onto` says so.
struct TileOut {
  float* out;
  int64_t stride, rows, cols;
  const RowScale* steps = nullptr;  // of rows
  const float* scales = nullptr;    // of columns
  bool onto = false;
};

// From that row and column on.
inline TileOut part(const TileOut& to, int64_t row, int64_t col) {
  return {to.out + row * to.stride + col,
          to.stride,
          std::min(kPairRows, to.rows - row),
          std::min(kPairRows, to.cols - col),
          to.steps ? to.steps + row : nullptr,
          to.scales ? to.scales + col : nullptr,
          to.onto};
}

// What a product left in tiles: [groups][rows as they lie]. Columns of the output are groups where
// weights were turned, rows of it otherwise.
template <class T, bool kTurned>
struct TileSums {
  alignas(64) char tiles[2][2][kTileBytes];
  TileOut to{nullptr, 0, 0, 0};

  // One of the four, if it is in use.
  void put(int i) const {
    constexpr bool kScaled = sizeof(T) == 1;
    const char* tile = tiles[i / 2][i % 2];
    const TileOut to = part(this->to, (kTurned ? i % 2 : i / 2) * kTileRows,
                            (kTurned ? i / 2 : i % 2) * kTileRows);
    if (to.rows <= 0 || to.cols <= 0) return;
    const F scales = kScaled ? load<F>(to.scales) : F{};
    auto put = [&](int64_t row, U sums) {
      F x = bitcast<F>(sums);
      if constexpr (kScaled) {
        x = __builtin_convertvector(bitcast<I>(sums), F);
        x = rounded(x * to.steps[row].scale * scales);
      }
      float* out = to.out + row * to.stride;
      store(out, to.onto ? x + load<F>(out) : x);
    };
    if constexpr (kTurned) {
      const int64_t rows = std::min(kTileRows, to.rows);
      for (int64_t row = 0; row < rows; ++row) put(row, load<U>(tile + row * 64));
    } else {
      transpose_lines(tile, 64, [&](int64_t row, U sums) {
        if (row < to.rows) put(row, sums);
      });
    }
  }
};

// Sums of R tiles of rows by G groups of so many words. Those of the product before are put away
// meanwhile: vectors have nothing else to do. Where groups are many they pass by the nearest cache,
// in which rows stay.
template <class T, int R, int G, bool kTurned>
inline __attribute__((always_inline)) void sum_tiles(TileRows a, const char* group, int64_t words,
                                                     TileSums<T, kTurned>& sums,
                                                     const TileSums<T, kTurned>& before) {
  const int64_t bytes = 4 * words;
  const char* other = group + group_bytes(words);
  Tiles::zero<0>();
  if constexpr (R > 1) Tiles::zero<1>();
  if constexpr (G > 1) Tiles::zero<2>();
  if constexpr (R > 1 && G > 1) Tiles::zero<3>();
  for (int64_t i = 0, part = 0; part < 4; before.put(part++)) {
    for (const int64_t end = (part + 1) * bytes / 4; i < end; i += 64) {
      Tiles::load<4>(a.first + i, a.stride);
      Tiles::load<6, kTurned>(group + i * kTileRows, 64);
      if constexpr (R > 1) Tiles::load<5>(a.second + i, a.stride);
      if constexpr (G > 1) Tiles::load<7, kTurned>(other + i * kTileRows, 64);
      for (int64_t line = 0; line < a.lines; ++line, a.ahead += 64) {
        __builtin_prefetch(a.ahead, 0, 2);
      }
      Tiles::dot<T, 0, 4, 6>();
      if constexpr (R > 1) Tiles::dot<T, 1, 5, 6>();
      if constexpr (G > 1) Tiles::dot<T, 2, 4, 7>();
      if constexpr (R > 1 && G > 1) Tiles::dot<T, 3, 5, 7>();
    }
  }
  Tiles::store<0>(sums.tiles[0][0]);
  if constexpr (R > 1) Tiles::store<1>(sums.tiles[0][1]);
  if constexpr (G > 1) Tiles::store<2>(sums.tiles[1][0]);
  if constexpr (R > 1 && G > 1) Tiles::store<3>(sums.tiles[1][1]);
}

// Products one after the other. The thread has its Tiles.
template <class T, bool kTurned>
class TileProducts {
 public:
  TileProducts() = default;
  TileProducts(const TileProducts&) = delete;
  ~TileProducts() {
    for (int tile = 0; tile < 4; ++tile) sums_[turn_].put(tile);
  }

  // Rows times groups of so many words, which reach `to` some time before this is destroyed.
  void add(const TileRows& rows, const char* groups, int64_t words, const TileOut& to) {
    const TileSums<T, kTurned>& before = sums_[turn_];
    TileSums<T, kTurned>& now = sums_[turn_ ^= 1];
    now.to = to;
    const bool two = (kTurned ? to.cols : to.rows) > kTileRows;
    if (rows.second) {
      two ? sum_tiles<T, 2, 2>(rows, groups, words, now, before)
          : sum_tiles<T, 2, 1>(rows, groups, words, now, before);
    } else {
      two ? sum_tiles<T, 1, 2>(rows, groups, words, now, before)
          : sum_tiles<T, 1, 1>(rows, groups, words, now, before);
    }
  }

 private:
  TileSums<T, kTurned> sums_[2];
  int turn_ = 0;
};

// Up to here all rows of x take their turn with some columns of weights, which come from memory
// evenly. For more, output that lies together is written together instead.
constexpr int64_t kFewTurns = 8;

// to.out[r][c] = x[r] . w[c] for rows of x in groups, and whole tiles of rows of w.
template <class T>
void multiply_tiles(const char* x, const T* w, int64_t k, const TileOut& to) {
  const int64_t stride = k * int64_t(sizeof(T)), words = stride / 4;
  TileProducts<T, false> products;
  // While some columns of weights are multiplied for the first time, or `turns` times, those behind
  // them come.
  auto multiply = [&](int64_t r, int64_t c, int64_t turns) {
    const int64_t lines = r / kPairRows < turns ? ceil_div(kPairRows, turns) : 0;
    const char* first = reinterpret_cast<const char*>(w) + c * stride;
    const char* second = to.cols - c > kTileRows ? first + kTileRows * stride : nullptr;
    const char* ahead = first + kPairRows * stride + r / kPairRows * lines * stride;
    products.add({first, second, stride, ahead, lines}, x + r / kTileRows * group_bytes(words),
                 words, part(to, r, c));
  };
  if (to.rows <= kFewTurns * kPairRows) {
    const int64_t turns = ceil_div(to.rows, kPairRows);
    for (int64_t c = 0; c < to.cols; c += kPairRows) {
      for (int64_t r = 0; r < to.rows; r += kPairRows) multiply(r, c, turns);
    }
  } else {
    for (int64_t r = 0; r < to.rows; r += kPairRows) {
      for (int64_t c = 0; c < to.cols; c += kPairRows) multiply(r, c, 1);
    }
  }
}

// Whole tiles of rows of w, turned.
template <class T>
class TurnedWeights {
 public:
  // Whether so many rows of x are worth it.
  static bool pay(int64_t rows, int64_t k) { return 8 * rows >= k * int64_t(sizeof(T)); }
  static int64_t bytes(int64_t k, int64_t cols) {
    return cols / kTileRows * group_bytes(k * int64_t(sizeof(T)) / 4);
  }

  TurnedWeights(char* memory, const T* w, int64_t k, int64_t cols)
      : groups_(memory), words_(k * int64_t(sizeof(T)) / 4) {
    for (int64_t c = 0; c < cols; c += kTileRows) {
      const char* rows = reinterpret_cast<const char*>(w + c * k);
      const char* ahead = rows + kTileRows * 4 * words_;
      for (int64_t i = 0; i < kTileRows * 4 * words_; i += 64) __builtin_prefetch(ahead + i, 0, 2);
      put_group(rows, 4 * words_, words_, group(c));
    }
  }

  // to.out[r][c] = x[r] . w[c]. While some rows of x are multiplied, those behind them come.
  void multiply(const T* x, int64_t x_stride, const TileOut& to) const {
    TileProducts<T, true> products;
    const int64_t stride = x_stride * int64_t(sizeof(T)), turns = ceil_div(to.cols, kPairRows);
    const int64_t lines = ceil_div(kPairRows, turns);
    for (int64_t r = 0; r < to.rows; r += kPairRows) {
      const char* first = reinterpret_cast<const char*>(x) + r * stride;
      const char* second = to.rows - r > kTileRows ? first + kTileRows * stride : nullptr;
      for (int64_t c = 0; c < to.cols; c += kPairRows) {
        const char* ahead = first + (kPairRows + c / kPairRows * lines) * stride;
        products.add({first, second, stride, ahead, lines}, group(c), words_, part(to, r, c));
      }
    }
  }

 private:
  char* group(int64_t c) const { return groups_ + c / kTileRows * group_bytes(words_); }

  char* groups_;
  int64_t words_;
};

// Some rows of a by C tiles of columns of b, each at most two tiles of sixteen.
template <int R, int C>
void add_tiles(const bf16* a, int64_t a_stride, int64_t rows, const bf16* b, int64_t words,
               int64_t cols, const float* factors, float* out) {
  alignas(64) char sums[2][2][kTileBytes];
  auto part = [&](int64_t r, int c) { return sums[r / kTileRows][c] + r % kTileRows * 64; };
  for (int64_t r = 0; r < rows; ++r) {
    for (int c = 0; c < C; ++c) {
      store(part(r, c), load<F>(out + r * cols + c * kLanes) * factors[r]);
    }
  }
  Tiles::load<0>(sums[0][0], 64);
  if constexpr (C > 1) Tiles::load<1>(sums[0][1], 64);
  if constexpr (R > 1) Tiles::load<2>(sums[1][0], 64);
  if constexpr (C > 1 && R > 1) Tiles::load<3>(sums[1][1], 64);
  for (int64_t i = 0; i < words; i += kTileWords, a += 2 * kTileWords) {
    Tiles::load<4>(a, 2 * a_stride);
    Tiles::load<6>(b + 2 * i * cols, 4 * cols);
    if constexpr (R > 1) Tiles::load<5>(a + kTileRows * a_stride, 2 * a_stride);
    if constexpr (C > 1) Tiles::load<7>(b + 2 * (i * cols + kTileWords), 4 * cols);
    Tiles::dot<bf16, 0, 4, 6>();
    if constexpr (C > 1) Tiles::dot<bf16, 1, 4, 7>();
    if constexpr (R > 1) Tiles::dot<bf16, 2, 5, 6>();
    if constexpr (C > 1 && R > 1) Tiles::dot<bf16, 3, 5, 7>();
  }
  Tiles::store<0>(sums[0][0]);
  if constexpr (C > 1) Tiles::store<1>(sums[0][1]);
  if constexpr (R > 1) Tiles::store<2>(sums[1][0]);
  if constexpr (C > 1 && R > 1) Tiles::store<3>(sums[1][1]);
  for (int64_t r = 0; r < rows; ++r) {
    for (int c = 0; c < C; ++c) store(out + r * cols + c * kLanes, load<F>(part(r, c)));
  }
}

// out[r] = out[r] * factors[r] + a[r] . b for rows of words that lie `a_stride` elements apart, and
// b [words, cols]: bf16 in pairs. Rows up to the next sixteen are looked at, and not kept.
inline void add_tile_product(const bf16* a, int64_t a_stride, int64_t rows, const bf16* b,
                             int64_t words, int64_t cols, const float* factors, float* out) {
  using Add = void (*)(const bf16*, int64_t, int64_t, const bf16*, int64_t, int64_t, const float*,
                       float*);
  static constexpr Add kAdd[2][2] = {{&add_tiles<1, 1>, &add_tiles<1, 2>},
                                     {&add_tiles<2, 1>, &add_tiles<2, 2>}};
  for (int64_t r = 0; r < rows; r += kPairRows) {
    for (int64_t c = 0; c < cols; c += kPairRows) {
      kAdd[rows - r > kTileRows][cols - c > kTileWords](
          a + r * a_stride, a_stride, std::min(kPairRows, rows - r), b + 2 * c, words, cols,
          factors + r, out + r * cols + c);
    }
  }
}

// Tiles of rows, two of them or one, by two groups of columns, word by word.
struct TileBlock {
  const char* rows[2];
  int64_t stride;  // bytes from one row to the next
  const char* columns[2];
  float* sums[2];  // of either group: a tile for every tile of rows, one behind the other
};

// sums[c][r] = rows[r] . columns[c] of bf16, or added to it where `onto`, in tiles all the way.
template <int R, bool onto>
void multiply_block(const TileBlock& x, int64_t words) {
  constexpr int64_t kTileFloats = kTileBytes / 4;
  if constexpr (onto) {
    Tiles::load<0>(x.sums[0], 64);
    Tiles::load<2>(x.sums[1], 64);
    if constexpr (R > 1) Tiles::load<1>(x.sums[0] + kTileFloats, 64);
    if constexpr (R > 1) Tiles::load<3>(x.sums[1] + kTileFloats, 64);
  } else {
    Tiles::zero<0>();
    Tiles::zero<2>();
    if constexpr (R > 1) Tiles::zero<1>();
    if constexpr (R > 1) Tiles::zero<3>();
  }
  for (int64_t i = 0; i < words / kTileWords; ++i) {
    Tiles::load<4>(x.rows[0] + i * 64, x.stride);
    Tiles::load<6>(x.columns[0] + i * kTileBytes, 64);
    Tiles::load<7>(x.columns[1] + i * kTileBytes, 64);
    Tiles::dot<bf16, 0, 4, 6>();
    Tiles::dot<bf16, 2, 4, 7>();
    if constexpr (R > 1) Tiles::load<5>(x.rows[1] + i * 64, x.stride);
    if constexpr (R > 1) Tiles::dot<bf16, 1, 5, 6>();
    if constexpr (R > 1) Tiles::dot<bf16, 3, 5, 7>();
  }
  Tiles::store<0>(x.sums[0]);
  Tiles::store<2>(x.sums[1]);
  if constexpr (R > 1) Tiles::store<1>(x.sums[0] + kTileFloats);
  if constexpr (R > 1) Tiles::store<3>(x.sums[1] + kTileFloats);
}

}  // namespace jaxserve
