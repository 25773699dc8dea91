// RMSNorm over the last axis, as a handler.

#include "buffers.h"
#include "norm.h"
#include "pack.h"

namespace jaxserve {
namespace {

ffi::Error rms_norm(Floats x, ffi::AnyBuffer scale, Scalar num_rows, Scalar layer, FloatsOut out,
                    float eps, float offset) {
  const int64_t all_rows = x.dimensions()[0], n = x.dimensions()[1];
  const int64_t rows = std::clamp<int64_t>(value(num_rows), 0, all_rows);
  const int64_t per_chunk = rows_per_chunk(32 * 1024, n);
  auto [dims, start] = slice(scale, layer, 1);
  if (dims[0] != n) return ffi::Error::InvalidArgument("scale must be [D] or [L, D]");
  const float* from = x.typed_data();
  float* to = out->typed_data();
  std::memset(to + rows * n, 0, (all_rows - rows) * n * sizeof(float));
  return visit(scale, [&, start = start](auto* weight) {
    Pool::shared().run(ceil_div(rows, per_chunk), [&](int64_t chunk) {
      const int64_t end = std::min(rows, (chunk + 1) * per_chunk);
      for (int64_t i = chunk * per_chunk; i < end; ++i) {
        if (i + 1 < end) fetch(from + (i + 1) * n, n * int64_t(sizeof(float)));
        normalize(from + i * n, weight + start, to + i * n, n, eps, offset);
      }
    });
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rms_norm, guarded<rms_norm>,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Scalar>()
                                  .Arg<Scalar>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset"));

}  // namespace jaxserve
