// Linear layers that share one x, and the gated pair of a feed-forward layer.

#include <vector>

#include "buffers.h"
#include "gate.h"
#include "pack.h"
#include "scratch.h"

namespace jaxserve {
namespace {

// Columns of one weight that one chunk computes for some rows.
template <class T>
struct Piece {
  Matrix<T> weight;  // from its first row on
  Matrix<T> up;      // the paired rows of w_up, or nothing
  float* out;       // row 0, first column of the piece
  int64_t out_stride;
  int64_t num_cols;
  bool onto;  // what is there
};

template <class T>
void cut(std::vector<Piece<T>>* pieces, Matrix<T> weight, Matrix<T> up, float* out,
         int64_t num_cols, int64_t width, bool onto = false) {
  for (int64_t c = 0; c < num_cols; c += width) {
    pieces->push_back({weight.from_row(c), up.data ? up.from_row(c) : up, out + c, num_cols,
                       std::min(width, num_cols - c), onto});
  }
}

// All pieces for the packed rows, which are rows [first, ...) of the outputs.
template <class T>
void multiply(const Packed<T>& x, int64_t first, const std::vector<Piece<T>>& pieces,
              Activation activation) {
  const int64_t height = chunk_rows<T>(x.num_rows, x.k, int64_t(pieces.size()));
  const int64_t slabs = ceil_div(x.num_rows, height);
  Pool::shared().run(int64_t(pieces.size()) * slabs, [&](int64_t chunk) {
    const Piece<T>& piece = pieces[chunk / slabs];
    const int64_t begin = chunk % slabs * height;
    const int64_t end = std::min(x.num_rows, begin + height);
    float* out = piece.out + (first + begin) * piece.out_stride;
    if (piece.up.data) {
      gate_block(x, begin, end, {piece.weight, piece.up, activation}, piece.num_cols, out,
                 piece.out_stride);
    } else if (piece.onto) {
      add_block(x, begin, end, piece.weight, piece.num_cols, out, piece.out_stride);
    } else {
      dot_block(x, begin, end, piece.weight, piece.num_cols, out, piece.out_stride);
    }
  });
}

template <class T, class X>
void multiply_all(const X* x, int64_t num_rows, int64_t k, const std::vector<Piece<T>>& pieces,
                  Activation activation = Activation::kSilu) {
  const SharedScratch lent;
  Scratch& scratch = *lent;
  for (int64_t first = 0; first < num_rows; first += kRowsPerPass) {
    const int64_t rows = std::min(kRowsPerPass, num_rows - first);
    const int64_t count = Packed<T>::count(rows, k);
    const int64_t height = chunk_rows<T>(rows, k, int64_t(pieces.size()));
    const bool tiles = Packed<T>::by_tiles(rows, k);
    const bool turns = tiles && TurnedWeights<T>::pay(std::min(rows, height), k);
    const bool grouped = tiles && !turns;
    const int64_t bytes = grouped ? Packed<T>::groups_bytes(ceil_div(rows, kTileRows), k) : 0;
    scratch.reset(Scratch::bytes<T>(count) + Scratch::bytes<RowScale>(rows) +
                  Scratch::bytes<char>(bytes));
    const Packed<T> packed{scratch.take<T>(count), rows, k, scratch.take<RowScale>(rows),
                           grouped ? scratch.take<char>(bytes) : nullptr, turns};
    pack_rows(packed, [&](int64_t i) { return x + (first + i) * k; });
    multiply(packed, first, pieces, activation);
  }
}

void zero_padding(float* out, int64_t num_rows, int64_t all_rows, int64_t cols) {
  std::memset(out + num_rows * cols, 0, (all_rows - num_rows) * cols * sizeof(float));
}

ffi::Error bad_shapes() {
  return ffi::Error::InvalidArgument(
      "weights must be [N, K] or [L, N, K], all of one dtype; those of int8 with scales [N] or "
      "[L, N] behind them");
}

// Whether rows of a product are as long as its weight has outputs.
bool fits(ffi::Buffer<ffi::F32> out, int64_t num_rows, int64_t cols) {
  return int64_t(out.element_count()) == num_rows * cols;
}

ffi::Error bad_size(ffi::Buffer<ffi::F32> out, int64_t num_rows, int64_t cols) {
  return ffi::Error::InvalidArgument("products of " + std::to_string(num_rows) + " rows and " +
                                     std::to_string(cols) + " outputs do not fit a result " +
                                     text(out.dimensions()));
}

// Weight i of several, whose scales follow all of them if they are of eight bits.
template <class T>
ffi::ErrorOr<Matrix<T>> matrix(ffi::RemainingArgs args, size_t i, size_t count, Scalar layer,
                               int64_t k) {
  auto weight = *args.get<ffi::AnyBuffer>(i);
  auto [dims, offset] = slice(weight, layer, 2);
  if (dims[1] != k || ffi::ByteWidth(weight.element_type()) != sizeof(T)) {
    return ffi::Unexpected(bad_shapes());
  }
  const float* scales = nullptr;
  if constexpr (kIsInt8<T>) {
    auto found = args.get<Floats>(count + i);
    if (found.has_error()) return ffi::Unexpected(found.error());
    auto [scale_dims, scale_offset] = slice(*found, layer, 1);
    if (scale_dims[0] != dims[0]) return ffi::Unexpected(bad_shapes());
    scales = found->typed_data() + scale_offset;
  }
  return Matrix<T>{static_cast<T*>(weight.untyped_data()) + offset, scales, k};
}

ffi::Error linear(ffi::AnyBuffer x, Scalar num_rows, Scalar layer, ffi::RemainingArgs weights,
                  ffi::RemainingRets outs) {
  const int64_t all_rows = x.dimensions()[0], k = x.dimensions()[1];
  const int64_t rows = std::clamp<int64_t>(value(num_rows), 0, all_rows);
  auto first = weights.get<ffi::AnyBuffer>(0);
  if (first.has_error()) return first.error();
  return visit_weights(*first, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    std::vector<Piece<T>> pieces;
    auto cols_of = [&](size_t i) {
      return slice(*weights.get<ffi::AnyBuffer>(i), layer, 2).dims[0];
    };
    int64_t all_cols = 0;
    for (size_t i = 0; i < outs.size(); ++i) all_cols += cols_of(i);
    for (size_t i = 0; i < outs.size(); ++i) {
      auto weight = matrix<T>(weights, i, outs.size(), layer, k);
      if (weight.has_error()) return weight.error();
      auto out = *outs.get<ffi::Buffer<ffi::F32>>(i);
      const int64_t cols = cols_of(i);
      if (!fits(*out, all_rows, cols)) return bad_size(*out, all_rows, cols);
      zero_padding(out->typed_data(), rows, all_rows, cols);
      cut<T>(&pieces, *weight, {}, out->typed_data(), cols, chunk_cols(all_cols));
    }
    return visit(x, [&](auto* from) {
      multiply_all<T>(from, rows, k, pieces);
      return ffi::Error::Success();
    });
  });
}

ffi::Error add_linear(ffi::AnyBuffer x, Scalar num_rows, Scalar layer, Floats,
                      ffi::RemainingArgs weights, FloatsOut out) {
  const int64_t all_rows = x.dimensions()[0], k = x.dimensions()[1];
  const int64_t rows = std::clamp<int64_t>(value(num_rows), 0, all_rows);
  auto first = weights.get<ffi::AnyBuffer>(0);
  if (first.has_error()) return first.error();
  const int64_t cols = slice(*first, layer, 2).dims[0];  // the result may have several axes of them
  if (!fits(*out, all_rows, cols)) return bad_size(*out, all_rows, cols);
  return visit_weights(*first, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    auto weight = matrix<T>(weights, 0, 1, layer, k);
    if (weight.has_error()) return weight.error();
    std::vector<Piece<T>> pieces;
    cut<T>(&pieces, *weight, {}, out->typed_data(), cols, chunk_cols(cols), true);
    return visit(x, [&](auto* from) {
      multiply_all<T>(from, rows, k, pieces);
      return ffi::Error::Success();
    });
  });
}

