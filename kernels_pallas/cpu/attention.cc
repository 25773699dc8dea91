// Causal attention over a paged KV cache that first receives this step's keys and values.

#include "attend.h"
#include "buffers.h"

namespace jaxserve {
namespace {

// put(table, head, position, row) for x [T, K, width], the rows of this step's tokens.
template <class Put>
void write(const Batch& batch, int64_t num_heads, int64_t width, const float* x, const Put& put) {
  constexpr int64_t kTokensPerChunk = 32;  // positions that share a byte are in one chunk
  for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
    const int64_t first = batch.first_position(seq), odd = first % 2;
    const int64_t count = batch.num_queries(seq);
    Pool::shared().run(ceil_div(count + odd, kTokensPerChunk), [&](int64_t chunk) {
      const int64_t begin = std::max<int64_t>(0, chunk * kTokensPerChunk - odd);
      const int64_t end = std::min(count, (chunk + 1) * kTokensPerChunk - odd);
      for (int64_t head = 0; head < num_heads; ++head) {  // whose rows follow each other in a page
        const float* from = x + ((batch.row_starts[seq] + begin) * num_heads + head) * width;
        for (int64_t i = begin; i < end; ++i, from += num_heads * width) {
          if (i + 1 < end) fetch(from + num_heads * width, width * int64_t(sizeof(float)));
          put(batch.table(seq), head, first + i, from);
        }
      }
    });
  }
}

template <class T>
void write(const Pages<T>& pages, const Batch& batch, const float* x) {
  const int64_t width = pages.width;
  write(batch, pages.num_heads, width, x,
        [&](const int32_t* table, int64_t head, int64_t position, const float* from) {
          T* to = pages.find(table, head, position);
          if (to) convert(to, from, width);
        });
}

void write(const CodedPages& pages, const Batch& batch, const float* x) {
  const int64_t width = pages.width;
  write(batch, pages.num_heads, width, x,
        [&](const int32_t* table, int64_t head, int64_t position, const float* from) {
          thread_local std::vector<float> row;
          thread_local std::vector<int8_t> spare;
          row.assign(from, from + width);
          spare.resize(width + kLanes);  // quantize() writes whole registers
          pages.put(table, head, position, row.data(), spare.data());
        });
}

template <class T>
void run(const Attention<T>& job, int64_t num_tokens) {
  const Batch& batch = job.batch;
  const int64_t used = batch.num_seqs > 0 ? batch.row_starts[batch.num_seqs] : 0;
  const int64_t unused = (num_tokens - used) * job.num_heads;
  std::memset(job.out + used * job.num_heads * job.value_dim, 0,
              unused * job.value_dim * sizeof(float));
  std::memset(job.lse + used * job.num_heads, 0, unused * sizeof(float));
  const Tasks tasks(batch, job.keys.num_heads, job.group(), job.window, job.keys.page_size);
  Pool::shared().run(tasks.num_chunks(), [&](int64_t chunk) {
    attend(job, tasks.begin(chunk), tasks.end(chunk));
  });
}

// The operands every form of attention has.
struct Operands {
  Floats q, k;
  Scalar layer;
  Ints row_starts, kv_lens, tables, groups;  // groups: [3, C]
  Scalar num_seqs, window;
  Floats sinks;
  FloatsOut out, lse;
  float scale, soft_cap;
};

template <class T>
Pages<T> pages_of(ffi::AnyBuffer array, Scalar layer) {
  auto [dims, offset] = slice(array, layer, 4);
  return {static_cast<T*>(array.untyped_data()) + offset, dims[0], dims[1], dims[2], dims[3]};
}

using Parts = ffi::Span<const int64_t>;

// Nibbles are bytes without sign, two slots in each.
CodedPages coded_pages_of(ffi::AnyBuffer values, FloatsOut scales, Scalar layer, Parts parts) {
  const bool nibbles = values.element_type() == ffi::U8;
  auto [dims, offset] = slice(values, layer, 4);
  const auto [scale_dims, first_scale] = slice(*scales, layer, parts.size() ? 3 : 2);
  return {static_cast<uint8_t*>(values.untyped_data()) + offset,
          scales->typed_data() + first_scale,
          dims[0],
          dims[1],
          nibbles ? 2 * dims[2] : dims[2],
          dims[3],
          parts.begin(),
          int64_t(parts.size()),
          scale_dims[1],
          nibbles};
}

// Sizes alone, for what reads and writes pages of T.
template <class T>
Pages<T> sizes_of(const CodedPages& pages) {
  return {nullptr, pages.num_pages, pages.num_heads, pages.page_size, pages.width};
}

Groups groups_of(Ints array) {
  const int64_t count = array.dimensions()[1];
  const int32_t* first = array.typed_data();
  return {first, first + count, first + 2 * count, count};
}

template <class T>
Attention<T> attention_of(Operands in) {
  Attention<T> job;
  const int64_t num_seqs = int64_t(in.kv_lens.element_count());
  job.batch = {in.row_starts.typed_data(), in.kv_lens.typed_data(), in.tables.typed_data(),
               in.tables.dimensions()[1], std::clamp<int64_t>(value(in.num_seqs), 0, num_seqs),
               groups_of(in.groups)};
  job.q = in.q.typed_data();
  job.out = in.out->typed_data();
  job.lse = in.lse->typed_data();
  job.num_heads = in.q.dimensions()[1];
  job.value_dim = in.out->dimensions()[2];
  job.window = value(in.window);
  job.scores = {in.scale, in.soft_cap};
  const int64_t first_sink = slice(in.sinks, in.layer, 1).offset;
  job.sinks = in.sinks.element_count() > 0 ? in.sinks.typed_data() + first_sink : nullptr;
  return job;
}

bool fits(Floats rows, int64_t num_tokens, int64_t num_heads, int64_t width) {
  const auto dims = rows.dimensions();
  return dims.size() == 3 && dims[0] == num_tokens && dims[1] == num_heads && dims[2] == width;
}

// Whether sequences have rows for their queries and pages for their keys.
ffi::Error check(const Batch& batch, int64_t num_tokens, int64_t page_size) {
  for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
    const int64_t begin = batch.row_starts[seq], end = batch.row_starts[seq + 1];
    const int64_t length = batch.kv_lens[seq], room = batch.table_width * page_size;
    if (begin < 0 || end < begin || end > num_tokens) {
      return ffi::Error::InvalidArgument(
          "row_starts must ascend from 0 to at most " + std::to_string(num_tokens) +
          " rows of q; sequence " + std::to_string(seq) + " has rows " + std::to_string(begin) +
          " to " + std::to_string(end));
    }
    if (end > begin && (length < end - begin || length > room)) {
      return ffi::Error::InvalidArgument(
          "kv_lens must count this step's tokens, and tables hold them all; sequence " +
          std::to_string(seq) + " has " + std::to_string(length) + " keys, " +
          std::to_string(end - begin) + " of them new, and pages for " + std::to_string(room));
    }
  }
  return ffi::Error::Success();
}

