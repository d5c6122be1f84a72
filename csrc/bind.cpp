// Python sees addresses and sizes; moekit.kernels.cpu has checked shapes, types and contiguity.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "decode.h"
#include "mlp.h"
#include "ops.h"
#include "quant_ops.h"
#include "stream.h"
#include "top_k.h"
#include "workspace.h"

namespace nb = nanobind;
using namespace moekit;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The three grouped ops share one signature: two inputs, counts, output.
template <void (*Op)(const void*, const void*, const i64*, void*, const Grouped&)>
void grouped(Address left, Address right, Address counts, Address out, i64 rows, i64 experts, i64 out_width,
             i64 in_width, int dtype, int threads) {
  Op(pointer(left), pointer(right), pointer<const i64>(counts), pointer(out),
     {rows, experts, out_width, in_width, dtype, threads});
}

void decode(Address x, Address ids, Address weights, Address in_proj, Address down_proj, Address out, i64 tokens,
            i64 top_k, i64 experts, i64 hidden, i64 inner, bool gated, int activation, int dtype, int threads) {
  moe_decode(pointer(x), pointer<const i64>(ids), pointer<const float>(weights), pointer(in_proj), pointer(down_proj),
             pointer(out), {tokens, top_k, experts, hidden, inner, gated, activation, dtype, threads});
}

void quant_product(Address rows, Address weights, Address counts, Address out, i64 count, i64 experts, i64 out_width,
                   i64 in_width, int threads) {
  quant_grouped_mm(pointer<const float>(rows), {pointer<const i64>(weights)}, pointer<const i64>(counts),
                   pointer<float>(out), count, experts, out_width, in_width, threads);
}

void quant_layer(Address x, Address ids, Address weights, Address gate_up, Address down, Address out, i64 tokens,
                 i64 top_k, i64 experts, i64 hidden, i64 inner, bool gated, int activation, bool add, int threads) {
  quant_moe(pointer<const float>(x), pointer<const i64>(ids), pointer<const float>(weights),
            {pointer<const i64>(gate_up)}, {pointer<const i64>(down)}, pointer<float>(out),
            {tokens, top_k, experts, hidden, inner, gated, activation, threads, add});
}

void choose(Address scores, Address ids, i64 tokens, i64 experts, i64 k, int threads) {
  top_k(pointer<const float>(scores), pointer<i64>(ids), tokens, experts, k, threads);
}

// ---- decoding: layers are described once, in numbers, and then called with what changes -------------------------

void describe_attention(Attention* self, Vector norm, Vector q_norm, Vector k_norm, float eps, const Linear& q,
                        const Linear& k, const Linear& v, const Linear& o, i64 heads, i64 kv_heads, i64 head_dim,
                        int dtype) {
  new (self) Attention{norm, q_norm, k_norm, eps, q, k, v, o, heads, kv_heads, head_dim, dtype};
}

void run_attention(const Attention& self, Address x, Address cosine, Address sine, Address keys, Address values,
                   i64 capacity, int dtype, i64 position, int threads) {
  attention_step(self, pointer<float>(x), pointer<const float>(cosine), pointer<const float>(sine),
                 {pointer(keys), pointer(values), capacity, dtype}, position, threads);
}

void describe_sparse(Sparse* self, Vector norm, float eps, const TopK& router, const std::vector<MLP>& experts,
                     const MLP& shared, const Matrix& shared_gate, int activation, int dtype) {
  new (self) Sparse{norm, eps, router, experts, shared, shared_gate, activation, dtype};
}

void run_mlp(const Sparse& self, Address x, Address logits, Address ids, Address weights, i64 count, int threads) {
  mlp_step(self, pointer<float>(x), {pointer<float>(logits), pointer<i64>(ids), pointer<float>(weights), count},
           threads);
}

void begin_mlp(const Sparse& self, Address x, Address logits, Address ids, Address weights, i64 count, Address state,
               int threads) {
  mlp_begin(self, pointer<const float>(x),
            {pointer<float>(logits), pointer<i64>(ids), pointer<float>(weights), count}, pointer<float>(state),
            threads);
}

void hidden_mlp(const Sparse& self, Address ids, i64 count, const std::vector<i64>& slots, Address state,
                int threads) {
  mlp_hidden(self, {nullptr, pointer<i64>(ids), nullptr, count}, slots, pointer<float>(state), threads);
}

void finish_mlp(const Sparse& self, Address x, Address ids, Address weights, i64 count, Address state, int threads) {
  mlp_finish(self, pointer<float>(x), {nullptr, pointer<i64>(ids), pointer<float>(weights), count},
             pointer<float>(state), threads);
}

void place_expert(Sparse& self, i64 expert, Address gate, Address up, Address down) {
  place(self, expert, pointer(gate), pointer(up), pointer(down));
}

void run_linear_row(Address x, Address weight, Address bias, Address out, i64 rows, i64 cols, int dtype, int threads) {
  const Linear layer{{pointer(weight), rows, cols, dtype, 0, 1, true}, {pointer(bias), dtype}};
  linear_row(layer, pointer(x), pointer(out), dtype, threads);
}

