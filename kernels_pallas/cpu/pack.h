// Rows of x, converted to the weights' type and packed for dot_block, by all threads.
#pragma once

#include "dot.h"
#include "threads.h"

namespace jaxserve {

// row_of(i) is the address of the K elements that become row i.
template <class T, class RowOf>
void pack_rows(const Packed<T>& to, int64_t k, const RowOf& row_of) {
  constexpr int64_t kElementsPerChunk = 64 * 1024;
  const int64_t rows = std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, k));
  Pool::shared().run(ceil_div(to.num_rows, rows), [&](int64_t chunk) {
    const int64_t end = std::min(to.num_rows, (chunk + 1) * rows);
    for (int64_t i = chunk * rows; i < end; ++i) to.put(i, 0, row_of(i), k);
  });
}

// How to cut the outputs of a product into chunks: narrow enough that all threads share the work
// evenly, wide enough that a chunk is worth claiming.
inline int64_t chunk_cols(int64_t cols) {
  constexpr int64_t kWidest = 8 * kWideCols, kPerThread = 8;
  const int64_t even = ceil_div(cols, Pool::shared().num_threads() * kPerThread);
  return std::min(kWidest, ceil_div(even, kWideCols) * kWideCols);
}

constexpr int64_t kRowsPerChunk = 128;  // x of one depth block (512 KiB) stays in L2
constexpr int64_t kRowsPerPass = 1024;  // bounds the scratch memory

}  // namespace jaxserve
