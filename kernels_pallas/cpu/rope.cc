// Rotary position embedding.

#include "buffers.h"
#include "pack.h"

namespace jaxserve {
namespace {

// Lanes of one head. Pairs are halves, or neighbours, which come out as halves.
template <bool interleaved>
void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin,
            int64_t pairs, int64_t width, float* __restrict y) {
  const float *a = x, *b = interleaved ? x + 1 : x + pairs;
  constexpr int64_t kStep = interleaved ? 2 : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    y[i] = a[i * kStep] * cos[i] - b[i * kStep] * sin[i];
    y[pairs + i] = b[i * kStep] * cos[i] + a[i * kStep] * sin[i];
  }
  std::memcpy(y + 2 * pairs, x + 2 * pairs, (width - 2 * pairs) * sizeof(float));
}

ffi::Error rope(Floats x, Floats cos, Floats sin, Scalar num_rows, FloatsOut out,
                bool interleaved) {
  constexpr int64_t kElementsPerChunk = 32 * 1024;
  const auto dims = x.dimensions();
  const int64_t heads = dims[1], width = dims[2], pairs = cos.dimensions()[1];
  if (2 * pairs > width) return ffi::Error::InvalidArgument("more pairs than a head has lanes");
  const int64_t rows = std::clamp<int64_t>(value(num_rows), 0, dims[0]), each = heads * width;
  const int64_t per_chunk = std::max<int64_t>(1, kElementsPerChunk / std::max<int64_t>(1, each));
  const float* from = x.typed_data();
  float* to = out->typed_data();
  std::memset(to + rows * each, 0, (dims[0] - rows) * each * sizeof(float));
  const auto run = interleaved ? &rotate<true> : &rotate<false>;
  Pool::shared().run(ceil_div(rows, per_chunk), [&](int64_t chunk) {
    const int64_t end = std::min(rows, (chunk + 1) * per_chunk);
    for (int64_t t = chunk * per_chunk; t < end; ++t) {
      for (int64_t i = t * each; i < (t + 1) * each; i += width) {
        run(from + i, cos.typed_data() + t * pairs, sin.typed_data() + t * pairs, pairs, width,
            to + i);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rope, guarded<rope>,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Scalar>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("interleaved"));

}  // namespace jaxserve
