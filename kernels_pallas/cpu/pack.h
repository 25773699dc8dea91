// Rows of x, converted to the weights' type by all threads, and how a product is cut into chunks.
#pragma once

#include "dot.h"
#include "threads.h"

namespace jaxserve {

// Rows of so many elements that make a chunk of about `elements`.
inline int64_t rows_per_chunk(int64_t elements, int64_t width) {
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, width));
}

// row_of(i) is the address of the K elements that become row i.
template <class T, class RowOf>
void pack_rows(const Packed<T>& to, const RowOf& row_of) {
  const int64_t fit = rows_per_chunk(64 * 1024, to.k);
  const int64_t rows = to.groups ? round_up(fit, kTileRows) : fit;
  Pool::shared().run(ceil_div(to.num_rows, rows), [&](int64_t chunk) {
    const int64_t begin = chunk * rows, end = std::min(to.num_rows, begin + rows);
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end) fetch(row_of(i + 1), to.k * int64_t(sizeof(*row_of(i))));
      to.put(i, 0, row_of(i), to.k);
    }
    to.regroup(begin, end);
  });
}

// How to cut a product into chunks: narrow and low enough that all threads share the work evenly,
// otherwise as tall as can be, since all rows of a chunk share one transposition of the weights.
constexpr int64_t kChunksPerThread = 4;

inline int64_t chunk_cols(int64_t cols) {
  constexpr int64_t kWidest = 4 * kPanelCols;
  const int64_t even = ceil_div(cols, Pool::shared().num_threads() * kChunksPerThread);
  return std::min(kWidest, round_up(even, kPanelCols));
}

template <class T>
int64_t chunk_rows(int64_t num_rows, int64_t k, int64_t col_chunks) {
  constexpr int64_t kStep = 8 * kOuterRows, kLowest = 2 * kStep;  // both whole groups of tiles
  constexpr int64_t kMostBytes = 1 << 20;  // of rows, which all tiles of weights pass by, in L2
  const int64_t wanted = Pool::shared().num_threads() * kChunksPerThread / 2;
  int64_t slabs = ceil_div(wanted, std::max<int64_t>(1, col_chunks));
  if (Packed<T>::by_tiles(num_rows, k)) {
    const int64_t most = std::max(kStep, kMostBytes / Packed<T>::groups_bytes(1, k) * kTileRows);
    slabs = std::max(slabs, ceil_div(num_rows, most));
  }
  return std::max(kLowest, round_up(ceil_div(num_rows, slabs), kStep));
}

constexpr int64_t kRowsPerPass = 1024;  // bounds the scratch memory

}  // namespace jaxserve
