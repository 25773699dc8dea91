// Rows of x, converted to the weights' type by all threads, and how a product is cut into chunks.
#pragma once

#include "dot.h"
#include "threads.h"

namespace jaxserve {

// row_of(i) is the address of the K elements that become row i.
template <class T, class RowOf>
void pack_rows(const Packed<T>& to, const RowOf& row_of) {
  constexpr int64_t kElementsPerChunk = 64 * 1024;
  const int64_t rows = std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, to.k));
  Pool::shared().run(ceil_div(to.num_rows, rows), [&](int64_t chunk) {
    const int64_t end = std::min(to.num_rows, (chunk + 1) * rows);
    for (int64_t i = chunk * rows; i < end; ++i) to.put(i, 0, row_of(i), to.k);
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

inline int64_t chunk_rows(int64_t rows, int64_t col_chunks) {
  constexpr int64_t kLowest = 16 * kOuterRows;
  const int64_t wanted = Pool::shared().num_threads() * kChunksPerThread / 2;
  const int64_t slabs = ceil_div(wanted, std::max<int64_t>(1, col_chunks));
  return std::max(kLowest, round_up(ceil_div(rows, slabs), kOuterRows));
}

constexpr int64_t kRowsPerPass = 1024;  // bounds the scratch memory

}  // namespace jaxserve
