// One SIMD register of floats and the few operations the kernels are made of.
//
// Registers are GCC/Clang vector extensions, so every kernel compiles for any CPU; intrinsics
// appear only where the compiler does not find the instruction by itself.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace jaxserve {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// AVX-512 and NEON have 32 registers; everyone else has 16, so tiles are smaller there.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

using F = float __attribute__((vector_size(4 * kLanes)));
using I = int32_t __attribute__((vector_size(4 * kLanes)));
using U = uint32_t __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline F splat(float x) { return F{} + x; }

template <class To, class From>
inline To bitcast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof(to));
  return to;
}

template <class Reg>
inline Reg load(const void* p) {
  Reg r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}

// Brings memory to L1 that is wanted soon: at the end of a page the hardware stops to look ahead.
inline void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

template <class Reg>
inline void store(void* p, Reg r) {
  std::memcpy(p, &r, sizeof(r));
}

// The first `bytes` bytes at p, zeros after them: never reads past the end of an array.
template <class Reg>
inline Reg load_partial(const void* p, int64_t bytes) {
#if defined(__AVX512BW__)
  return bitcast<Reg>(_mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), p));
#else
  Reg r{};
  std::memcpy(&r, p, bytes);
  return r;
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bitcast<float>(uint32_t(x.bits) << 16); }

// Round to nearest even; a NaN keeps its sign and becomes quiet.
inline bf16 to_bf16(float x) {
  uint32_t u = bitcast<uint32_t>(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

// A register of floats as what an array holds.
inline void store_as(float* to, F x) { store(to, x); }
inline void store_as(bf16* to, F x) {
#if defined(__AVX512BF16__)
  store(to, bitcast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = to_bf16(x[i]);
#endif
}

// Two registers of floats as bf16, side by side in words.
inline U join_bf16(F low, F high) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  alignas(64) static constexpr auto kPlaces = [] {
    std::array<uint16_t, 32> places{};
    for (int i = 0; i < 32; ++i) places[i] = uint16_t(i / 2 + i % 2 * 16);
    return places;
  }();
  const auto apart = bitcast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  return bitcast<U>(_mm512_permutexvar_epi16(load<__m512i>(kPlaces.data()), apart));
#else
  U words;
  for (int i = 0; i < kLanes; ++i) words[i] = to_bf16(low[i]).bits | to_bf16(high[i]).bits << 16;
  return words;
#endif
}

inline void convert(float* to, const float* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
}
inline void convert(bf16* to, const bf16* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(bf16));
}
inline void convert(float* to, const bf16* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
inline void convert(bf16* to, const float* from, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + kLanes <= n; i += kLanes) store_as(to + i, load<F>(from + i));
  if (i < n) {
    auto keep = __mmask16((1u << (n - i)) - 1);
    auto half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(keep, from + i));
    _mm256_mask_storeu_epi16(to + i, keep, bitcast<__m256i>(half));
  }
#else
  for (; i < n; ++i) to[i] = to_bf16(from[i]);
#endif
}

// A register full of T, as the dot products see it: bf16 travels in pairs, int8 in fours, so that a
// lane always takes in a word of 32 bits. `weights` makes of the second operand what `dot` expects.
template <class T>
struct Vec;

template <>
struct Vec<float> {
  using Reg = F;
  using Sum = F;
  static constexpr int kPerLane = 1;
  static constexpr int kSize = kLanes;
  static F dot(F sum, F a, F b) { return sum + a * b; }
  static F broadcast(const float* p) { return splat(*p); }
  static U weights(U words) { return words; }
};

template <>
struct Vec<bf16> {
  using Reg = U;
  using Sum = F;
  static constexpr int kPerLane = 2;
  static constexpr int kSize = 2 * kLanes;
  static U broadcast(const bf16* p) { return U{} + bitcast<uint32_t>(load<uint32_t>(p)); }
  static F dot(F sum, U a, U b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, bitcast<__m512bh>(a), bitcast<__m512bh>(b));
#else
    sum += bitcast<F>(a << 16) * bitcast<F>(b << 16);
    return sum + bitcast<F>(a & 0xffff0000u) * bitcast<F>(b & 0xffff0000u);
#endif
  }
  static U weights(U words) { return words; }
};

// The instruction wants one operand without sign: weights come with 128 added, which makes sums too
// large by 128 times the sum of the row of x. Whoever scales the sums takes that off again; until
// then they may wrap around, and so have no sign.
template <>
struct Vec<int8_t> {
  using Reg = U;
  using Sum = U;
  static constexpr int kPerLane = 4;
  static constexpr int kSize = 4 * kLanes;
  static U broadcast(const int8_t* p) { return U{} + load<uint32_t>(p); }
  static U weights(U words) { return words ^ 0x80808080u; }
  static U dot(U sum, U x, U weights) {
#if defined(__AVX512VNNI__)
    return bitcast<U>(_mm512_dpbusd_epi32(bitcast<__m512i>(sum), bitcast<__m512i>(weights),
                                          bitcast<__m512i>(x)));
#elif defined(__AVXVNNI__)
    return bitcast<U>(_mm256_dpbusd_avx_epi32(bitcast<__m256i>(sum), bitcast<__m256i>(weights),
                                              bitcast<__m256i>(x)));
#else
    // Sixteen bits for every factor: products of pairs then fit, as the plain instruction's do not.
    using S16 = int16_t __attribute__((vector_size(4 * kLanes)));
    const S16 a = bitcast<S16>(x), b = bitcast<S16>(weights);
    const S16 even = (a << 8) >> 8, odd = a >> 8;
    const S16 low = b & 255, high = bitcast<S16>(bitcast<U>(b & int16_t(0xff00)) >> 8);
    return sum + multiply_pairs(even, low) + multiply_pairs(odd, high);
#endif
  }

