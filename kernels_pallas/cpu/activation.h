// The activations of gated feed-forward layers.
#pragma once

#include <string_view>

#include "simd.h"

namespace jaxserve {

enum class Activation { kSilu, kGeluTanh };

inline Activation activation_of(std::string_view name) {
  return name == "gelu_tanh" ? Activation::kGeluTanh : Activation::kSilu;
}

// Both are x * sigmoid(something): gelu's 0.5 (1 + tanh u) is sigmoid(2u).
inline F activate(Activation kind, F x) {
  F u = x;
  if (kind == Activation::kGeluTanh) u = 1.5957691216f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp(-u));
}

// to[i] = act(gate[i]) * up[i]
inline void apply_gate(Activation kind, const float* gate, const float* up, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(to + i, activate(kind, load<F>(gate + i)) * load<F>(up + i));
  }
  if (i == n) return;
  const int64_t bytes = (n - i) * int64_t(sizeof(float));
  F y = activate(kind, load_partial<F>(gate + i, bytes)) * load_partial<F>(up + i, bytes);
  std::memcpy(to + i, &y, bytes);
}

}  // namespace jaxserve
