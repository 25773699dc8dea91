// Matrix product of two operands that are both contiguous along the summed axis: x [rows, K]
// against weights [cols, K] as Hugging Face stores them.
//
// Weights are transposed on their way in, so that lanes are output columns. For a few rows of x
// they then stay in registers (strip), and the product is as fast as memory is; for many they are
// laid out as a panel that all rows share, and it is as fast as the multipliers are. Either way
// every output sums the words of a block in order, and then the blocks. Hence a row's result never
// depends on its neighbours. Sums of integers are the same in any order, so for a few rows weights
// of eight bits are read as they lie (sweep): transposing them takes longer than memory does. A CPU
// with tiles does all but that by these (tile_product.h).
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "outer.h"
#include "quantize.h"
#include "scratch.h"
#include "tile_product.h"
#include "transpose.h"

namespace jaxserve {

constexpr int kStripRows = kManyRegisters ? 24 : 8;  // sums of a strip, beside its weights
constexpr int64_t kPanelCols = kOuterVecs * kLanes;
constexpr int64_t kMostBlockWords = 512;  // of K: a panel (128 KiB) stays in L2

// K is cut into equal blocks, so that while one is multiplied the next is fetched, and all of it.
inline int64_t block_words(int64_t words) {
  const int64_t count = std::max<int64_t>(1, ceil_div(words, kMostBlockWords));
  return round_up(ceil_div(words, count), 16);
}

template <class T>
constexpr bool kIsInt8 = std::is_same_v<T, int8_t>;

// Weights as they are stored. Eight-bit ones have a scale for each row, others none.
template <class T>
struct Matrix {
  const T* data;
  const float* scales;
  int64_t k;

  Matrix from_row(int64_t i) const { return {data + i * k, scales ? scales + i : nullptr, k}; }
};

constexpr int64_t kSweepRows = 4;

// Rows of x in the weights' type, zero-padded to whole quarters; for eight-bit weights every row is
// divided by a step of its own. Where products go by tiles, either rows are there once more in
// groups, or weights will be turned. A view: owns nothing.
template <class T>
struct Packed {
  T* data;
  int64_t num_rows, k;
  RowScale* scales = nullptr;  // of eight-bit rows
  char* groups = nullptr;      // of sixteen rows each
  bool turns = false;          // weights

  static int64_t words(int64_t k) { return round_up(words_of<T>(k), kQuarter); }
  // One more line between rows: a power of two would put all of them into one set of L1.
  static int64_t stride(int64_t k) { return (words(k) + 16) * Vec<T>::kPerLane; }
  // A strip may look at rows past the last one; nobody keeps what it makes of them.
  static int64_t count(int64_t num_rows, int64_t k) { return (num_rows + kStripRows) * stride(k); }

  T* row(int64_t i) const { return data + i * stride(k); }

  // Whether products go by tiles. Floats add up in another order there, so that the number of rows
  // has no say in it.
  static bool by_tiles(int64_t num_rows, int64_t k) {
    return !std::is_same_v<T, float> && (!kIsInt8<T> || num_rows > kSweepRows) && k > 0 &&
           k % (kTileWords * Vec<T>::kPerLane) == 0 && have_tiles();
  }
  bool by_tiles() const { return groups || turns; }
  static int64_t groups_bytes(int64_t num_groups, int64_t k) {
    return num_groups * group_bytes(words(k));
  }
  char* group(int64_t i) const { return groups + groups_bytes(i / kTileRows, k); }

  // Rows [begin, end) as groups, when all of them are there; `begin` is the first of a group.
  void regroup(int64_t begin, int64_t end) const {
    for (int64_t i = begin; groups && i < end; i += kTileRows) {
      put_group(reinterpret_cast<const char*>(row(i)), stride(k) * int64_t(sizeof(T)), words(k),
                group(i));
    }
  }

