#include "decode.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace moekit {
namespace {

constexpr i64 kMaxRows = 256;           // of a matrix in one task
constexpr i64 kElementsATask = 1 << 15;  // of a matrix: about 5 µs of reading
constexpr i64 kSplit = 512;             // cached positions in one task

// Memory of the calling thread that lasts until its next call with the same Tag.
template <class Tag>
float* scratch(i64 size) {
  thread_local std::vector<float> memory;
  if (static_cast<i64>(memory.size()) < size) memory.resize(size);
  return memory.data();
}
struct OfStep {};
struct OfTask {};

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

i64 rows_a_task(i64 cols) { return std::clamp<i64>(kElementsATask / std::max<i64>(cols, 1) / 16 * 16, 16, kMaxRows); }

i64 tasks_of(const Matrix& weight) { return weight.data ? ceil_div(weight.rows, rows_a_task(weight.cols)) : 0; }

void load(const Vector& from, i64 first, i64 size, float* out) {
  const i64 width = static_cast<i64>(element_size(from.dtype));
  tiles().row.load[from.dtype](static_cast<const char*>(from.data) + first * width, out, size);
}

// `rows` rows of W · x from row `first` on, unrounded and without bias. The one place that knows kinds of matrices.
void multiply(const Matrix& w, const float* x, i64 first, i64 rows, float* out) {
  const char* at = static_cast<const char*>(w.data) + first * w.cols * static_cast<i64>(element_size(w.kind));
  tiles().row.matvec[w.kind](at, w.cols, x, out, rows, w.cols);
}

void round_to(int dtype, float* x, i64 size) {
  if (dtype == kBF16) {
    float zeros[kMaxRows] = {};
    for (i64 at = 0; at < size; at += kMaxRows)
      tiles().row.add_rounded(x + at, zeros, std::min(kMaxRows, size - at), dtype);
  }
}

// The same rounded, plus the bias, rounded.
void apply(const Linear& layer, const float* x, i64 first, i64 rows, float* out, int dtype) {
  multiply(layer.weight, x, first, rows, out);
  round_to(dtype, out, rows);
  if (layer.bias.data) {
    float bias[kMaxRows];
    load(layer.bias, first, rows, bias);
    tiles().row.add_rounded(out, bias, rows, dtype);
  }
}

// out = norm(x); `weight` is scratch for the weights as floats.
void norm(const Vector& weights, float eps, const float* x, i64 size, float* weight, float* out, int dtype) {
  load(weights, 0, size, weight);
  round_to(dtype, weight, size);
  tiles().row.rms_norm(x, weight, eps, out, size, dtype);
}

// ---- attention ------------------------------------------------------------------------------------------------

struct Heads {
  const Attention& layer;
  float* qkv;       // H + 2·Hkv heads: queries, keys, values
  const float *cosine, *sine;
  const Cache& cache;
  i64 position, splits;
  float *out_Hd, *parts_Hnd, *max_Hn, *sum_Hn;

  char* cached(void* base, i64 head, i64 at) const {
    const i64 width = static_cast<i64>(element_size(cache.dtype));
    return static_cast<char*>(base) + (head * cache.capacity + at) * layer.head_dim * width;
  }

  void prepare(float* head, const Vector& head_norm, float* weight) const {
    const i64 d = layer.head_dim;
    if (head_norm.data) norm(head_norm, layer.eps, head, d, weight, head, layer.dtype);
    tiles().row.rotate(head, cosine, sine, d, layer.dtype);
  }

  // The new position's key and value, by the task whose split it falls into.
  void append(i64 kv_head, float* weight) const {
    const i64 d = layer.head_dim;
    float* key = qkv + (layer.heads + kv_head) * d;
    prepare(key, layer.k_norm, weight);
    const auto store = tiles().row.store[cache.dtype];
    store(key, cached(cache.keys, kv_head, position), d);
    store(key + layer.kv_heads * d, cached(cache.values, kv_head, position), d);
  }