void bind_decode(nb::module_& m) {
  using Free = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Vector>(m, "Vector").def("__init__", [](Vector* self, Address data, int dtype) {
    new (self) Vector{pointer(data), dtype};
  });
  nb::class_<Matrix>(m, "Matrix").def(
      "__init__", [](Matrix* self, Address data, i64 rows, i64 cols, int kind, int group, bool symmetric) {
        new (self) Matrix{pointer(data), rows, cols, kind, group, 1, symmetric};
      });
  nb::class_<Linear>(m, "Linear").def("__init__", [](Linear* self, const Matrix& weight, Vector bias) {
    new (self) Linear{weight, bias};
  });
  nb::class_<MLP>(m, "MLP").def("__init__", [](MLP* self, const Linear& gate, const Linear& up, const Linear& down) {
    new (self) MLP{gate, up, down};
  });
  nb::class_<TopK>(m, "TopK").def(
      "__init__", [](TopK* self, const Matrix& weight, i64 top_k, bool softmax_first, bool normalise, float scale) {
        new (self) TopK{weight, top_k, softmax_first, normalise, scale};
      });
  m.def("linear_row", run_linear_row, Free());
  nb::class_<Attention>(m, "Attention").def("__init__", describe_attention).def("run", run_attention, Free());
  nb::class_<Sparse>(m, "Sparse")
      .def("__init__", describe_sparse)
      .def("run", run_mlp, Free())
      .def("state_size", mlp_state_size)
      .def("begin", begin_mlp, Free())
      .def("hidden", hidden_mlp, Free())
      .def("finish", finish_mlp, Free())
      .def("place", place_expert);
}

// x, token ids, expert ids, weights, in_proj, its bias, down_proj, its bias; 0 for what there is not.
using Addresses = std::vector<Address>;

MlpInputs inputs(const Addresses& from) {
  return {pointer(from[0]),         pointer<const i64>(from[1]), pointer<const i64>(from[2]),
          pointer<const float>(from[3]), pointer(from[4]),       pointer(from[5]),
          pointer(from[6]),         pointer(from[7])};
}

Mlp size(const std::vector<i64>& of, bool gated, int activation, int dtype, int out_dtype, int threads) {
  return {of[0], of[1], of[2], of[3], {of[4], gated, activation}, dtype, out_dtype, threads};
}

void mlp(const Addresses& in, Address out, Address pre, const std::vector<i64>& sizes, bool gated, int activation,
         int dtype, int out_dtype, int threads) {
  nb::gil_scoped_release free;
  moe_mlp(inputs(in), pointer(out), pointer(pre), size(sizes, gated, activation, dtype, out_dtype, threads));
}

// The gradients in the order x, weights, in_proj, its bias, down_proj, its bias.
void mlp_backward(const Addresses& in, Address grad, Address pre, const Addresses& out, const std::vector<i64>& sizes,
                  bool gated, int activation, int dtype, int out_dtype, int threads) {
  nb::gil_scoped_release free;
  moe_mlp_backward(inputs(in), pointer(grad), pointer(pre),
                   {pointer(out[0]), pointer<float>(out[1]), pointer(out[2]), pointer(out[3]), pointer(out[4]),
                    pointer(out[5])},
                   size(sizes, gated, activation, dtype, out_dtype, threads));
}

// A tensor of uninitialised numbers; its memory is kept when it is gone.
nb::ndarray<nb::pytorch> empty(const std::vector<size_t>& shape, int dtype) {
  size_t bytes = element_size(dtype);
  for (size_t each : shape) bytes *= each;
  void* const data = take_array(bytes);
  const nb::capsule owner(data, [](void* array) noexcept { give_back(array); });
  return {data, shape.size(), shape.data(), owner, nullptr,
          dtype == kF32 ? nb::dtype<float>() : nb::dlpack::dtype{std::uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1}};
}

}  // namespace

NB_MODULE(_native, m) {
  using Free = nb::call_guard<nb::gil_scoped_release>;
  m.def("grouped_mm", grouped<grouped_mm>, Free());
  m.def("grouped_mm_transposed", grouped<grouped_mm_transposed>, Free());
  m.def("grouped_outer", grouped<grouped_outer>, Free());
  m.def("moe_decode", decode, Free());
  m.def("quant_grouped_mm", quant_product, Free());
  m.def("quant_moe", quant_layer, Free());
  m.def("top_k", choose, Free());
  bind_decode(m);
  m.def("moe_mlp", mlp);
  m.def("moe_mlp_backward", mlp_backward);
  m.def("empty", empty);
  m.def("release_memory", release_arrays, Free());
  m.def("read_memory", [](Address data, i64 bytes, int threads) { return read_memory(pointer(data), bytes, threads); },
        Free());
  m.def("available_isas", available_isas);
  m.def("isa", [] { return std::string(isa().name); });
  m.def("use_isa", use_isa);
  m.def("quant_products", [] { return std::string(quant_tiles().products); });
#if defined(_OPENMP)
  m.attr("threaded") = true;
#else
  m.attr("threaded") = false;
#endif
}