ffi::Error gated_linear(ffi::AnyBuffer x, Scalar num_rows, Scalar layer, ffi::RemainingArgs weights,
                        FloatsOut out, std::string_view activation) {
  const int64_t all_rows = x.dimensions()[0], k = x.dimensions()[1];
  const int64_t rows = std::clamp<int64_t>(value(num_rows), 0, all_rows);
  const int64_t cols = out->dimensions()[1];
  zero_padding(out->typed_data(), rows, all_rows, cols);
  auto first = weights.get<ffi::AnyBuffer>(0);
  if (first.has_error()) return first.error();
  for (size_t i = 0; i < 2; ++i) {
    auto weight = weights.get<ffi::AnyBuffer>(i);
    if (weight.has_error()) return weight.error();
    const int64_t outputs = slice(*weight, layer, 2).dims[0];
    if (!fits(*out, all_rows, outputs)) return bad_size(*out, all_rows, outputs);
  }
  return visit_weights(*first, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    auto gate = matrix<T>(weights, 0, 2, layer, k), up = matrix<T>(weights, 1, 2, layer, k);
    if (gate.has_error()) return gate.error();
    if (up.has_error()) return up.error();
    std::vector<Piece<T>> pieces;
    cut<T>(&pieces, *gate, *up, out->typed_data(), cols, chunk_cols(cols));
    return visit(x, [&](auto* from) {
      multiply_all<T>(from, rows, k, pieces, activation_of(activation));
      return ffi::Error::Success();
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_linear, guarded<linear>,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<Scalar>()          // num_rows
                                  .Arg<Scalar>()          // layer
                                  .RemainingArgs()        // weights, and scales of int8 ones
                                  .RemainingRets());      // one for each weight

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_add_linear, guarded<add_linear>,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Scalar>()
                                  .Arg<Scalar>()
                                  .Arg<Floats>()  // aliased to the result
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_gated_linear, guarded<gated_linear>,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Scalar>()
                                  .Arg<Scalar>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("activation"));

}  // namespace jaxserve