// Whether all that is read or written is there. Where values are heads of keys, v is k.
template <class T>
ffi::Error check(const Attention<T>& job, const Operands& in, Floats k, Floats v) {
  const auto q = in.q.dimensions(), tables = in.tables.dimensions();
  const int64_t heads = job.keys.num_heads, num_seqs = int64_t(in.kv_lens.element_count());
  if (!fits(k, q[0], heads, job.keys.width) || !fits(v, q[0], heads, job.values.width) ||
      job.values.num_heads != heads || job.values.page_size != job.keys.page_size) {
    return ffi::Error::InvalidArgument(
        "k and v must be [T, K, H] for T = " + std::to_string(q[0]) +
        ", and their pages [P, K, Z, H] with one K and Z; they are " + text(k.dimensions()) +
        " and " + text(v.dimensions()) + ", pages have " + std::to_string(heads) + " and " +
        std::to_string(job.values.num_heads) + " heads, " + std::to_string(job.keys.page_size) +
        " and " + std::to_string(job.values.page_size) + " slots");
  }
  if (heads == 0 || q[1] % heads != 0 || q[2] != job.keys.width) {
    return ffi::Error::InvalidArgument("q must be [T, N, H] with N a multiple of " +
                                       std::to_string(heads) + " heads of keys and H = " +
                                       std::to_string(job.keys.width) + ", not " + text(q));
  }
  if (tables[0] != num_seqs || int64_t(in.row_starts.element_count()) != num_seqs + 1) {
    return ffi::Error::InvalidArgument(
        "row_starts, kv_lens and tables must be [R + 1], [R] and [R, M], not " +
        text(in.row_starts.dimensions()) + ", " + text(in.kv_lens.dimensions()) + " and " +
        text(tables));
  }
  const auto sinks = in.sinks.dimensions();
  if (in.sinks.element_count() > 0 && (sinks.size() > 2 || sinks.back() != q[1])) {
    return ffi::Error::InvalidArgument("sinks must be [N] or [L, N] for N = " +
                                       std::to_string(q[1]) + " heads of q, not " + text(sinks));
  }
  return check(job.batch, q[0], job.keys.page_size);
}

