// The paged KV cache, and blocks of it packed for the outer product.
#pragma once

#include <algorithm>
#include <cstdint>

#include "outer.h"

namespace jaxserve {

// Keys are always handled in blocks of this many consecutive absolute positions, so the order of
// every sum is a property of the position alone, never of how the queries were chunked.
constexpr int64_t kBlockKeys = 64;

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
  const T* rows[kBlockKeys];

  // Positions [first, end), at most kBlockKeys of them.
  Block(const Pages<T>& pages, const int32_t* table, int64_t head, int64_t first, int64_t end)
      : count(std::clamp<int64_t>(end - first, 0, kBlockKeys)) {
    for (int64_t i = 0; i < kBlockKeys; ++i) {
      rows[i] = i < count ? pages.find(table, head, first + i) : nullptr;
    }
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

// Transposes kLanes registers of kLanes words in place.
inline void transpose(U (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = bitcast<__m512i>(r[i]);
  for (int i = 0; i < 16; i += 2) {  // words of two rows
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // pairs of words of four rows
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {  // a 4 x 4 transpose of quarters
    __m512i even_top = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    __m512i odd_top = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    __m512i even_low = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    __m512i odd_low = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    r[i] = bitcast<U>(_mm512_shuffle_i32x4(even_top, even_low, 0x88));
    r[i + 4] = bitcast<U>(_mm512_shuffle_i32x4(odd_top, odd_low, 0x88));
    r[i + 8] = bitcast<U>(_mm512_shuffle_i32x4(even_top, even_low, 0xdd));
    r[i + 12] = bitcast<U>(_mm512_shuffle_i32x4(odd_top, odd_low, 0xdd));
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t word = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = word;
    }
  }
#endif
}

// to[word][key], rounded up to whole registers of keys.
template <class T>
void pack_keys(const Block<T>& block, const Block<T>& next, int64_t width, T* to) {
  constexpr int64_t kWord = Vec<T>::kPerLane;
  const int64_t bytes = width * int64_t(sizeof(T));
  for (int64_t key = 0; key < block.count; key += kLanes) {
    for (int64_t word = 0; word < words_of<T>(width); word += kLanes) {
      U r[kLanes];
      const int64_t rest = std::min<int64_t>(sizeof(U), bytes - word * 4);
      for (int i = 0; i < kLanes; ++i) {
        const T* row = block.rows[key + i];
        __builtin_prefetch(next.rows[spread(key + i, 1)] + word * kWord, 0, 2);
        r[i] = row ? load_partial<U>(row + word * kWord, rest) : U{};
      }
      transpose(r);
      T* out = to + (word * kBlockKeys + key) * kWord;
      for (int64_t w = 0; w < (rest + 3) / 4; ++w) store(out + w * kBlockKeys * kWord, r[w]);
    }
  }
}

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

// to[word of keys][width], `padded` columns wide. The padding is never written: it only feeds
// columns of the accumulator that nobody reads.
template <class T>
void pack_values(const Block<T>& block, const Block<T>& next, int64_t width, int64_t padded,
                 T* to) {
  constexpr int64_t kWord = Vec<T>::kPerLane;
  for (int64_t key = 0; key < block.count; key += kWord, to += kWord * padded) {
    for (int64_t i = 0; i < kWord; ++i) {
      prefetch_row(next.rows[spread(key / kWord, kWord) + i], width);
    }
    pack_pair(block.rows[key], block.rows[key + kWord - 1], width, to);
  }
}

}  // namespace jaxserve
