// Dispatch, experts and combine of an MoE layer as one op, and its gradient: moekit.kernels.reference.moe_mlp on raw
// pointers. Arrays are contiguous and, unless said otherwise, of one dtype; a null bias is none.
// Numbers do not depend on the number of threads.
#pragma once
#include "isa.h"

namespace moekit {

struct Mlp {
  i64 tokens, assignments, experts, hidden;  // T, A, E, D
  Inner inner;                               // F, and G = inner.width()
  int dtype, out_dtype, threads;
};

struct MlpInputs {
  const void* x_TD;
  const i64* token_ids_A;   // ascending
  const i64* expert_ids_A;  // E: nobody's, adds nothing
  const float* weights_A;
  const void *in_proj_EGD, *in_bias_EG, *down_proj_EDF, *down_bias_ED;
};

// out_TD (of out_dtype) and, unless null, the pre-activations in expert order, which the gradient needs.
// Throws std::invalid_argument for token or expert ids that do not fit.
void moe_mlp(const MlpInputs& in, void* out_TD, void* pre_AG, const Mlp& size);

// Null for those that nobody wants.
struct MlpGradients {
  void* x_TD;
  float* weights_A;
  void *in_proj_EGD, *in_bias_EG, *down_proj_EDF, *down_bias_ED;
};

// grad_TD is of out_dtype.
void moe_mlp_backward(const MlpInputs& in, const void* grad_TD, const void* pre_AG, const MlpGradients& out,
                      const Mlp& size);

}  // namespace moekit