ffi::Error mixed_pages() {
  return ffi::Error::InvalidArgument("pages of keys and of values must have one dtype");
}

ffi::Error paged_attention(Floats q, Floats k, Floats v, ffi::AnyBuffer, ffi::AnyBuffer,
                           Scalar layer, Ints row_starts, Ints kv_lens, Ints tables, Ints groups,
                           Scalar num_seqs, Scalar window, Floats sinks, FloatsOut out,
                           FloatsOut lse, float scale, float soft_cap,
                           ffi::Result<ffi::AnyBuffer> k_pages,
                           ffi::Result<ffi::AnyBuffer> v_pages) {
  if (k_pages->element_type() != v_pages->element_type()) return mixed_pages();
  return visit(*k_pages, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const Operands in{q,        k,      layer, row_starts, kv_lens, tables, groups,
                      num_seqs, window, sinks, out,        lse,     scale,  soft_cap};
    auto job = attention_of<T>(in);
    job.keys = pages_of<T>(*k_pages, layer);
    job.values = pages_of<T>(*v_pages, layer);
    if (auto error = check(job, in, k, v); error.failure()) return error;
    write(job.keys, job.batch, k.typed_data());
    write(job.values, job.batch, v.typed_data());
    run(job, q.dimensions()[0]);
    return ffi::Error::Success();
  });
}

// Multi-head latent attention: one kv head, and a value is the first value_dim lanes of its key.
ffi::Error latent_attention(Floats q, Floats k, ffi::AnyBuffer, Scalar layer, Ints row_starts,
                            Ints kv_lens, Ints tables, Ints groups, Scalar num_seqs, Scalar window,
                            Floats sinks, FloatsOut out, FloatsOut lse, float scale, float soft_cap,
                            ffi::Result<ffi::AnyBuffer> k_pages) {
  return visit(*k_pages, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    const Operands in{q,        k,      layer, row_starts, kv_lens, tables, groups,
                      num_seqs, window, sinks, out,        lse,     scale,  soft_cap};
    auto job = attention_of<T>(in);
    job.keys = job.values = pages_of<T>(*k_pages, layer);
    if (auto error = check(job, in, k, k); error.failure()) return error;
    write(job.keys, job.batch, k.typed_data());
    run(job, q.dimensions()[0]);
    return ffi::Error::Success();
  });
}

// Eight and four bits hold less than bf16 does: rows become that, and queries meet them so.
ffi::Error coded_attention(Floats q, Floats k, Floats v, ffi::AnyBuffer, Floats, ffi::AnyBuffer,
                           Floats, Scalar layer, Ints row_starts, Ints kv_lens, Ints tables,
                           Ints groups, Scalar num_seqs, Scalar window, Floats sinks, FloatsOut out,
                           FloatsOut lse, float scale, float soft_cap,
                           ffi::Result<ffi::AnyBuffer> k_pages, FloatsOut k_scales,
                           ffi::Result<ffi::AnyBuffer> v_pages, FloatsOut v_scales, Parts k_parts,
                           Parts v_parts) {
  if (k_pages->element_type() != v_pages->element_type()) return mixed_pages();
  const Operands in{q,        k,      layer, row_starts, kv_lens, tables, groups,
                    num_seqs, window, sinks, out,        lse,     scale,  soft_cap};
  auto job = attention_of<bf16>(in);
  const CodedPages keys = coded_pages_of(*k_pages, k_scales, layer, k_parts);
  const CodedPages values = coded_pages_of(*v_pages, v_scales, layer, v_parts);
  job.coded_keys = &keys;
  job.coded_values = &values;
  job.keys = sizes_of<bf16>(keys);
  job.values = sizes_of<bf16>(values);
  if (auto error = check(job, in, k, v); error.failure()) return error;
  write(keys, job.batch, k.typed_data());
  write(values, job.batch, v.typed_data());
  run(job, q.dimensions()[0]);
  return ffi::Error::Success();
}

