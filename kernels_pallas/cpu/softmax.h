// Online softmax: rows of scores for one block of keys at a time.
#pragma once

#include <limits>
#include <type_traits>

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

inline F logits(F score, const Scores& how) {
  const F x = score * how.scale;
  return how.soft_cap == 0 ? x : how.soft_cap * tanh(x * (1.0f / how.soft_cap));
}

// Logits, minus infinity for keys outside [begin, end).
inline F visible(F x, F key, F begin, F end) {
  x = key >= begin ? x : splat(kMinusInfinity);
  return key < end ? x : splat(kMinusInfinity);
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
    F x = logits(load<F>(scores + i), how);
    if (i < seen.begin || i + kLanes > seen.end) {
      x = visible(x, lane_index() + float(i), splat(float(seen.begin)), splat(float(seen.end)));
    }
    store(scores + i, x);
    most = maximum(x, most);
  }
  return most;
}

// Exponentials of a row are taken relative to its base, a maximum of earlier blocks: what is
// accumulated need not shrink before scores rise above it by more than this (FlashAttention-4).
constexpr float kSlack = 8.0f;

// A new base for each lane, and by which factor what was accumulated shrinks.
struct Base {
  F now, shrink;

  Base(F before, F most)
      : now(most > before + kSlack ? most : before),
        shrink(before == now ? splat(1.0f) : exp(before - now)) {}

  // What to take off scores. Rows that have seen nothing have no base.
  F offset() const { return now == splat(kMinusInfinity) ? F{} : now; }
};

// e^x as a weight of T.
template <class T>
F weight_of(F x) {
  return std::is_same_v<T, bf16> ? exp_coarse(x) : exp_below(x);
}

// Bases and sums of exponentials of query rows, which go on in registers side by side.
struct Rows {
  float *base, *sum;

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
    const Base found(load<F>(base), fold_lanes(tops, [](F a, F b) { return maximum(a, b); }));
    const F offset = found.offset();
    for (int64_t r = 0; r < count; ++r) {
      totals[r] = weigh(scores + r * kBlockKeys, offset[r], weights + r * kBlockKeys);
    }
    const F total = fold_lanes(totals, [](F a, F b) { return a + b; });
    store(base, found.now);
    store(shrink, found.shrink);
    store(sum, load<F>(sum) * found.shrink + total);
  }

 private:
  // Exponentials of a row's scores; returns their sum, lane by lane.
  template <class T>
  static F weigh(const float* scores, float offset, T* weights) {
    F total{};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlockKeys; i += kLanes) {
      const F x = weight_of<T>(load<F>(scores + i) - offset);
      total += x;
      store_as(weights + i, x);
    }
    return total;
  }
};

// The same for kLanes rows, each of which has a lane of its own: scores are [keys][kLanes].
struct Columns {
  float *base, *sum;

  // As Rows::add(), bit for bit, for the first `keys` of a block, whole registers of them; null is
  // `seen` where rows see them all.
  // Exponentials become words of two keys each. Returns what is `shrink` there.
  F add(const Span* seen, int64_t keys, const Scores& how, float* scores, bf16* weights) const {
    const Base found(load<F>(base), show(seen, keys, how, scores));
    const F total = weigh(scores, keys, found.offset(), weights);
    store(base, found.now);
    store(sum, load<F>(sum) * found.shrink + total);
    return found.shrink;
  }

 private:
  // Scores become what is visible of them; returns their maxima.
  static F show(const Span* seen, int64_t keys, const Scores& how, float* scores) {
    F begin, end;
    for (int i = 0; seen && i < kLanes; ++i) {
      begin[i] = float(seen[i].begin);
      end[i] = float(seen[i].end);
    }
    constexpr int kChains = 4;  // a maximum takes longer than all the rest
    F tops[kChains];
    std::fill(tops, tops + kChains, splat(kMinusInfinity));
    for (int64_t key = 0; key < keys; key += kChains) {
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i, scores += kLanes) {
        F x = logits(load<F>(scores), how);
        if (seen) x = visible(x, splat(float(key + i)), begin, end);
        store(scores, x);
        tops[i] = maximum(x, tops[i]);
      }
    }
    return maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]));
  }

  // Exponentials of all scores; returns their sums, as lanes of a row add up.
  static F weigh(const float* scores, int64_t keys, F offset, bf16* weights) {
    F totals[kLanes];
    for (int64_t i = 0; i < kLanes; i += 2) {
      F low{}, high{};
      for (int64_t key = i; key < keys; key += kLanes) {
        const F x = weight_of<bf16>(load<F>(scores + key * kLanes) - offset);
        const F y = weight_of<bf16>(load<F>(scores + (key + 1) * kLanes) - offset);
        low += x;
        high += y;
        store(weights + key * kLanes, join_bf16(x, y));
      }
      totals[i] = low;
      totals[i + 1] = high;
    }
    return add_registers(totals);
  }
};

// What has become of a row.
struct Row {
  float base, sum;

  // One more logit in the denominator that no value belongs to; returns the factor by which what
  // was accumulated must shrink.
  float add_sink(float logit) {
    const float before = base;
    base = std::max(before, logit);
    const float shrink = before == kMinusInfinity ? 0.0f : exp(before - base);
    sum = sum * shrink + exp(logit - base);
    return shrink;
  }

  float log_sum() const { return sum == 0 ? kMinusInfinity : base + std::log(sum); }
};

}  // namespace jaxserve
