// Rows of words become registers of columns: what turns weights and keys, which lie in memory as
// rows, into the operand of an outer product.
#pragma once

#include "simd.h"

namespace jaxserve {

constexpr int kQuarter = 4;  // words transposed at a time: 16 bytes of each row

// to[w][i] = word w of row i, for kQuarter words of kLanes rows that lie `stride` bytes apart.
// Register a is loaded with the quarters of rows a, a + 4, ...: then only moves inside of quarters
// are left, and loads have done the rest.
inline void load_transposed(const void* rows, int64_t stride, U (&to)[kQuarter]) {
  const char* base = static_cast<const char*>(rows);
#if defined(__AVX512F__)
  auto quarter = [&](int i) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(base + i * stride));
  };
  auto pair = [&](int i, int j) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(quarter(i)), quarter(j), 1);
  };
  auto gather = [&](int i) {
    const __m512d low = _mm512_castpd256_pd512(bitcast<__m256d>(pair(i, i + 4)));
    return bitcast<__m512>(_mm512_insertf64x4(low, bitcast<__m256d>(pair(i + 8, i + 12)), 1));
  };
  const __m512 a0 = gather(0), a1 = gather(1), a2 = gather(2), a3 = gather(3);
  const __m512d b0 = bitcast<__m512d>(_mm512_unpacklo_ps(a0, a1));
  const __m512d b1 = bitcast<__m512d>(_mm512_unpackhi_ps(a0, a1));
  const __m512d b2 = bitcast<__m512d>(_mm512_unpacklo_ps(a2, a3));
  const __m512d b3 = bitcast<__m512d>(_mm512_unpackhi_ps(a2, a3));
  to[0] = bitcast<U>(_mm512_unpacklo_pd(b0, b2));
  to[1] = bitcast<U>(_mm512_unpackhi_pd(b0, b2));
  to[2] = bitcast<U>(_mm512_unpacklo_pd(b1, b3));
  to[3] = bitcast<U>(_mm512_unpackhi_pd(b1, b3));
#elif defined(__AVX__)
  auto quarter = [&](int i) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(base + i * stride));
  };
  auto gather = [&](int i) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(quarter(i)), quarter(i + 4), 1);
  };
  const __m256 a0 = gather(0), a1 = gather(1), a2 = gather(2), a3 = gather(3);
  const __m256d b0 = bitcast<__m256d>(_mm256_unpacklo_ps(a0, a1));
  const __m256d b1 = bitcast<__m256d>(_mm256_unpackhi_ps(a0, a1));
  const __m256d b2 = bitcast<__m256d>(_mm256_unpacklo_ps(a2, a3));
  const __m256d b3 = bitcast<__m256d>(_mm256_unpackhi_ps(a2, a3));
  to[0] = bitcast<U>(_mm256_unpacklo_pd(b0, b2));
  to[1] = bitcast<U>(_mm256_unpackhi_pd(b0, b2));
  to[2] = bitcast<U>(_mm256_unpacklo_pd(b1, b3));
  to[3] = bitcast<U>(_mm256_unpackhi_pd(b1, b3));
#else
  for (int i = 0; i < kLanes; ++i) {
    const auto words = load<std::array<uint32_t, kQuarter>>(base + i * stride);
    for (int w = 0; w < kQuarter; ++w) to[w][i] = words[w];
  }
#endif
}

// store_line(w, register) for w in [0, kLanes): as above for whole lines of each row. Where a
// register holds a line, that takes a third of the time of four quarters.
template <class Put>
inline void transpose_lines(const void* rows, int64_t stride, const Put& put) {
#if defined(__AVX512F__)
  const char* base = static_cast<const char*>(rows);
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(base + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows: words 0 0' 1 1' | 2 2' 3 3' of each quarter
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // fours of rows: a[i + w] has word w of each quarter
    auto join = [&](int j, int k, bool high) {
      const __m512d x = bitcast<__m512d>(b[j]), y = bitcast<__m512d>(b[k]);
      return bitcast<__m512>(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
    };
    a[i] = join(i, i + 2, false);
    a[i + 1] = join(i, i + 2, true);
    a[i + 2] = join(i + 1, i + 3, false);
    a[i + 3] = join(i + 1, i + 3, true);
  }
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {  // quarters of all rows
    const __m512 x = _mm512_shuffle_f32x4(a[w], a[w + 4], 0x88);
    const __m512 y = _mm512_shuffle_f32x4(a[w + 8], a[w + 12], 0x88);
    const __m512 z = _mm512_shuffle_f32x4(a[w], a[w + 4], 0xdd);
    const __m512 t = _mm512_shuffle_f32x4(a[w + 8], a[w + 12], 0xdd);
    put(w, bitcast<U>(_mm512_shuffle_f32x4(x, y, 0x88)));
    put(w + 4, bitcast<U>(_mm512_shuffle_f32x4(z, t, 0x88)));
    put(w + 8, bitcast<U>(_mm512_shuffle_f32x4(x, y, 0xdd)));
    put(w + 12, bitcast<U>(_mm512_shuffle_f32x4(z, t, 0xdd)));
  }
#else
  for (int first = 0; first < kLanes; first += kQuarter) {
    U columns[kQuarter];
    load_transposed(static_cast<const char*>(rows) + 4 * first, stride, columns);
    for (int w = 0; w < kQuarter; ++w) put(first + w, columns[w]);
  }
#endif
}

}  // namespace jaxserve