ffi::Error coded_latent_attention(Floats q, Floats k, ffi::AnyBuffer, Floats, Scalar layer,
                                  Ints row_starts, Ints kv_lens, Ints tables, Ints groups,
                                  Scalar num_seqs, Scalar window, Floats sinks, FloatsOut out,
                                  FloatsOut lse, float scale, float soft_cap,
                                  ffi::Result<ffi::AnyBuffer> k_pages, FloatsOut k_scales,
                                  Parts k_parts) {
  const Operands in{q,        k,      layer, row_starts, kv_lens, tables, groups,
                    num_seqs, window, sinks, out,        lse,     scale,  soft_cap};
  auto job = attention_of<bf16>(in);
  const CodedPages keys = coded_pages_of(*k_pages, k_scales, layer, k_parts);
  job.coded_keys = job.coded_values = &keys;
  job.keys = job.values = sizes_of<bf16>(keys);
  if (auto error = check(job, in, k, k); error.failure()) return error;
  write(keys, job.batch, k.typed_data());
  run(job, q.dimensions()[0]);
  return ffi::Error::Success();
}

// What every form is given behind its pages, and gives before them.
template <class Binding>
auto of_step(Binding binding) {
  return std::move(binding)
      .template Arg<Scalar>()                 // layer
      .template Arg<Ints>()                   // row_starts
      .template Arg<Ints>()                   // kv_lens
      .template Arg<Ints>()                   // tables
      .template Arg<Ints>()                   // groups
      .template Arg<Scalar>()                 // num_seqs
      .template Arg<Scalar>()                 // window
      .template Arg<Floats>()                 // sinks
      .template Ret<ffi::Buffer<ffi::F32>>()  // out
      .template Ret<ffi::Buffer<ffi::F32>>()  // lse
      .template Attr<float>("scale")
      .template Attr<float>("soft_cap");
}

}  // namespace

// Pages and their scales are aliased: what is an argument is a result, too.

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_paged_attention, guarded<paged_attention>,
                              of_step(ffi::Ffi::Bind()
                                          .Arg<Floats>()           // q
                                          .Arg<Floats>()           // k
                                          .Arg<Floats>()           // v
                                          .Arg<ffi::AnyBuffer>()   // k_pages
                                          .Arg<ffi::AnyBuffer>())  // v_pages
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_latent_attention, guarded<latent_attention>,
                              of_step(ffi::Ffi::Bind()
                                          .Arg<Floats>()           // q
                                          .Arg<Floats>()           // k
                                          .Arg<ffi::AnyBuffer>())  // k_pages
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_coded_attention, guarded<coded_attention>,
                              of_step(ffi::Ffi::Bind()
                                          .Arg<Floats>()          // q
                                          .Arg<Floats>()          // k
                                          .Arg<Floats>()          // v
                                          .Arg<ffi::AnyBuffer>()  // k_pages
                                          .Arg<Floats>()          // k_scales
                                          .Arg<ffi::AnyBuffer>()  // v_pages
                                          .Arg<Floats>())         // v_scales
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<Parts>("k_parts")
                                  .Attr<Parts>("v_parts"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_coded_latent_attention, guarded<coded_latent_attention>,
                              of_step(ffi::Ffi::Bind()
                                          .Arg<Floats>()          // q
                                          .Arg<Floats>()          // k
                                          .Arg<ffi::AnyBuffer>()  // k_pages
                                          .Arg<Floats>())         // k_scales
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<Parts>("k_parts"));

}  // namespace jaxserve
