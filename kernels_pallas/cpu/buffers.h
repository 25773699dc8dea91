// What the handlers share at the border with XLA: dtypes, stacked weights, scalars.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {

namespace ffi = xla::ffi;
using Scalar = ffi::Buffer<ffi::S32, 0>;
using Ints = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;
using FloatsOut = ffi::Result<ffi::Buffer<ffi::F32>>;

// A handler that answers with an error, of which working memory that is not there is the likeliest:
// XLA knows no exceptions.
template <auto handler>
struct Guard;

template <class... Args, ffi::Error (*handler)(Args...)>
struct Guard<handler> {
  static ffi::Error call(Args... args) {
    try {
      return handler(args...);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                        "no memory for what a CPU kernel works in; give the process more, or the "
                        "engine a smaller memory_utilization");
    } catch (const std::exception& error) {
      return ffi::Error::Internal(std::string("a CPU kernel failed: ") + error.what());
    }
  }
};

template <auto handler>
constexpr auto guarded = &Guard<handler>::call;

inline int64_t value(Scalar s) { return s.typed_data()[0]; }

// "[2, 3]", for errors.
inline std::string text(ffi::AnyBuffer::Dimensions dims) {
  std::string all;
  for (const int64_t n : dims) all += (all.empty() ? "" : ", ") + std::to_string(n);
  return "[" + all + "]";
}

// Calls fn(T*) with the element type of an array: float, or bf16 (which may be stored as uint16).
template <class Fn>
ffi::Error visit(ffi::AnyBuffer array, const Fn& fn) {
  switch (array.element_type()) {
    case ffi::F32:
      return fn(static_cast<float*>(array.untyped_data()));
    case ffi::BF16:
    case ffi::U16:
      return fn(static_cast<bf16*>(array.untyped_data()));
    default:
      return ffi::Error::InvalidArgument("expected float32, bfloat16, or uint16 bits of bfloat16");
  }
}

// Calls fn(T*) with the element type of weights: int8_t, float, or bf16.
template <class Fn>
ffi::Error visit_weights(ffi::AnyBuffer array, const Fn& fn) {
  if (array.element_type() == ffi::S8) return fn(static_cast<int8_t*>(array.untyped_data()));
  return visit(array, fn);
}

// A layer of so many, as lax.dynamic_index_in_dim takes it: -1 is the last, and none lies outside.
inline int64_t index_of(Scalar layer, int64_t num_layers) {
  const int64_t i = value(layer);
  return std::clamp<int64_t>(i < 0 ? i + num_layers : i, 0, std::max<int64_t>(num_layers - 1, 0));
}

// The last `rank` axes of an array that may be stacked over layers; `offset` is in elements.
struct Slice {
  ffi::AnyBuffer::Dimensions dims;
  int64_t offset;
};

template <class Array>
Slice slice(const Array& array, Scalar layer, size_t rank) {
  auto dims = array.dimensions();
  if (dims.size() <= rank) return {dims, 0};
  const int64_t count = int64_t(array.element_count());
  const int64_t each = dims[0] > 0 ? count / dims[0] : 0;
  return {{dims.begin() + (dims.size() - rank), rank}, index_of(layer, dims[0]) * each};
}

}  // namespace jaxserve