  // Writes elements [begin, begin + n) of a row; eight-bit rows are written whole.
  template <class From>
  void put(int64_t i, int64_t begin, const From* from, int64_t n) const {
    if constexpr (kIsInt8<T>) {
      scales[i] = quantize(from, n, row(i));
    } else {
      convert(row(i) + begin, from, n);
    }
    const int64_t padding = words(k) * Vec<T>::kPerLane - k;
    if (begin + n == k) std::memset(row(i) + k, 0, padding * sizeof(T));
  }
};

// out[r][0 .. kLanes) = start + x[r] . w[0 .. kLanes), `words` words each, for R rows of which
// `rows` are kept. As much memory from `ahead` on comes into L2 meanwhile.
template <class T, int R>
void strip(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t words, float* out,
           int64_t out_stride, int64_t rows, Start start, const char* ahead) {
  constexpr int64_t kPerLane = Vec<T>::kPerLane;
  typename Vec<T>::Sum sum[R] = {};
  for (int64_t i = 0; i < words; i += kQuarter, w += kQuarter * kPerLane) {
    U weights[kQuarter];
    load_transposed(w, w_stride * int64_t(sizeof(T)), weights);
    for (int j = 0; j < kQuarter * kLanes / 16; ++j, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
    for (int j = 0; j < kQuarter; ++j, x += kPerLane) {
      const auto cols = bitcast<typename Vec<T>::Reg>(Vec<T>::weights(weights[j]));
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        sum[r] = Vec<T>::dot(sum[r], Vec<T>::broadcast(x + r * x_stride), cols);
      }
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
    if (r < rows) add_to(out + r * out_stride, sum[r], start, r);
  }
}

template <class T>
using Strip = void (*)(const T*, int64_t, const T*, int64_t, int64_t, float*, int64_t, int64_t,
                       Start, const char*);

// The narrowest strip for at most kStripRows rows. Not every height is worth its code.
template <class T>
Strip<T> strip_for(int64_t rows) {
  if (rows <= 1) return &strip<T, 1>;
  if (rows <= 2) return &strip<T, 2>;
  if (rows <= 4) return &strip<T, 4>;
  if (rows <= 8) return &strip<T, 8>;
  if constexpr (kStripRows > 8) {
    if (rows <= 12) return &strip<T, 12>;
    if (rows <= 16) return &strip<T, 16>;
    if (rows <= 20) return &strip<T, 20>;
  }
  return &strip<T, kStripRows>;
}

constexpr int kSweepCols = 4;
constexpr int64_t kSweepAhead = 4096;  // bytes: the hardware foresees less, and stops at every page

// to[i] = the sum of register i.
inline void sum_each(const U (&from)[kSweepCols], float* to) {
#if defined(__AVX512F__)
  auto fold = [](U a, U b) {
    const __m512i x = bitcast<__m512i>(a), y = bitcast<__m512i>(b);
    return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  };
  const __m512i ab = fold(from[0], from[1]), cd = fold(from[2], from[3]);
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  store(to, _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
#else
  for (int i = 0; i < kSweepCols; ++i) {
    uint32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += from[i][lane];
    to[i] = bitcast<float>(sum);
  }
#endif
}

// out[r][c] = x[r] . w[c] as integers, for R rows of which `rows` are kept: one pass over `cols`
// rows of whole registers.
template <int R>
void sweep(const int8_t* x, int64_t x_stride, int64_t rows, const int8_t* w, int64_t k,
           int64_t cols, float* out, int64_t out_stride) {
  using V = Vec<int8_t>;
  for (int64_t c = 0; c < cols; c += kSweepCols) {
    U sums[R][kSweepCols] = {};
#pragma GCC unroll 4
    for (int j = 0; j < kSweepCols; ++j) {
      for (int64_t i = 0; i < k; i += V::kSize, w += V::kSize) {
        __builtin_prefetch(w + kSweepAhead, 0, 2);
        const U weights = V::weights(load<U>(w));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sums[r][j] = V::dot(sums[r][j], load<U>(x + r * x_stride + i), weights);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (r < rows) sum_each(sums[r], out + r * out_stride + c);
    }
  }
}

inline bool can_sweep(int64_t rows, int64_t k) {
  return rows <= kSweepRows && k % Vec<int8_t>::kSize == 0;
}

// to[word][col] for whole quarters of `words` and whole registers of `cols`.
template <class T>
void pack_panel(const T* w, int64_t w_stride, int64_t cols, int64_t words, T* to) {
  constexpr int64_t kPerLane = Vec<T>::kPerLane;
  const int64_t stride = w_stride * int64_t(sizeof(T));
  for (int64_t c = 0; c < cols; c += kLanes) {
    int64_t i = 0;
    for (; i + kLanes <= words; i += kLanes) {
      transpose_lines(w + c * w_stride + i * kPerLane, stride, [&](int j, U weights) {
        store(to + ((i + j) * cols + c) * kPerLane, Vec<T>::weights(weights));
      });
    }
    for (; i < words; i += kQuarter) {
      U weights[kQuarter];
      load_transposed(w + c * w_stride + i * kPerLane, stride, weights);
      for (int j = 0; j < kQuarter; ++j) {
        store(to + ((i + j) * cols + c) * kPerLane, Vec<T>::weights(weights[j]));
      }
    }
  }
}

// Weights whose rows are whole quarters, and whose number of rows is whole registers.
template <class T>
struct Weights {
  const T* data;
  int64_t stride, words, cols;
};

template <class T>
void multiply_few(const T* x, int64_t x_stride, int64_t rows, const Weights<T>& w, float* out,
                  int64_t out_stride) {
  constexpr int64_t kPerLane = Vec<T>::kPerLane;
  const Strip<T> run = strip_for<T>(rows);
  const int64_t block = block_words(w.words);
  for (int64_t c = 0; c < w.cols; c += kLanes) {
    const T* from = w.data + c * w.stride;
    const char* ahead = reinterpret_cast<const char*>(from + kLanes * w.stride);
    for (int64_t i = 0; i < w.words; i += block) {
      run(x + i * kPerLane, x_stride, from + i * kPerLane, w.stride, std::min(block, w.words - i),
          out + c, out_stride, rows, {i > 0}, ahead + i * kLanes * 4);
    }
  }
}

template <class T>
void multiply_many(const T* x, int64_t x_stride, int64_t rows, const Weights<T>& w, float* out,
                   int64_t out_stride) {
  constexpr int64_t kPerLane = Vec<T>::kPerLane;
  thread_local Scratch scratch;
  const int64_t block = block_words(w.words);
  scratch.reset(Scratch::bytes<T>(kPanelCols * block * kPerLane));
  T* panel = scratch.take<T>(kPanelCols * block * kPerLane);
  for (int64_t c = 0; c < w.cols; c += kPanelCols) {
    const int64_t cols = std::min(kPanelCols, w.cols - c);
    for (int64_t i = 0; i < w.words; i += block) {
      const int64_t words = std::min(block, w.words - i);
      const T* from = w.data + c * w.stride + i * kPerLane;
      const bool last = i + block >= w.words;
      const T* next = last ? w.data + (c + cols) * w.stride : from + block * kPerLane;
      pack_panel(from, w.stride, cols, words, panel);
      outer_product<T>(x + i * kPerLane, x_stride, rows, panel, cols * kPerLane, words, out + c,
                       out_stride, cols, {i > 0},
                       {reinterpret_cast<const char*>(next), w.stride * int64_t(sizeof(T)), cols});
    }
  }
}

// Sums of integers for at most kSweepRows rows of x, where rows of w fill whole registers: weights
// are read as they lie.
inline void multiply_fewest(const int8_t* x, int64_t x_stride, int64_t rows,
                            const Weights<int8_t>& w, float* out, int64_t out_stride) {
  const auto run = rows <= 1 ? &sweep<1> : rows <= 2 ? &sweep<2> : &sweep<kSweepRows>;
  run(x, x_stride, rows, w.data, w.stride, w.cols, out, out_stride);
}

// out = x . w for columns that fill no register, or rows that fill no quarter: weights are copied
// and padded first.
template <class T>
void multiply_odd(const Packed<T>& x, int64_t begin, int64_t end, const T* w, int64_t cols,
                  float* out, int64_t out_stride) {
  thread_local Scratch scratch;
  const int64_t words = Packed<T>::words(x.k), stride = words * Vec<T>::kPerLane;
  scratch.reset(Scratch::bytes<T>(kLanes * stride));
  T* padded = scratch.take<T>(kLanes * stride);
  alignas(64) float results[kStripRows * kLanes];
  for (int64_t c = 0; c < cols; c += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, cols - c);
    std::memset(padded, 0, kLanes * stride * sizeof(T));
    for (int64_t i = 0; i < width; ++i) {
      std::memcpy(padded + i * stride, w + (c + i) * x.k, x.k * sizeof(T));
    }
    for (int64_t r = begin; r < end; r += kStripRows) {
      const int64_t rows = std::min<int64_t>(kStripRows, end - r);
      const Weights<T> weights{padded, stride, words, kLanes};
      multiply_few(x.row(r), Packed<T>::stride(x.k), rows, weights, results, kLanes);
      for (int64_t i = 0; i < rows; ++i) {
        convert(out + (r - begin + i) * out_stride + c, results + i * kLanes, width);
      }
    }
  }
}

// out = x . w, or out += x . w where `onto`, by tiles. Products of integers come out scaled.
template <class T>
void multiply_by_tiles(const Packed<T>& x, int64_t begin, int64_t end, const Matrix<T>& w,
                       int64_t cols, float* out, int64_t out_stride, bool onto = false) {
  const Tiles tiles;
  const TileOut to{out, out_stride, end - begin, cols, x.scales + begin, w.scales, onto};
  if (!x.turns) return multiply_tiles(x.group(begin), w.data, x.k, to);
  thread_local Scratch scratch;
  const int64_t bytes = TurnedWeights<T>::bytes(x.k, cols);
  scratch.reset(Scratch::bytes<char>(bytes));
  const TurnedWeights<T> turned(scratch.take<char>(bytes), w.data, x.k, cols);
  turned.multiply(x.row(begin), Packed<T>::stride(x.k), to);
}

// Sums of integers, which lie where their floats shall be, times both scales.
inline void apply_scales(const RowScale* rows, int64_t num_rows, const float* scales, int64_t cols,
                         float* out, int64_t out_stride) {
  for (int64_t r = 0; r < num_rows; ++r, out += out_stride) {
    const uint32_t extra = 128 * rows[r].sum;  // see Vec<int8_t>
    for (int64_t c = 0; c < cols; ++c) {
      const auto sum = int32_t(bitcast<uint32_t>(out[c]) - extra);
      out[c] = float(sum) * rows[r].scale * scales[c];
    }
  }
}

// out[r][c] = x[begin + r] . w[c] for rows [begin, end) of x and the first `cols` rows of w.
template <class T>
void dot_block(const Packed<T>& x, int64_t begin, int64_t end, const Matrix<T>& matrix, int64_t cols,
               float* out, int64_t out_stride) {
  if (x.k == 0) {  // a sum of nothing
    for (int64_t i = begin; i < end; ++i, out += out_stride) std::fill(out, out + cols, 0.0f);
    return;
  }
  const T* w = matrix.data;
  const bool odd = x.k % (kQuarter * Vec<T>::kPerLane) != 0;
  const int64_t whole = odd ? 0 : cols / kLanes * kLanes, rows = end - begin;
  int64_t unscaled = 0;  // the first column of sums of integers
  if (whole > 0 && x.by_tiles()) {
    multiply_by_tiles(x, begin, end, matrix, whole, out, out_stride);
    unscaled = whole;
  } else if (whole > 0) {
    const Weights<T> weights{w, x.k, Packed<T>::words(x.k), whole};
    auto run = rows <= kStripRows ? &multiply_few<T> : &multiply_many<T>;
    if constexpr (kIsInt8<T>) {
      if (can_sweep(rows, x.k)) run = &multiply_fewest;
    }
    run(x.row(begin), Packed<T>::stride(x.k), rows, weights, out, out_stride);
  }
  if (whole < cols) {
    multiply_odd(x, begin, end, w + whole * x.k, cols - whole, out + whole, out_stride);
  }
  if constexpr (kIsInt8<T>) {
    apply_scales(x.scales + begin, rows, matrix.scales + unscaled, cols - unscaled, out + unscaled,
                 out_stride);
  }
}

// out[r][c] += x[begin + r] . w[c] for rows [begin, end) of x and the first `cols` rows of w. Sums
// that may be of integers on their way wait apart, some columns at a time.
template <class T>
void add_block(const Packed<T>& x, int64_t begin, int64_t end, const Matrix<T>& matrix, int64_t cols,
               float* out, int64_t out_stride) {
  thread_local Scratch scratch;
  const int64_t rows = end - begin;
  const int64_t whole = x.by_tiles() ? cols / kLanes * kLanes : 0;
  if (whole > 0) multiply_by_tiles(x, begin, end, matrix, whole, out, out_stride, true);
  if (whole == cols) return;
  scratch.reset(Scratch::bytes<float>(rows * kPanelCols));
  float* sums = scratch.take<float>(rows * kPanelCols);
  for (int64_t c = whole; c < cols; c += kPanelCols) {
    const int64_t width = std::min(kPanelCols, cols - c);
    dot_block(x, begin, end, matrix.from_row(c), width, sums, width);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + r * out_stride + c;
      for (int64_t i = 0; i < width; ++i) to[i] += sums[r * width + i];
    }
  }
}

}  // namespace jaxserve
