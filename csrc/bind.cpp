// Python sees addresses and sizes; moekit.kernels.cpu has checked shapes, types and contiguity.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "ops.h"
#include "quant_ops.h"

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
                 i64 top_k, i64 experts, i64 hidden, i64 inner, bool gated, int activation, int threads) {
  quant_moe(pointer<const float>(x), pointer<const i64>(ids), pointer<const float>(weights),
            {pointer<const i64>(gate_up)}, {pointer<const i64>(down)}, pointer<float>(out),
            {tokens, top_k, experts, hidden, inner, gated, activation, threads});
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
  m.def("available_isas", available_isas);
  m.def("isa", [] { return std::string(isa().name); });
  m.def("use_isa", use_isa);
#if defined(_OPENMP)
  m.attr("threaded") = true;
#else
  m.attr("threaded") = false;
#endif
}
