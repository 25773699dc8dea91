// Rotary position embedding, of heads that may have to be normed first. Rows are turned in place.

#include "buffers.h"
#include "norm.h"
#include "pack.h"
#include "scratch.h"

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

ffi::Error rope(Floats x, Floats cos, Floats sin, ffi::AnyBuffer scale, Scalar num_rows,
                FloatsOut out, bool interleaved, float eps, float offset) {
  const auto dims = x.dimensions();
  const int64_t heads = dims[1], width = dims[2], pairs = cos.dimensions()[1];
  if (2 * pairs > width) return ffi::Error::InvalidArgument("more pairs than a head has lanes");
  for (const auto angles : {cos.dimensions(), sin.dimensions()}) {
    if (angles[0] != dims[0] || angles[1] != pairs) {
      return ffi::Error::InvalidArgument("cos and sin must be [T, pairs], one row for each of x " +
                                         text(dims) + ", not " + text(angles));
    }
  }
  const bool normed = scale.dimensions()[0] > 0;
  if (normed && scale.dimensions()[0] != width) {
    return ffi::Error::InvalidArgument("scale must be [H], or [0] where heads are not normed");
  }
  const int64_t rows = std::clamp<int64_t>(value(num_rows), 0, dims[0]), each = heads * width;
  const int64_t per_chunk = rows_per_chunk(32 * 1024, each);
  float* data = out->typed_data();
  std::memset(data + rows * each, 0, (dims[0] - rows) * each * sizeof(float));
  const auto turn = interleaved ? &rotate<true> : &rotate<false>;
  return visit(scale, [&](auto* scales) {
    Pool::shared().run(ceil_div(rows, per_chunk), [&](int64_t chunk) {
      thread_local Scratch scratch;
      scratch.reset(Scratch::bytes<float>(width));
      float* head = scratch.take<float>(width);
      const int64_t end = std::min(rows, (chunk + 1) * per_chunk);
      for (int64_t t = chunk * per_chunk; t < end; ++t) {
        const float *c = cos.typed_data() + t * pairs, *s = sin.typed_data() + t * pairs;
        for (float* row = data + t * each; row < data + (t + 1) * each; row += width) {
          fetch(row + width, width * int64_t(sizeof(float)));
          if (normed) {
            normalize(row, scales, head, width, eps, offset);
          } else {
            convert(head, row, width);
          }
          turn(head, c, s, pairs, width, row);
        }
      }
    });
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rope, guarded<rope>,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()  // x, aliased to the result
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Scalar>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("interleaved")
                                  .Attr<float>("eps")
                                  .Attr<float>("offset"));

}  // namespace jaxserve
