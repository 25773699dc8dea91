// The largest entry of each row of scores, and where it first occurs.

#include <limits>
#include <vector>

#include "buffers.h"
#include "pack.h"

namespace jaxserve {
namespace {

struct Best {
  float top = -std::numeric_limits<float>::infinity();
  int32_t id = 0;
};

// Of x[begin, end). A NaN makes the top NaN. Two passes, the second of which ends early.
Best best_of(const float* x, int64_t begin, int64_t end) {
  F most = splat(-std::numeric_limits<float>::infinity()), poison{};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const F v = load<F>(x + i);
    most = maximum(v, most);
    poison += v - v;  // 0, or NaN for NaN and infinity
  }
  float top = max_lanes(most);
  const float sick = sum_lanes(poison);
  for (int64_t j = i; j < end; ++j) top = x[j] > top ? x[j] : top;
  if (sick != sick) {
    for (int64_t j = begin; j < end; ++j) {
      if (x[j] != x[j]) return {x[j], int32_t(j)};
    }
  }
  for (int64_t j = i; j < end; ++j) {
    if (x[j] != x[j]) return {x[j], int32_t(j)};
  }
  for (int64_t j = begin; j < end; ++j) {
    if (x[j] == top) return {top, int32_t(j)};
  }
  return {top, int32_t(begin)};
}

ffi::Error argmax(Floats x, Scalar num_rows, ffi::Result<ffi::Buffer<ffi::S32>> ids,
                  FloatsOut tops) {
  constexpr int64_t kPart = 16 * 1024;
  const int64_t all_rows = x.dimensions()[0], n = x.dimensions()[1];
  const int64_t rows = std::clamp<int64_t>(value(num_rows), 0, all_rows);
  const int64_t parts = ceil_div(n, kPart);
  std::vector<Best> found(rows * parts);
  Pool::shared().run(rows * parts, [&](int64_t chunk) {
    const int64_t row = chunk / parts, begin = chunk % parts * kPart;
    found[chunk] = best_of(x.typed_data() + row * n, begin, std::min(n, begin + kPart));
  });
  for (int64_t row = 0; row < all_rows; ++row) {
    Best best;
    for (int64_t part = 0; row < rows && part < parts; ++part) {
      const Best& other = found[row * parts + part];
      if (other.top > best.top || other.top != other.top || part == 0) best = other;
      if (best.top != best.top) break;
    }
    ids->typed_data()[row] = best.id;
    tops->typed_data()[row] = row < rows ? best.top : 0.0f;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_argmax, guarded<argmax>,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Scalar>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace jaxserve
