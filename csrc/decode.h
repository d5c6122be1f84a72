// One new token through one block: what attention and the MLP do to a single row of hidden states, each in three
// parallel regions. x is fp32 in and out; with dtype kBF16 it is rounded wherever the layers in PyTorch round.
// Nothing is allocated once the calling threads have their scratch. Results do not depend on the number of threads.
#pragma once
#include <vector>

#include "matrix.h"

namespace moekit {

struct Vector {
  const void* data = nullptr;  // null: there is none
  int dtype = kF32;
};

struct Linear {
  Matrix weight;  // of any kind, in one part; null data: there is none
  Vector bias;
};

// Keys and values of one layer: (heads, capacity, head_dim) each.
struct Cache {
  void *keys, *values;
  i64 capacity;
  int dtype;
};

struct Attention {
  Vector norm, q_norm, k_norm;  // q_norm and k_norm: of each head, or none
  float eps;
  Linear q, k, v, o;
  i64 heads, kv_heads, head_dim;
  int dtype;
};

// x += attention(norm(x)), with the new key and value written to the cache at `position`, after which nothing counts.
// `cosine` and `sine` are head_dim/2 long.
void attention_step(const Attention& layer, float* x_D, const float* cosine, const float* sine, const Cache& cache,
                    i64 position, int threads);

struct MLP {
  Linear gate, up, down;  // gate alone when there is no up: down · act(gate · x)
};

// Softmax and choice of the K best of E experts; of equals the lower number.
struct TopK {
  Matrix weight;  // none: the caller always routes
  i64 top_k;
  bool softmax_first, normalise;
  float scale;
};

struct Sparse {
  Vector norm;
  float eps;
  TopK router;
  std::vector<MLP> experts;  // of equal sizes; none in a dense block
  MLP shared;                // or the dense one; none without gate.weight.data
  Matrix shared_gate;        // one row, or none
  int activation, dtype;
};

// Where the router's results go; without logits_E the caller has routed.
struct Routes {
  float* logits_E;
  i64* ids_K;
  float* weights_K;
  i64 count;
};

// x += mlp(norm(x)). Throws std::invalid_argument for an expert that does not exist.
void mlp_step(const Sparse& layer, float* x_D, const Routes& routes, int threads);

// The same, number for number, in parts, for experts that come to memory while others are at work. `begin` norms and
// routes; `hidden` does what the experts of some slots do before their second matrix (a slot is a place in ids_K, and
// the shared MLP's is `count`); `finish`, once for all slots, does the rest. Between them `state` keeps
// mlp_state_size(layer, count) floats, aligned to 64 bytes. What an expert is told with `place` holds until told anew.
i64 mlp_state_size(const Sparse& layer, i64 count);
void mlp_begin(const Sparse& layer, const float* x_D, const Routes& routes, float* state, int threads);
void mlp_hidden(const Sparse& layer, const Routes& routes, const std::vector<i64>& slots, float* state, int threads);
void mlp_finish(const Sparse& layer, float* x_D, const Routes& routes, float* state, int threads);
void place(Sparse& layer, i64 expert, const void* gate, const void* up, const void* down);

// out = W · x + b for one row; x and out of type `dtype`.
void linear_row(const Linear& layer, const void* x, void* out, int dtype, int threads);

}  // namespace moekit
