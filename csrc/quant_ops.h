// Products of rows with matrices in any format. Rows and outputs are fp32, contiguous; ids and counts int64.
// Numbers depend neither on the number of threads nor on how many rows are multiplied together.
// Every function throws std::invalid_argument when counts or ids do not fit the shapes.
#pragma once
#include "matrix.h"

namespace moekit {

// Matrices of one shape as Python keeps them: for each data, rows, cols, kind, group, parts, symmetric.
struct MatrixTable {
  const i64* fields;
  Matrix operator[](i64 index) const;
};

// out_RO = rows_RI · W_eᵀ for rows sorted by expert; rows past the counts give zeros.
void quant_grouped_mm(const float* rows_RI, MatrixTable weight_E, const i64* counts_E, float* out_RO, i64 rows,
                      i64 experts, i64 out_width, i64 in_width, int threads);

struct QuantMoE {
  i64 tokens, top_k, experts, hidden, inner;  // T, K, E, D, F
  bool gated;
  int activation, threads;
  bool add = false;  // to what is in the output, else it is written
};

// out_TD = Σ_k weight · down(act(gate(x)) · up(x)), summed in the order of the experts; an id of −1 is an expert that
// is not among these, and adds nothing. Experts in several calls with `add`, in their order, give the numbers of one.
void quant_moe(const float* x_TD, const i64* ids_TK, const float* weights_TK, MatrixTable gate_up_E,
               MatrixTable down_E, float* out_TD, const QuantMoE& size);

}  // namespace moekit
