// RMSNorm of one row.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace jaxserve {

inline float sum_of_squares(const float* x, int64_t n) {
  F sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const F some = load<F>(x + i + j * kLanes);
      sums[j] += some * some;
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes, n - i) * int64_t(sizeof(float));
    const F some = load_partial<F>(x + i, left);
    sums[0] += some * some;
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void normalize(const float* __restrict x, const T* __restrict scale, float* __restrict y, int64_t n,
               float eps, float offset) {
  const float inverse = 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * inverse * (offset + to_float(scale[i]));
}

}  // namespace jaxserve
