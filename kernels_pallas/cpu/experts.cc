// The feed-forward layer of a mixture of experts: every expert multiplies only its own tokens.

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "activation.h"
#include "buffers.h"
#include "pack.h"
#include "scratch.h"

namespace jaxserve {
namespace {

// Tokens' slots (token * A + a) sorted by expert: expert e owns order[starts[e] .. starts[e + 1]).
struct Grouping {
  std::vector<int64_t> starts, order;
  std::vector<int64_t> rank;  // of each slot in `order`; -1: the slot names no expert

  Grouping(const int32_t* ids, int64_t num_slots, int64_t num_experts)
      : starts(num_experts + 1), rank(num_slots, -1) {
    auto valid = [&](int64_t slot) { return ids[slot] >= 0 && ids[slot] < num_experts; };
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (valid(slot)) ++starts[ids[slot] + 1];
    }
    for (int64_t e = 0; e < num_experts; ++e) starts[e + 1] += starts[e];
    order.resize(starts[num_experts]);
    std::vector<int64_t> next = starts;
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (!valid(slot)) continue;
      rank[slot] = next[ids[slot]]++;
      order[rank[slot]] = slot;
    }
  }
  int64_t num_experts() const { return int64_t(starts.size()) - 1; }
  int64_t size() const { return int64_t(order.size()); }
  int64_t size(int64_t expert) const { return starts[expert + 1] - starts[expert]; }
};

constexpr int64_t kRowsPerChunk = 288;  // a chunk's gate and up (288 KiB) stay in L2

// Of chunks of one expert's rows, all of about a size.
int64_t chunk_rows(int64_t num_rows) {
  const int64_t count = std::max<int64_t>(1, ceil_div(num_rows, kRowsPerChunk));
  return std::min(kRowsPerChunk, round_up(ceil_div(num_rows, count), kTileRows));
}

// Some of one expert's rows times some columns of its weights.
struct Chunk {
  int64_t expert, begin, end, first_col, num_cols;
};

std::vector<Chunk> cut(const Grouping& groups, int64_t cols, int64_t width) {
  std::vector<Chunk> chunks;
  for (int64_t e = 0; e < groups.num_experts(); ++e) {
    for (int64_t c = 0; c < cols; c += width) {
      const int64_t rows = chunk_rows(groups.size(e));
      for (int64_t r = 0; r < groups.size(e); r += rows) {
        chunks.push_back({e, r, std::min(groups.size(e), r + rows), c, std::min(width, cols - c)});
      }
    }
  }
  return chunks;
}

template <class T>
struct Experts {
  Matrix<T> w_gate, w_up, w_down;  // [E * F, D], [E * F, D], [E * D, F]
  int64_t num_experts, mlp, embed, num_active;
  Activation activation;
};

// The rows of all experts, one after the other; each expert's rows are packed by themselves.
template <class T>
struct PackedGroups {
  int64_t k;
  T* data;
  RowScale* scales;
  char* tiles;

  PackedGroups(Scratch& scratch, const Grouping& groups, int64_t k)
      : k(k),
        data(scratch.take<T>(Packed<T>::count(groups.size(), k))),
        scales(scratch.take<RowScale>(groups.size())),
        tiles(scratch.take<char>(tile_bytes(groups, groups.num_experts(), k))) {}

  static int64_t bytes(const Grouping& groups, int64_t k) {
    return Scratch::bytes<T>(Packed<T>::count(groups.size(), k)) +
           Scratch::bytes<RowScale>(groups.size()) +
           Scratch::bytes<char>(tile_bytes(groups, groups.num_experts(), k));
  }

  Packed<T> of(const Grouping& groups, int64_t expert) const {
    const int64_t first = groups.starts[expert], size = groups.size(expert);
    const bool by_tiles = Packed<T>::by_tiles(size, k);
    const bool turns = by_tiles && TurnedWeights<T>::pay(chunk_rows(size), k);
    return {data + first * Packed<T>::stride(k),
            size,
            k,
            scales + first,
            by_tiles && !turns ? tiles + tile_bytes(groups, expert, k) : nullptr,
            turns};
  }

 private:
  // Room for the groups of sixteen rows that the experts before this one have, or more.
  static int64_t tile_bytes(const Grouping& groups, int64_t expert, int64_t k) {
    if (!Packed<T>::by_tiles(groups.size(), k)) return 0;
    const int64_t rows = groups.starts[expert];
    return Packed<T>::groups_bytes(rows / kTileRows + std::min(rows, expert), k);
  }
};

// row_of(i) is the address of what becomes row i of all.
template <class T, class RowOf>
void pack_groups(const Grouping& groups, const PackedGroups<T>& to, const RowOf& row_of) {
  const auto chunks = cut(groups, 1, 1);
  Pool::shared().run(int64_t(chunks.size()), [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const Packed<T> packed = to.of(groups, chunk.expert);
    const int64_t first = groups.starts[chunk.expert];
    for (int64_t r = chunk.begin; r < chunk.end; ++r) {
      const auto* row = row_of(first + r);
      if (r + 1 < chunk.end) fetch(row_of(first + r + 1), to.k * int64_t(sizeof(*row)));
      packed.put(r, 0, row, to.k);
    }
    packed.regroup(chunk.begin, chunk.end);
  });
}