  // Queries that share one head of keys, over one split of the positions.
  void attend(i64 kv_head, i64 split) const {
    const i64 d = layer.head_dim, group = layer.heads / layer.kv_heads, first = split * kSplit;
    const i64 positions = std::min(kSplit, position + 1 - first);
    float* weight = scratch<OfTask>(d + group * (2 * d + kSplit));
    float *q_Gd = weight + d, *mixed_Gd = q_Gd + group * d, *scores_GS = mixed_Gd + group * d;
    if (split == splits - 1) append(kv_head, weight);
    std::copy_n(qkv + kv_head * group * d, group * d, q_Gd);
    for (i64 g = 0; g < group; ++g) prepare(q_Gd + g * d, layer.q_norm, weight);
    const RowOps& row = tiles().row;
    row.scores[cache.dtype](q_Gd, group, cached(cache.keys, kv_head, first), positions, d, scores_GS, kSplit);
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (i64 g = 0; g < group; ++g) {
      const i64 slot = (kv_head * group + g) * splits + split;
      sum_Hn[slot] = row.exp_and_sum(scores_GS + g * kSplit, positions, scale, &max_Hn[slot]);
    }
    row.mix[cache.dtype](scores_GS, kSplit, group, cached(cache.values, kv_head, first), positions, d, mixed_Gd);
    for (i64 g = 0; g < group; ++g)
      std::copy_n(mixed_Gd + g * d, d, parts_Hnd + ((kv_head * group + g) * splits + split) * d);
  }

  // The splits of one head put together: each counts e^(its maximum − the largest) times.
  void merge(i64 head) const {
    const i64 d = layer.head_dim;
    const float *max = max_Hn + head * splits, *sum = sum_Hn + head * splits;
    const float most = *std::max_element(max, max + splits);
    float total = 0.0f;
    for (i64 n = 0; n < splits; ++n) total += sum[n] * std::exp(max[n] - most);
    std::fill_n(out_Hd + head * d, d, 0.0f);
    for (i64 n = 0; n < splits; ++n)
      tiles().row.scale_add(out_Hd + head * d, parts_Hnd + (head * splits + n) * d, std::exp(max[n] - most) / total, d);
    round_to(layer.dtype, out_Hd + head * d, d);
  }
};

// ---- MLP ------------------------------------------------------------------------------------------------------

// A NaN counts as larger than everything, as when PyTorch sorts.
bool before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

void softmax(float* x, i64 size) {
  const float most = *std::max_element(x, x + size);
  float total = 0.0f;
  for (i64 i = 0; i < size; ++i) total += x[i] = std::exp(x[i] - most);
  for (i64 i = 0; i < size; ++i) x[i] /= total;
}

// `probs_E` is scratch.
void choose(const TopK& router, const Routes& routes, float* probs_E) {
  const i64 experts = router.weight.rows;
  std::copy_n(routes.logits_E, experts, probs_E);
  for (i64 k = 0; k < router.top_k; ++k) {
    i64 best = -1;
    for (i64 e = 0; e < experts; ++e) {
      const bool taken = std::find(routes.ids_K, routes.ids_K + k, e) != routes.ids_K + k;
      if (!taken && (best < 0 || before(probs_E[e], probs_E[best]))) best = e;
    }
    routes.ids_K[k] = best;
  }
  if (router.softmax_first) softmax(probs_E, experts);
  float* weights = routes.weights_K;
  for (i64 k = 0; k < router.top_k; ++k) weights[k] = probs_E[routes.ids_K[k]];
  if (!router.softmax_first) softmax(weights, router.top_k);
  float total = 0.0f;
  for (i64 k = 0; k < router.top_k; ++k) total += weights[k];
  for (i64 k = 0; k < router.top_k; ++k) weights[k] = (router.normalise ? weights[k] / total : weights[k]) * router.scale;
}

// `rows` hidden values of one MLP from `first` on.
void hidden_rows(const MLP& mlp, const float* x, i64 first, i64 rows, float* out, const Sparse& layer) {
  float up[kMaxRows];
  const bool gated = mlp.up.weight.data;
  apply(mlp.gate, x, first, rows, out, kF32);
  if (gated) apply(mlp.up, x, first, rows, up, kF32);
  if (gated && layer.activation == kSilu) return tiles().row.silu_times(out, up, rows, layer.dtype);
  for (i64 r = 0; r < rows; ++r) out[r] = activate(out[r], layer.activation) * (gated ? up[r] : 1.0f);
  round_to(layer.dtype, out, rows);
}

struct Layer {
  const Sparse& layer;
  const Routes& routes;
  float *x, *h, *hidden, *shared_hidden;
  float shared_weight;

