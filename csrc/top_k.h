// Which experts a token goes to.
#pragma once
#include "isa.h"

namespace moekit {

// The numbers of the k largest of n scores, the largest first. Of equals the lower number comes first; a NaN is larger
// than everything, as when PyTorch sorts.
void top_k(const float* scores, i64 n, i64 k, i64* ids);
// The same for each of `tokens` rows of E scores: (T, K).
void top_k(const float* scores_TE, i64* ids_TK, i64 tokens, i64 experts, i64 k, int threads);

}  // namespace moekit