// hidden = act(x @ w_gate.T) * (x @ w_up.T)
//
// Rows of eight bits need their largest value before their first can be written, so they wait in
// `floats` [slots, F] until all of it is there.
template <class T>
void expand(const Experts<T>& moe, const Grouping& groups, const PackedGroups<T>& x,
            const PackedGroups<T>& hidden, float* floats) {
  constexpr int64_t kWidth = 2 * kPanelCols;
  const auto chunks = cut(groups, moe.mlp, kWidth);
  Pool::shared().run(int64_t(chunks.size()), [&](int64_t i) {
    thread_local float gate[kRowsPerChunk * kWidth], up[kRowsPerChunk * kWidth];
    const auto [e, begin, end, first, cols] = chunks[i];
    const int64_t weight = e * moe.mlp + first;
    const Packed<T> rows = x.of(groups, e), out = hidden.of(groups, e);
    dot_block(rows, begin, end, moe.w_gate.from_row(weight), cols, gate, kWidth);
    dot_block(rows, begin, end, moe.w_up.from_row(weight), cols, up, kWidth);
    for (int64_t r = 0; r < end - begin; ++r) {
      float* row = gate + r * kWidth;
      if constexpr (kIsInt8<T>) row = floats + (groups.starts[e] + begin + r) * moe.mlp + first;
      apply_gate(moe.activation, gate + r * kWidth, up + r * kWidth, cols, row);
      if constexpr (!kIsInt8<T>) out.put(begin + r, first, row, cols);
    }
  });
  if constexpr (kIsInt8<T>) {
    pack_groups(groups, hidden, [&](int64_t i) { return floats + i * moe.mlp; });
  } else if (Packed<T>::by_tiles(groups.size(), moe.mlp)) {
    Pool::shared().run(moe.num_experts, [&](int64_t e) {
      hidden.of(groups, e).regroup(0, groups.size(e));
    });
  }
}

// y[rank] = hidden[rank] @ w_down.T
template <class T>
void contract(const Experts<T>& moe, const Grouping& groups, const PackedGroups<T>& hidden,
              float* y) {
  const auto chunks = cut(groups, moe.embed, 2 * kPanelCols);
  Pool::shared().run(int64_t(chunks.size()), [&](int64_t i) {
    const auto [e, begin, end, first, cols] = chunks[i];
    dot_block(hidden.of(groups, e), begin, end, moe.w_down.from_row(e * moe.embed + first), cols,
              y + (groups.starts[e] + begin) * moe.embed + first, moe.embed);
  });
}

// out[token] = the weighted sum over its slots, always in the order of the slots.
void combine(const Grouping& groups, const float* weights, int64_t num_active, const float* y,
             int64_t num_rows, int64_t embed, float* out) {
  const int64_t rows = rows_per_chunk(16 * 1024, embed);
  Pool::shared().run(ceil_div(num_rows, rows), [&](int64_t chunk) {
    for (int64_t t = chunk * rows; t < std::min(num_rows, (chunk + 1) * rows); ++t) {
      float* to = out + t * embed;
      std::memset(to, 0, embed * sizeof(float));
      for (int64_t slot = t * num_active; slot < (t + 1) * num_active; ++slot) {
        if (groups.rank[slot] < 0) continue;
        const float* from = y + groups.rank[slot] * embed;
        if (slot + 1 < num_rows * num_active && groups.rank[slot + 1] >= 0) {
          fetch(y + groups.rank[slot + 1] * embed, embed * int64_t(sizeof(float)));
        }
        for (int64_t j = 0; j < embed; ++j) to[j] += weights[slot] * from[j];
      }
    }
  });
}

template <class T, class X>
void forward(const Experts<T>& moe, const X* x, const int32_t* ids, const float* weights,
             int64_t num_rows, float* out) {
  const SharedScratch lent;
  Scratch& scratch = *lent;
  const Grouping groups(ids, num_rows * moe.num_active, moe.num_experts);
  const int64_t slots = groups.size(), waiting = kIsInt8<T> ? slots * moe.mlp : 0;
  scratch.reset(PackedGroups<T>::bytes(groups, moe.embed) +
                PackedGroups<T>::bytes(groups, moe.mlp) +
                Scratch::bytes<float>(slots * moe.embed) + Scratch::bytes<float>(waiting));
  const PackedGroups<T> rows(scratch, groups, moe.embed), hidden(scratch, groups, moe.mlp);
  float* y = scratch.take<float>(slots * moe.embed);
  float* floats = scratch.take<float>(waiting);
  pack_groups(groups, rows, [&](int64_t i) {
    return x + groups.order[i] / moe.num_active * moe.embed;
  });
  expand(moe, groups, rows, hidden, floats);
  contract(moe, groups, hidden, y);
  combine(groups, weights, moe.num_active, y, num_rows, moe.embed, out);
}