 private:
  // Sums of neighbours' products.
  template <class S16>
  static U multiply_pairs(S16 a, S16 b) {
#if defined(__AVX512BW__)
    return bitcast<U>(_mm512_madd_epi16(bitcast<__m512i>(a), bitcast<__m512i>(b)));
#elif defined(__AVX2__)
    return bitcast<U>(_mm256_madd_epi16(bitcast<__m256i>(a), bitcast<__m256i>(b)));
#else
    const I x = bitcast<I>(a), y = bitcast<I>(b);
    return bitcast<U>(((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16));
#endif
  }
};

// Whether any lane of a comparison holds.
inline bool any(I holds) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bitcast<__m512i>(holds), bitcast<__m512i>(holds)) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= holds[i];
  return found != 0;
#endif
}

// Of a NaN and something, the second; also in minimum().
inline F maximum(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline F minimum(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// out[i] = the sum of the lanes of v[i], always by the same tree.
inline void sum_lanes(const F v[4], float out[4]) {
#if defined(__AVX512F__)
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  __m512 q = bitcast<__m512>(
      _mm512_add_ps(bitcast<__m512>(_mm512_unpacklo_pd(bitcast<__m512d>(ab), bitcast<__m512d>(cd))),
                    bitcast<__m512>(_mm512_unpackhi_pd(bitcast<__m512d>(ab), bitcast<__m512d>(cd)))));
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(q),
                           bitcast<__m256>(_mm512_extractf64x4_pd(bitcast<__m512d>(q), 1)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    F lanes = v[i];
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    out[i] = lanes[0];
  }
#endif
}

inline float sum_lanes(F v) {
  const F padded[4] = {v, F{}, F{}, F{}};
  float out[4];
  sum_lanes(padded, out);
  return out[0];
}

inline float max_lanes(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float most = v[0];
  for (int lane = 1; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
#endif
}

// x itself. The compiler shall not join a product with a sum behind it: that rounds once, not twice.
inline F rounded(F x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#endif
  return x;
}

// Lane i: all lanes of v[i] joined by op, always by the same tree.
template <class Op>
inline F fold_lanes(const F (&v)[kLanes], const Op& op) {
#if defined(__AVX512F__)
  auto singles = [&](F a, F b) {
    return op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  auto pairs = [&](F a, F b) {
    const __m512d x = bitcast<__m512d>(a), y = bitcast<__m512d>(b);
    return op(bitcast<F>(_mm512_unpacklo_pd(x, y)), bitcast<F>(_mm512_unpackhi_pd(x, y)));
  };
  auto quarters = [&](F a, F b) {
    return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  F fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const F* from = v + 4 * i;
    fours[i] = pairs(singles(from[0], from[1]), singles(from[2], from[3]));
  }
  return quarters(quarters(fours[0], fours[1]), quarters(fours[2], fours[3]));
#else
  F out;
  for (int i = 0; i < kLanes; ++i) {
    F lanes = v[i];
    for (int width = kLanes / 2; width > 0; width /= 2) {
      F upper = lanes;
      for (int lane = 0; lane < width; ++lane) upper[lane] = lanes[lane + width];
      lanes = op(lanes, upper);
    }
    out[i] = lanes[0];
  }
  return out;
#endif
}

// Lane i: v[0][i], v[1][i] ... added by the tree by which fold_lanes() adds lanes.
inline F add_registers(const F (&v)[kLanes]) {
#if defined(__AVX512F__)
  auto quarter = [&](int i) { return (v[i] + v[i + 2]) + (v[i + 1] + v[i + 3]); };
  return (quarter(0) + quarter(4)) + (quarter(8) + quarter(12));
#else
  F sums[kLanes];
  std::memcpy(sums, v, sizeof(sums));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
#endif
}

constexpr float kRound = 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number

// p * 2^n for whole n, down to 0 and up to infinity.
inline F scale_by_power(F p, F n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  // Two factors, for 2^n itself may not be a normal number.
  auto power = [](F whole) {
    return bitcast<F>((bitcast<U>(whole + kRound) << 23) + bitcast<uint32_t>(1.0f));
  };
  const F half = (n * 0.5f + kRound) - kRound;
  return p * power(half) * power(n - half);
#endif
}

// e^x to about one unit in the last place, for x up to 110; exactly 1 at 0 and 0 at minus infinity;
// NaN for NaN.
inline F exp_below(F x) {
  x = maximum(splat(-110.0f), x);
  F n = (x * 1.44269504f + kRound) - kRound;
  F r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return scale_by_power(p, n);
}

// The same to eighteen bits, for what is rounded to bf16.
inline F exp_coarse(F x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  constexpr int kBelow = 1;  // what is left above the next whole number below
  const F t = x * 1.44269504f, r = _mm512_reduce_ps(t, kBelow);
  F p = splat(0.01342671f);
  p = p * r + 0.05224243f;
  p = p * r + 0.24128023f;
  p = p * r + 0.69304484f;
  p = p * r + 1.0f;
  return _mm512_scalef_ps(p, t);
#else
  return exp_below(x);
#endif
}

inline F exp(F x) { return exp_below(minimum(splat(110.0f), x)); }

inline F tanh(F x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

}  // namespace jaxserve
