// The ops of moekit.kernels.reference on raw pointers. Arrays are contiguous; counts and ids are int64.
// Every function throws std::invalid_argument when counts or ids do not fit the shapes.
#pragma once
#include "isa.h"

namespace moekit {

struct Grouped {
  i64 rows, experts, out_width, in_width;  // R, E, O, I
  int dtype, threads;
};

// out_RO = rows_RI · W_eᵀ
void grouped_mm(const void* rows_RI, const void* weight_EOI, const i64* counts_E, void* out_RO, const Grouped& size);
// out_RI = rows_RO · W_e
void grouped_mm_transposed(const void* rows_RO, const void* weight_EOI, const i64* counts_E, void* out_RI,
                           const Grouped& size);
// out_EOI = Σ rows_ROᵀ · rows_RI
void grouped_outer(const void* rows_RO, const void* rows_RI, const i64* counts_E, void* out_EOI, const Grouped& size);

struct Decode {
  i64 tokens, top_k, experts, hidden, inner;  // T, K, E, D, F
  bool gated;
  int activation, dtype, threads;
};

void moe_decode(const void* x_TD, const i64* ids_TK, const float* weights_TK, const void* in_proj_EGD,
                const void* down_proj_EDF, void* out_TD, const Decode& size);

}  // namespace moekit