  i64 inner() const { return layer.experts.empty() ? 0 : layer.experts[0].gate.weight.rows; }

  void hidden_task(i64 i) const {
    const i64 each = layer.experts.empty() ? 0 : tasks_of(layer.experts[0].gate.weight);
    const bool routed = i < each * routes.count;
    const i64 slot = routed ? i / each : 0, part = routed ? i % each : i - each * routes.count;
    const MLP& mlp = routed ? layer.experts[routes.ids_K[slot]] : layer.shared;
    const i64 step = rows_a_task(mlp.gate.weight.cols), first = part * step;
    const i64 rows = std::min(step, mlp.gate.weight.rows - first);
    hidden_rows(mlp, h, first, rows, (routed ? hidden + slot * inner() : shared_hidden) + first, layer);
  }

  // Some rows of every expert's output, weighted, summed in the order of the assignments, and added to x.
  void down_task(i64 first, i64 rows) const {
    float sum[kMaxRows] = {}, out[kMaxRows];
    const RowOps& row = tiles().row;
    for (i64 k = 0; k < routes.count; ++k) {
      apply(layer.experts[routes.ids_K[k]].down, hidden + k * inner(), first, rows, out, kF32);
      row.scale_add(sum, out, routes.weights_K[k], rows);
    }
    round_to(layer.dtype, sum, rows);
    if (layer.shared.gate.weight.data) {
      float weighted[kMaxRows] = {};
      apply(layer.shared.down, shared_hidden, first, rows, out, layer.dtype);
      row.scale_add(weighted, out, shared_weight, rows);
      row.add_rounded(sum, weighted, rows, layer.dtype);
    }
    row.add_rounded(x + first, sum, rows, layer.dtype);
  }
};

}  // namespace

void attention_step(const Attention& layer, float* x_D, const float* cosine, const float* sine, const Cache& cache,
                    i64 position, int threads) {
  const i64 hidden = layer.q.weight.cols, d = layer.head_dim, q_rows = layer.heads * d, kv_rows = layer.kv_heads * d;
  const i64 splits = ceil_div(position + 1, kSplit);
  float* h = scratch<OfStep>(2 * hidden + 2 * q_rows + 2 * kv_rows + layer.heads * splits * (d + 2));
  float *weight = h + hidden, *qkv = weight + hidden, *out_Hd = qkv + q_rows + 2 * kv_rows;
  float *parts_Hnd = out_Hd + q_rows, *max_Hn = parts_Hnd + layer.heads * splits * d;
  norm(layer.norm, layer.eps, x_D, hidden, weight, h, layer.dtype);

  const Linear* parts[] = {&layer.q, &layer.k, &layer.v};
  const i64 q_tasks = tasks_of(layer.q.weight), kv_tasks = tasks_of(layer.k.weight), step = rows_a_task(hidden);
  parallel_for(q_tasks + 2 * kv_tasks, threads, [&](i64 i) {
    const i64 which = i < q_tasks ? 0 : 1 + (i - q_tasks) / kv_tasks;
    const i64 first = (which ? (i - q_tasks) % kv_tasks : i) * step;
    const i64 rows = std::min(step, parts[which]->weight.rows - first);
    apply(*parts[which], h, first, rows, qkv + (which ? q_rows + (which - 1) * kv_rows : 0) + first, layer.dtype);
  });

  const Heads heads{layer,  qkv,       cosine, sine,   cache, position, splits, out_Hd, parts_Hnd,
                    max_Hn, max_Hn + layer.heads * splits};
  parallel_for(layer.kv_heads * splits, threads, [&](i64 i) { heads.attend(i / splits, i % splits); });
  for (i64 head = 0; head < layer.heads; ++head) heads.merge(head);

  const i64 o_step = rows_a_task(q_rows);
  parallel_for(tasks_of(layer.o.weight), threads, [&](i64 i) {
    float out[kMaxRows];
    const i64 first = i * o_step, rows = std::min(o_step, hidden - first);
    apply(layer.o, out_Hd, first, rows, out, layer.dtype);
    tiles().row.add_rounded(x_D + first, out, rows, layer.dtype);
  });
}

