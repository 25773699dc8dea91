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

// Two tiles of rows of weights, or one: rows follow each other `stride` bytes apart. For every step of
// a product so many `lines` of memory from `ahead` on are brought into L2.
struct TileRows {
  const char *first, *second;
  int64_t stride;
  const char* ahead;
  int64_t lines;
};

// What a product left in tiles, on its way to out[row][column]: a tile has sixteen columns of 16
// rows, one behind the other. Sums of integers are scaled on that way, and added to what is there if
// `onto` says so.
template <class T>
struct TileSums {
  alignas(64) char tiles[2][2][kTileBytes];  // of rows, and of columns
  const char* groups;
  const float* scales;
  float* out;
  int64_t rows = 0, cols = 0, words, stride;
  bool onto;

  // One of the four, if it is in use.
  void put(int tile) const {
    const int64_t row = tile / 2 * kTileRows, col = tile % 2 * kTileRows;
    if (row >= rows || col >= cols) return;
    const char* steps = groups + (tile / 2 + 1) * group_bytes(words) - kTileRows * 4;
    float* to = out + row * stride + col;
    transpose_lines(tiles[tile / 2][tile % 2], 64, [&](int64_t r, U sum) {
      if (row + r >= rows) return;
      F x = bitcast<F>(sum);
      if constexpr (sizeof(T) == 1) {
        x = __builtin_convertvector(bitcast<I>(sum), F);
        x = rounded(x * reinterpret_cast<const float*>(steps)[r] * load<F>(scales + col));
      }
      if (onto) x += load<F>(to + r * stride);
      store(to + r * stride, x);
    });
  }
};

// Sums of C tiles of rows of weights by R groups of x. Those of the product before are put away
// meanwhile: vectors have nothing else to do.
template <class T, int C, int R>
void sum_tiles(TileRows w, const char* x, TileSums<T>& sums, const TileSums<T>& before) {
  const int64_t bytes = 4 * sums.words;
  const char* y = x + group_bytes(sums.words);
  Tiles::zero<0>();
  if constexpr (C > 1) Tiles::zero<1>();
  if constexpr (R > 1) Tiles::zero<2>();
  if constexpr (C > 1 && R > 1) Tiles::zero<3>();
  for (int64_t i = 0, part = 0; part < 4; before.put(part++)) {
    for (const int64_t end = (part + 1) * bytes / 4; i < end; i += 64) {
      Tiles::load<4>(w.first + i, w.stride);
      Tiles::load<6>(x + i * kTileRows, 64);
      if constexpr (C > 1) Tiles::load<5>(w.second + i, w.stride);
      if constexpr (R > 1) Tiles::load<7>(y + i * kTileRows, 64);
      for (int64_t line = 0; line < w.lines; ++line, w.ahead += 64) {
        __builtin_prefetch(w.ahead, 0, 2);
      }
      Tiles::dot<T, 0, 4, 6>();
      if constexpr (C > 1) Tiles::dot<T, 1, 5, 6>();
      if constexpr (R > 1) Tiles::dot<T, 2, 4, 7>();
      if constexpr (C > 1 && R > 1) Tiles::dot<T, 3, 5, 7>();
    }
  }
  Tiles::store<0>(sums.tiles[0][0]);
  if constexpr (C > 1) Tiles::store<1>(sums.tiles[0][1]);
  if constexpr (R > 1) Tiles::store<2>(sums.tiles[1][0]);
  if constexpr (C > 1 && R > 1) Tiles::store<3>(sums.tiles[1][1]);
}

// Products one after the other, which may be added to what is there. The thread has its Tiles.
template <class T>
class TileProducts {
 public:
  static constexpr int64_t kRows = 2 * kTileRows, kCols = 2 * kTileRows;  // of one, at most

  explicit TileProducts(bool onto = false) { sums_[0].onto = sums_[1].onto = onto; }
  TileProducts(const TileProducts&) = delete;
  ~TileProducts() { put_all(sums_[turn_]); }

