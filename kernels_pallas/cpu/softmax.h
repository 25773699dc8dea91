// Online softmax: one row of scores for one block of keys at a time.
#pragma once

#include <limits>

#include "pages.h"

namespace jaxserve {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Scores {
  float scale;
  float soft_cap;  // 0: none
};

inline float exp(float x) { return exp(splat(x))[0]; }

inline F lane_index() {
  F index;
  for (int i = 0; i < kLanes; ++i) index[i] = float(i);
  return index;
}

// Scaled, capped scores, minus infinity outside keys [begin, end).
inline F visible(F score, int64_t key, int64_t begin, int64_t end, const Scores& how) {
  F x = score * how.scale;
  if (how.soft_cap > 0) x = how.soft_cap * tanh(x * (1.0f / how.soft_cap));
  if (key >= begin && key + kLanes <= end) return x;
  F index = lane_index() + float(key);
  x = index >= float(begin) ? x : splat(kMinusInfinity);
  return index < float(end) ? x : splat(kMinusInfinity);
}

// Running maximum and sum of exponentials of one query row.
struct Row {
  float most = kMinusInfinity;
  float sum = 0;

  // Exponentials of scores become `weights`; returns the factor by which everything accumulated so
  // far must shrink. A block with no visible key changes nothing, bit for bit; a visible score that
  // is NaN, or plus infinity, makes the sum NaN.
  template <class T>
  float add(const float* scores, int64_t begin, int64_t end, const Scores& how, T* weights) {
    constexpr int kCount = kBlockKeys / kLanes;
    F x[kCount], best = splat(kMinusInfinity);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      x[i] = visible(load<F>(scores + i * kLanes), i * kLanes, begin, end, how);
      best = maximum(x[i], best);
    }
    const float before = most;
    most = std::max(before, max_lanes(best));
    const float base = most == kMinusInfinity ? 0.0f : most;
    F total{};
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      x[i] = exp(x[i] - base);
      total += x[i];
      store_as(weights + i * kLanes, x[i]);
    }
    const float shrink = before == most ? 1.0f : exp(before - most);
    sum = sum * shrink + sum_lanes(total);
    return shrink;
  }

  // One more logit in the denominator that no value belongs to; returns the factor as add() does.
  float add_sink(float logit) {
    const float before = most;
    most = std::max(before, logit);
    const float shrink = before == kMinusInfinity ? 0.0f : exp(before - most);
    sum = sum * shrink + exp(logit - most);
    return shrink;
  }

  float log_sum() const { return sum == 0 ? kMinusInfinity : most + std::log(sum); }
};

}  // namespace jaxserve
