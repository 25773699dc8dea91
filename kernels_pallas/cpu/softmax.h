// Online softmax: rows of scores for one block of keys at a time.
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
  if (how.soft_cap != 0) x = how.soft_cap * tanh(x * (1.0f / how.soft_cap));
  if (key >= begin && key + kLanes <= end) return x;
  F index = lane_index() + float(key);
  x = index >= float(begin) ? x : splat(kMinusInfinity);
  return index < float(end) ? x : splat(kMinusInfinity);
}

// Keys of a block that a row sees.
struct Span {
  int64_t begin, end;
};

// Scores of a row become what is visible of them; returns their maximum, lane by lane.
inline F show(float* scores, const Span& seen, const Scores& how) {
  F most = splat(kMinusInfinity);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kBlockKeys; i += kLanes) {
    const F x = visible(load<F>(scores + i), i, seen.begin, seen.end, how);
    store(scores + i, x);
    most = maximum(x, most);
  }
  return most;
}

// Running maxima and sums of exponentials of query rows, which go on in registers side by side.
struct Rows {
  float *most, *sum;

  // One block of keys for the first `count` rows, at most kLanes of them. Exponentials of their
  // scores become `weights`, and `shrink` factors by which everything accumulated so far must
  // shrink. A block with no visible key changes nothing, bit for bit; a visible score that is NaN,
  // or plus infinity, makes the sum NaN. Up to kLanes rows are written, the others as they were.
  template <class T>
  void add(const Span* seen, int64_t count, const Scores& how, float* scores, T* weights,
           float* shrink) const {
    F tops[kLanes], totals[kLanes];
    std::fill(tops + count, tops + kLanes, splat(kMinusInfinity));
    std::fill(totals + count, totals + kLanes, F{});
    for (int64_t r = 0; r < count; ++r) tops[r] = show(scores + r * kBlockKeys, seen[r], how);
    const F before = load<F>(most);
    const F now = maximum(fold_lanes(tops, [](F a, F b) { return maximum(a, b); }), before);
    const F base = now == splat(kMinusInfinity) ? F{} : now;
    const F factors = before == now ? splat(1.0f) : exp(before - now);
    for (int64_t r = 0; r < count; ++r) {
      totals[r] = weigh(scores + r * kBlockKeys, base[r], weights + r * kBlockKeys);
    }
    const F total = fold_lanes(totals, [](F a, F b) { return a + b; });
    store(most, now);
    store(shrink, factors);
    store(sum, load<F>(sum) * factors + total);
  }

 private:
  // Exponentials of a row's scores; returns their sum, lane by lane.
  template <class T>
  static F weigh(const float* scores, float base, T* weights) {
    F total{};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlockKeys; i += kLanes) {
      const F x = exp_below(load<F>(scores + i) - base);
      total += x;
      store_as(weights + i, x);
    }
    return total;
  }
};

// What has become of a row.
struct Row {
  float most, sum;

  // One more logit in the denominator that no value belongs to; returns the factor by which what
  // was accumulated must shrink.
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
