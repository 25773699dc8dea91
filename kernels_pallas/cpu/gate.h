// The gated pair of a feed-forward layer: act(x . gate) * (x . up).
#pragma once

#include "activation.h"
#include "dot.h"

namespace jaxserve {

template <class T>
struct GatedPair {
  Matrix<T> gate, up;
  Activation activation;

  GatedPair from_row(int64_t i) const { return {gate.from_row(i), up.from_row(i), activation}; }
};

constexpr int64_t kGateFloats = 8192;  // of either product: both stay in L2, beside both weights

// For whole tiles of columns of weights, which are turned. Few rows of x at a time: then a page of the
// output is written once and not with every tile.
template <class T>
void gate_by_turned(const Packed<T>& x, int64_t begin, int64_t end, const GatedPair<T>& pair,
                    int64_t cols, float* out, int64_t out_stride) {
  thread_local Scratch scratch;
  const Tiles tiles;
  const int64_t bytes = TurnedWeights<T>::bytes(x.k, cols), stride = Packed<T>::stride(x.k);
  const int64_t most = kPairRows * std::max<int64_t>(1, kGateFloats / (kPairRows * cols));
  scratch.reset(2 * (Scratch::bytes<char>(bytes) + Scratch::bytes<float>(most * cols)));
  const TurnedWeights<T> w_gate(scratch.take<char>(bytes), pair.gate.data, x.k, cols);
  const TurnedWeights<T> w_up(scratch.take<char>(bytes), pair.up.data, x.k, cols);
  float* gate = scratch.take<float>(most * cols);
  float* up = scratch.take<float>(most * cols);
  for (; begin < end; begin += most, out += most * out_stride) {
    const int64_t rows = std::min(most, end - begin);
    const RowScale* steps = x.scales + begin;
    w_gate.multiply(x.row(begin), stride, {gate, cols, rows, cols, steps, pair.gate.scales});
    w_up.multiply(x.row(begin), stride, {up, cols, rows, cols, steps, pair.up.scales});
    for (int64_t i = 0; i < rows; ++i) {
      apply_gate(pair.activation, gate + i * cols, up + i * cols, cols, out + i * out_stride);
    }
  }
}

// By tiles, few rows at a time, which stay in L1. Otherwise all rows share a panel of weights, and gates wait
// where the output will be.
template <class T>
void gate_by_blocks(const Packed<T>& x, int64_t begin, int64_t end, const GatedPair<T>& pair,
                    int64_t cols, float* out, int64_t out_stride) {
  thread_local Scratch scratch;
  const int64_t most = x.by_tiles() ? kPairRows : end - begin;
  scratch.reset(2 * Scratch::bytes<float>(most * cols));
  float* up = scratch.take<float>(most * cols);
  float* apart = x.by_tiles() ? scratch.take<float>(most * cols) : nullptr;
  for (; begin < end; begin += most, out += most * out_stride) {
    const int64_t rows = std::min(most, end - begin);
    float* gate = apart ? apart : out;
    const int64_t stride = apart ? cols : out_stride;
    dot_block(x, begin, begin + rows, pair.gate, cols, gate, stride);
    dot_block(x, begin, begin + rows, pair.up, cols, up, cols);
    for (int64_t i = 0; i < rows; ++i) {
      apply_gate(pair.activation, gate + i * stride, up + i * cols, cols, out + i * out_stride);
    }
  }
}

// out[r][c] for rows [begin, end) of x and the first `cols` rows of both weights.
template <class T>
void gate_block(const Packed<T>& x, int64_t begin, int64_t end, const GatedPair<T>& pair,
                int64_t cols, float* out, int64_t out_stride) {
  const int64_t whole = x.turns ? cols / kTileRows * kTileRows : 0;
  if (whole > 0) gate_by_turned(x, begin, end, pair, whole, out, out_stride);
  if (whole == cols) return;
  gate_by_blocks(x, begin, end, pair.from_row(whole), cols - whole, out + whole, out_stride);
}

}  // namespace jaxserve
