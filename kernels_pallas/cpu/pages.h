// The paged KV cache, and blocks of it packed for the outer product.
#pragma once

#include <algorithm>
#include <cstdint>

#include "outer.h"
#include "transpose.h"

namespace jaxserve {

// Keys are always handled in blocks of this many consecutive absolute positions, so the order of
// every sum is a property of the position alone, never of how the queries were chunked.
constexpr int64_t kBlockKeys = 64;

// Elements of a key, rounded up to whole quarters.
template <class T>
constexpr int64_t padded_keys(int64_t width) {
  return round_up(width, kQuarter * Vec<T>::kPerLane);
}

// One layer of k_pages or v_pages: [P, K, Z, width].
template <class T>
struct Pages {
  T* data;
  int64_t num_pages, num_heads, page_size, width;

  T* row(int64_t page, int64_t head, int64_t slot) const {
    return data + ((page * num_heads + head) * page_size + slot) * width;
  }

  // Where a sequence keeps a position, or null if its table names no such page.
  T* find(const int32_t* table, int64_t head, int64_t position) const {
    const int64_t page = table[position / page_size];
    if (page < 0 || page >= num_pages) return nullptr;
    return row(page, head, position % page_size);
  }
};

// The rows of one block of keys or values; missing ones stay null and are packed as zeros.
template <class T>
struct Block {
  int64_t count;
  bool in_runs;  // kLanes rows that begin at a multiple of kLanes follow each other in memory
  const T* rows[kBlockKeys];

  // Positions [first, end), at most kBlockKeys of them.
  Block(const Pages<T>& pages, const int32_t* table, int64_t head, int64_t first, int64_t end)
      : count(std::clamp<int64_t>(end - first, 0, kBlockKeys)),
        in_runs(pages.page_size % kLanes == 0) {
    for (int64_t i = 0; i < count;) {
      const T* row = pages.find(table, head, first + i);
      const int64_t slots = pages.page_size - (first + i) % pages.page_size;
      for (const int64_t stop = std::min(count, i + slots); i < stop; ++i) {
        rows[i] = row;
        if (row) row += pages.width;
      }
    }
    std::fill(rows + count, rows + kBlockKeys, nullptr);
  }

  // None yet, for whoever puts rows of his own there.
  Block(int64_t count, bool in_runs) : count(count), in_runs(in_runs) {
    std::fill(rows, rows + kBlockKeys, nullptr);
  }
};

// While one block is packed, the next one comes into L2: pages lie scattered, so the hardware does
// not see them coming. It fetches fastest, we measured, when requests come evenly spread and walk
// several places at once; hence step i asks not for the i-th run of rows but for the one from here.
inline int64_t spread(int64_t i, int64_t run) {
  constexpr int64_t kPlaces = 4;
  return i % kPlaces * (kBlockKeys / kPlaces) + i / kPlaces * run;
}

template <class T>
void prefetch_row(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// kLanes rows of whole quarters, one after the other.
template <class T>
struct Run {
  const T* rows;
  int64_t stride;
};

// Rows of a page are a run where they lie; others are copied to `spare`, the missing ones as zeros.
template <class T>
Run<T> run_of(const Block<T>& block, int64_t key, int64_t width, T* spare) {
  const int64_t padded = padded_keys<T>(width);
  if (block.in_runs && width == padded && key + kLanes <= block.count && block.rows[key]) {
    return {block.rows[key], width};
  }
  std::memset(spare, 0, kLanes * padded * sizeof(T));
  for (int64_t i = 0; i < kLanes; ++i) {
    if (block.rows[key + i]) convert(spare + i * padded, block.rows[key + i], width);
  }
  return {spare, padded};
}

// to[word][key], rounded up to whole registers of keys and whole quarters of words.
template <class T>
void pack_keys(const Block<T>& block, const Block<T>& next, int64_t width, T* spare, T* to) {
  constexpr int64_t kPerLane = Vec<T>::kPerLane;
  for (int64_t key = 0; key < block.count; key += kLanes) {
    const Run<T> run = run_of(block, key, width, spare);
    for (int64_t word = 0; word < words_of<T>(width); word += kQuarter) {
      const int64_t line = word / kLanes * kLanes;
      U columns[kQuarter];
      load_transposed(run.rows + word * kPerLane, run.stride * int64_t(sizeof(T)), columns);
      for (int64_t w = word; w < word + kQuarter; ++w) {
        __builtin_prefetch(next.rows[spread(key + w - line, 1)] + line * kPerLane, 0, 2);
        store(to + (w * kBlockKeys + key) * kPerLane, columns[w - word]);
      }
    }
  }
}

// One lane per column of values, one per half of a lane for a pair of keys.
inline U pair_of(const bf16* even, const bf16* odd) {
  using Half = uint16_t __attribute__((vector_size(2 * kLanes)));
  return __builtin_convertvector(load<Half>(even), U) |
         __builtin_convertvector(load<Half>(odd), U) << 16;
}

inline F pair_of(const float* row, const float*) { return load<F>(row); }

// Keys `key` and `key + 1`, one per half of a word.
inline void pack_pair(const bf16* even, const bf16* odd, int64_t width, bf16* to) {
  using Word = uint32_t __attribute__((may_alias));
  Word* words = reinterpret_cast<Word*>(to);
  if (even && odd) {
    for (int64_t i = 0; i < width; ++i) words[i] = even[i].bits | uint32_t(odd[i].bits) << 16;
  } else {
    for (int64_t i = 0; i < width; ++i) {
      words[i] = (even ? even[i].bits : 0) | uint32_t(odd ? odd[i].bits : 0) << 16;
    }
  }
}

inline void pack_pair(const float* row, const float*, int64_t width, float* to) {
  if (row) {
    std::memcpy(to, row, width * sizeof(float));
  } else {
    std::memset(to, 0, width * sizeof(float));
  }
}

// to[word of keys][width] for the first `count` keys, `padded` columns wide. The padding is never
// written: it only feeds columns of the accumulator that nobody reads.
template <class T>
void pack_values(const Block<T>& block, const Block<T>& next, int64_t count, int64_t width,
                 int64_t padded, T* to) {
  constexpr int64_t kWord = Vec<T>::kPerLane;
  for (int64_t key = 0; key < count; key += kWord, to += kWord * padded) {
    for (int64_t i = 0; i < kWord; ++i) {
      prefetch_row(next.rows[spread(key / kWord, kWord) + i], width);
    }
    pack_pair(block.rows[key], block.rows[key + kWord - 1], width, to);
  }
}

}  // namespace jaxserve