  // out[r][c] = x[r] . w[c] for `rows` rows of x, in groups of so many words, some time before this
  // is destroyed.
  void add(const TileRows& w, const char* x, int64_t rows, int64_t words, const float* scales,
           float* out, int64_t out_stride) {
    using Sum = void (*)(TileRows, const char*, TileSums<T>&, const TileSums<T>&);
    static constexpr Sum kSums[2][2] = {{&sum_tiles<T, 1, 1>, &sum_tiles<T, 1, 2>},
                                        {&sum_tiles<T, 2, 1>, &sum_tiles<T, 2, 2>}};
    const TileSums<T>& before = sums_[turn_];
    TileSums<T>& now = sums_[turn_ ^= 1];
    now.groups = x;
    now.scales = scales;
    now.out = out;
    now.rows = rows;
    now.cols = w.second ? kCols : kTileRows;
    now.words = words;
    now.stride = out_stride;
    kSums[w.second != nullptr][rows > kTileRows](w, x, now, before);
  }

 private:
  static void put_all(const TileSums<T>& sums) {
    for (int tile = 0; tile < 4; ++tile) sums.put(tile);
  }

  TileSums<T> sums_[2];
  int turn_ = 0;
};

// Up to here all rows of x take their turn with some columns of weights, which come from memory
// evenly. For more, output that lies together is written together instead.
constexpr int64_t kFewTurns = 8;

// out[r][c] = x[r] . w[c] for rows of x in groups, and whole tiles of rows of w; `onto`: added to it.
template <class T>
void multiply_tiles(const char* x, int64_t rows, const T* w, int64_t k, int64_t cols,
                    const float* scales, float* out, int64_t out_stride, bool onto = false) {
  constexpr int64_t kRows = TileProducts<T>::kRows, kCols = TileProducts<T>::kCols;
  const int64_t stride = k * int64_t(sizeof(T)), words = stride / 4;
  TileProducts<T> products(onto);
  // While some columns of weights are multiplied for the first time, or `turns` times, those behind
  // them come.
  auto multiply = [&](int64_t r, int64_t c, int64_t turns) {
    const int64_t lines = r / kRows < turns ? ceil_div(kCols, turns) : 0;
    const char* first = reinterpret_cast<const char*>(w) + c * stride;
    const char* second = cols - c > kTileRows ? first + kTileRows * stride : nullptr;
    const char* ahead = first + kCols * stride + r / kRows * lines * stride;
    products.add({first, second, stride, ahead, lines}, x + r / kTileRows * group_bytes(words),
                 std::min(kRows, rows - r), words, scales ? scales + c : nullptr,
                 out + r * out_stride + c, out_stride);
  };
  if (rows <= kFewTurns * kRows) {
    const int64_t turns = ceil_div(rows, kRows);
    for (int64_t c = 0; c < cols; c += kCols) {
      for (int64_t r = 0; r < rows; r += kRows) multiply(r, c, turns);
    }
  } else {
    for (int64_t r = 0; r < rows; r += kRows) {
      for (int64_t c = 0; c < cols; c += kCols) multiply(r, c, 1);
    }
  }
}

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
  constexpr int64_t kRows = 2 * kTileRows, kCols = 2 * kTileWords;
  using Add = void (*)(const bf16*, int64_t, int64_t, const bf16*, int64_t, int64_t, const float*,
                       float*);
  static constexpr Add kAdd[2][2] = {{&add_tiles<1, 1>, &add_tiles<1, 2>},
                                     {&add_tiles<2, 1>, &add_tiles<2, 2>}};
  for (int64_t r = 0; r < rows; r += kRows) {
    for (int64_t c = 0; c < cols; c += kCols) {
      kAdd[rows - r > kTileRows][cols - c > kTileWords](
          a + r * a_stride, a_stride, std::min(kRows, rows - r), b + 2 * c, words, cols,
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