void mlp_step(const Sparse& layer, float* x_D, const Routes& routes, int threads) {
  const MLP& any = layer.experts.empty() ? layer.shared : layer.experts[0];
  const i64 hidden = any.gate.weight.cols, inner = any.gate.weight.rows, experts = layer.router.weight.rows;
  float* h = scratch<OfStep>(2 * hidden + inner * routes.count + layer.shared.gate.weight.rows + experts + 1);
  float *weight = h + hidden, *hidden_KF = weight + hidden, *shared_hidden = hidden_KF + inner * routes.count;
  float *probs_E = shared_hidden + layer.shared.gate.weight.rows, *shared_gate = probs_E + experts;
  norm(layer.norm, layer.eps, x_D, hidden, weight, h, layer.dtype);

  const i64 router_tasks = routes.logits_E ? tasks_of(layer.router.weight) : 0, step = rows_a_task(hidden);
  parallel_for(router_tasks + (layer.shared_gate.data ? 1 : 0), threads, [&](i64 i) {
    if (i == router_tasks) return multiply(layer.shared_gate, h, 0, 1, shared_gate);
    multiply(layer.router.weight, h, i * step, std::min(step, experts - i * step), routes.logits_E + i * step);
  });
  if (routes.logits_E) choose(layer.router, routes, probs_E);
  for (i64 k = 0; k < routes.count; ++k)
    if (routes.ids_K[k] < 0 || routes.ids_K[k] >= static_cast<i64>(layer.experts.size()))
      throw std::invalid_argument("expert id " + std::to_string(routes.ids_K[k]) + " is not one of 0 to " +
                                  std::to_string(static_cast<i64>(layer.experts.size()) - 1));

  const float shared_weight = layer.shared_gate.data ? 1.0f / (1.0f + std::exp(-*shared_gate)) : 1.0f;
  const Layer work{layer, routes, x_D, h, hidden_KF, shared_hidden, shared_weight};
  const i64 expert_tasks = layer.experts.empty() ? 0 : tasks_of(any.gate.weight) * routes.count;
  parallel_for(expert_tasks + tasks_of(layer.shared.gate.weight), threads, [&](i64 i) { work.hidden_task(i); });
  const i64 down_step = rows_a_task(inner);
  parallel_for(ceil_div(hidden, down_step), threads, [&](i64 i) {
    work.down_task(i * down_step, std::min(down_step, hidden - i * down_step));
  });
}

void linear_row(const Linear& layer, const void* x, void* out, int dtype, int threads) {
  const i64 cols = layer.weight.cols, step = rows_a_task(cols);
  float* row = scratch<OfStep>(cols);
  tiles().row.load[dtype](x, row, cols);
  parallel_for(tasks_of(layer.weight), threads, [&](i64 i) {
    float part[kMaxRows];
    const i64 first = i * step, rows = std::min(step, layer.weight.rows - first);
    apply(layer, row, first, rows, part, dtype);
    tiles().row.store[dtype](part, static_cast<char*>(out) + first * static_cast<i64>(element_size(dtype)), rows);
  });
}

}  // namespace moekit
