// Rows of floats as eight-bit integers, each with a step of its own.
#pragma once

#include <algorithm>

#include "simd.h"

namespace jaxserve {

// What takes sums of an eight-bit row back to floats: its step, and the sum of its values, which
// wraps around where the row is not finite.
struct RowScale {
  float scale;
  uint32_t sum;
};

// Halves round to even. Not by adding kRound: the compiler would contract that with a product
// before it, and the reference rounds twice.
inline I round_to_int(F x) {
#if defined(__AVX512F__)
  return bitcast<I>(_mm512_cvtps_epi32(x));
#elif defined(__AVX__)
  return bitcast<I>(_mm256_cvtps_epi32(x));
#else
  I whole{};
  for (int i = 0; i < kLanes; ++i) whole[i] = int32_t(std::lrintf(x[i]));
  return whole;
#endif
}

inline void store_bytes(int8_t* to, I x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bitcast<__m512i>(x)));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = int8_t(x[i]);
#endif
}

// fn(i, x) for the floats from i on, a register at a time; zeros behind the last.
template <class From, class Fn>
inline void for_registers(const From* from, int64_t n, const Fn& fn) {
  alignas(64) float some[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, n - i);
    if (std::is_same_v<From, float> && count == kLanes) {
      fn(i, load<F>(from + i));
    } else {
      std::fill(some, some + kLanes, 0.0f);
      convert(some, from + i, count);
      fn(i, load<F>(some));
    }
  }
}

// The largest magnitude becomes 127, as in kernels_pallas.quantize; a row that is not finite has no
// step. Writes whole registers: up to kLanes - 1 bytes behind the last are zeroed.
template <class From>
inline RowScale quantize(const From* from, int64_t n, int8_t* to) {
  F tops{}, zeros{};
  for_registers(from, n, [&](int64_t, F x) {
    tops = maximum(tops, maximum(x, -x));
    zeros += x - x;  // unless one is not finite
  });
  const float top = max_lanes(tops) + sum_lanes(zeros);
  const F steps = splat(top > 0.0f ? 127.0f / top : 0.0f);
  U sums{};
  for_registers(from, n, [&](int64_t i, F x) {
    const I whole = round_to_int(x * steps);
    store_bytes(to + i, whole);
    sums += bitcast<U>(whole);
  });
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return {top * (1 / 127.0f), sum};
}

}  // namespace jaxserve