// The rows of all experts, one matrix after the other; [E, N] or [L, E, N] are scales of int8.
template <class T>
ffi::ErrorOr<Matrix<T>> matrices(ffi::AnyBuffer weight, ffi::RemainingArgs scales, size_t i,
                                 Scalar layer) {
  auto [dims, offset] = slice(weight, layer, 3);
  const float* found = nullptr;
  if constexpr (kIsInt8<T>) {
    auto scale = scales.get<Floats>(i);
    if (scale.has_error()) return ffi::Unexpected(scale.error());
    auto [scale_dims, scale_offset] = slice(*scale, layer, 2);
    if (scale_dims[0] != dims[0] || scale_dims[1] != dims[1]) {
      return ffi::Unexpected(ffi::Error::InvalidArgument("scales must be [E, N] or [L, E, N]"));
    }
    found = scale->typed_data() + scale_offset;
  }
  return Matrix<T>{static_cast<T*>(weight.untyped_data()) + offset, found, dims[2]};
}

bool same(ffi::AnyBuffer::Dimensions a, std::initializer_list<int64_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// Whether all that is read is there.
ffi::Error check(ffi::AnyBuffer x, Ints ids, Floats weights, Scalar layer, ffi::AnyBuffer w_gate,
                 ffi::AnyBuffer w_up, ffi::AnyBuffer w_down) {
  const auto route = ids.dimensions(), gate = slice(w_gate, layer, 3).dims;
  const auto up = slice(w_up, layer, 3).dims, down = slice(w_down, layer, 3).dims;
  const int64_t tokens = x.dimensions()[0], embed = x.dimensions()[1];
  if (route[0] != tokens || !same(weights.dimensions(), {tokens, route[1]})) {
    return ffi::Error::InvalidArgument("ids and weights must be [T, A], one row for each of x " +
                                       text(x.dimensions()) + ", not " + text(route) + " and " +
                                       text(weights.dimensions()));
  }
  const bool fit = gate.size() == 3 && gate[2] == embed && same(up, {gate[0], gate[1], embed}) &&
                   same(down, {gate[0], embed, gate[1]});
  const auto bytes = ffi::ByteWidth(w_gate.element_type());
  if (!fit || ffi::ByteWidth(w_up.element_type()) != bytes ||
      ffi::ByteWidth(w_down.element_type()) != bytes) {
    return ffi::Error::InvalidArgument(
        "w_gate and w_up must be [E, F, D], w_down [E, D, F], all of one dtype, for x " +
        text(x.dimensions()) + ", not " + text(gate) + ", " + text(up) + " and " + text(down));
  }
  return ffi::Error::Success();
}

ffi::Error experts(ffi::AnyBuffer x, Ints ids, Floats weights, Scalar num_rows, Scalar layer,
                   ffi::AnyBuffer w_gate, ffi::AnyBuffer w_up, ffi::AnyBuffer w_down,
                   ffi::RemainingArgs scales, FloatsOut out, std::string_view activation) {
  if (auto error = check(x, ids, weights, layer, w_gate, w_up, w_down); error.failure()) {
    return error;
  }
  const int64_t all_rows = x.dimensions()[0], embed = x.dimensions()[1];
  const int64_t rows = std::clamp<int64_t>(value(num_rows), 0, all_rows);
  const int64_t active = ids.dimensions()[1];
  const auto dims = slice(w_gate, layer, 3).dims;
  float* y = out->typed_data();
  std::memset(y + rows * embed, 0, (all_rows - rows) * embed * sizeof(float));
  return visit_weights(w_gate, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    auto gate = matrices<T>(w_gate, scales, 0, layer), up = matrices<T>(w_up, scales, 1, layer);
    auto down = matrices<T>(w_down, scales, 2, layer);
    if (gate.has_error()) return gate.error();
    if (up.has_error()) return up.error();
    if (down.has_error()) return down.error();
    const Experts<T> moe{*gate, *up, *down, dims[0], dims[1], embed, active,
                         activation_of(activation)};
    return visit(x, [&](auto* from) {
      for (int64_t first = 0; first < rows; first += kRowsPerPass) {
        forward(moe, from + first * embed, ids.typed_data() + first * active,
                weights.typed_data() + first * active, std::min(kRowsPerPass, rows - first),
                y + first * embed);
      }
      return ffi::Error::Success();
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_experts, guarded<experts>,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<Ints>()            // ids
                                  .Arg<Floats>()          // weights
                                  .Arg<Scalar>()          // num_rows
                                  .Arg<Scalar>()          // layer
                                  .Arg<ffi::AnyBuffer>()  // w_gate
                                  .Arg<ffi::AnyBuffer>()  // w_up
                                  .Arg<ffi::AnyBuffer>()  // w_down
                                  .RemainingArgs()        // scales of the three
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("activation"));

}  // namespace jaxserve
