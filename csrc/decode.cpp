#include "decode.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "top_k.h"
#include "workspace.h"

namespace moekit {
namespace {

// Rows of a matrix in one task, a multiple of kBlock so that a task quantises what it wrote: about 5 µs of reading.
constexpr i64 kMaxRows = 256, kPackedRows = 2 * kBlock;
constexpr i64 kElementsATask = 1 << 15;
constexpr i64 kSplit = 512;  // cached positions in one task

i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

i64 rows_a_task(const Matrix& m) {
  if (is_packed(m)) return kPackedRows;
  return std::clamp<i64>(kElementsATask / std::max<i64>(m.cols, 1) / kBlock * kBlock, kBlock, kMaxRows);
}

i64 tasks_of(const Matrix& m) { return m.data ? ceil_div(m.rows, rows_a_task(m)) : 0; }

// ---- activations ----------------------------------------------------------------------------------------------

void load(const Vector& from, i64 first, i64 size, float* out) {
  const i64 width = static_cast<i64>(element_size(from.dtype));
  tiles().row.load[from.dtype](static_cast<const char*>(from.data) + first * width, out, size);
}

void round_to(int dtype, float* x, i64 size) {
  if (dtype == kF32) return;
  const float zeros[kMaxRows] = {};
  for (i64 at = 0; at < size; at += kMaxRows)
    tiles().row.add_rounded(x + at, zeros, std::min(kMaxRows, size - at), dtype);
}

// out = norm(x); `weight` is scratch for the weights as floats.
void norm(const Vector& weights, float eps, const float* x, i64 size, float* weight, float* out, int dtype) {
  load(weights, 0, size, weight);
  round_to(dtype, weight, size);
  tiles().row.rms_norm(x, weight, eps, out, size, dtype);
}

i64 block_floats(i64 cols) { return static_cast<i64>(row_bytes(cols) / sizeof(float)); }

// A row as every kind of matrix takes it; `blocks` is filled where a packed one will read it.
Row as_row(const float* values, i64 cols, float* blocks, bool packed) {
  if (packed) quantise_row(values, cols, blocks);
  return {values, blocks};
}

// ---- products -------------------------------------------------------------------------------------------------

// Some rows of a matrix; none without one. First and rows are multiples of kBlock, but for the last rows.
struct Piece {
  const Matrix* matrix = nullptr;
  i64 first = 0, rows = 0;

  i64 padded() const { return ceil_div(rows, kStrip) * kStrip; }
  const char* plain() const {
    return static_cast<const char*>(matrix->data) +
           first * matrix->cols * static_cast<i64>(element_size(matrix->kind));
  }
};

// One or two pieces that are read together, and written one after the other, each padded to whole strips.
struct Pieces {
  Piece piece[2];
  int count = 0;

  void add(const Matrix& m, i64 first) {
    if (m.data) piece[count++] = {&m, first, std::min(rows_a_task(m), m.rows - first)};
  }
  bool same_strips() const {
    const Matrix &a = *piece[0].matrix, &b = *piece[count - 1].matrix;
    return is_packed(a) && a.kind == b.kind && a.group == b.group && a.symmetric == b.symmetric && a.cols == b.cols;
  }
  i64 strips(const unsigned char** out) const {
    i64 found = 0;
    for (int p = 0; p < count; ++p) {
      const Strips where(*piece[p].matrix);
      for (i64 r = 0; r < piece[p].rows; r += kStrip) out[found++] = where.at(*piece[p].matrix, piece[p].first + r);
    }
    return found;
  }
};

constexpr i64 kMostStrips = 2 * kPackedRows / kStrip;

// out = the pieces times x; what this thread multiplies next is prefetched.
void multiply(const Pieces& now, const Pieces& next, const Row& x, float* out) {
  if (now.same_strips()) {
    const unsigned char *strips[kMostStrips], *then[kMostStrips];
    const i64 count = now.strips(strips);
    i64 known = next.count && next.same_strips() ? next.strips(then) : 0;
    for (; known < count; ++known) then[known] = strips[known];
    const Tokens one{0, 1, x.blocks, &x.values};
    return multiply_strips(*now.piece[0].matrix, strips, then, count, one, out, 0);
  }
  for (int p = 0; p < now.count; ++p) {
    const Piece &each = now.piece[p], &after = p + 1 < now.count ? now.piece[p + 1] : next.piece[0];
    const Matrix& m = *each.matrix;
    if (is_packed(m)) {
      matvec(m, x, each.first, each.rows, out);
    } else {
      const bool alike = after.matrix && after.matrix->kind == m.kind && after.matrix->cols == m.cols;
      const char* then = alike ? after.plain() : each.plain();
      tiles().row.matvec[m.kind](each.plain(), m.cols, x.values, out, each.rows, m.cols, then);
    }
    out += each.padded();
  }
}

// What a task of one linear layer multiplies.
Pieces task_of(const Linear& layer, i64 task) {
  Pieces pieces;
  pieces.add(layer.weight, task * rows_a_task(layer.weight));
  return pieces;
}

// Rounded, plus the bias, rounded.
void add_bias(const Linear& layer, i64 first, i64 rows, float* out, int dtype) {
  round_to(dtype, out, rows);
  if (!layer.bias.data) return;
  float bias[kMaxRows];
  load(layer.bias, first, rows, bias);
  tiles().row.add_rounded(out, bias, rows, dtype);
}

// emit(which, first, values, rows) for every task of some layers that read the same row.
template <class Emit>
void apply(const Linear* const* layers, int count, const Row& x, int dtype, int threads, const Emit& emit) {
  i64 total = 0;
  for (int i = 0; i < count; ++i) total += tasks_of(layers[i]->weight);
  const auto find = [&](i64 task, int& which) {
    for (which = 0; task >= tasks_of(layers[which]->weight); ++which) task -= tasks_of(layers[which]->weight);
    return task_of(*layers[which], task);
  };
  parallel_ahead(total, threads, [&](i64 i, i64 next) {
    float out[kMaxRows];
    int which, after;
    const Pieces now = find(i, which);
    multiply(now, next < 0 ? Pieces{} : find(next, after), x, out);
    add_bias(*layers[which], now.piece[0].first, now.piece[0].rows, out, dtype);
    emit(which, now.piece[0].first, out, now.piece[0].rows);
  });
}

// ---- attention ------------------------------------------------------------------------------------------------

struct Heads {
  const Attention& layer;
  float* qkv;  // H + 2·Hkv heads: queries, keys, values
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
    float* weight = static_cast<float*>(thread_scratch((d + group * (2 * d + kSplit)) * sizeof(float)));
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
      quant_tiles().add_scaled(out_Hd + head * d, parts_Hnd + (head * splits + n) * d,
                               std::exp(max[n] - most) / total, d);
    round_to(layer.dtype, out_Hd + head * d, d);
  }
};

// ---- MLP ------------------------------------------------------------------------------------------------------

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
  top_k(probs_E, experts, router.top_k, routes.ids_K);
  if (router.softmax_first) softmax(probs_E, experts);
  float* weights = routes.weights_K;
  for (i64 k = 0; k < router.top_k; ++k) weights[k] = probs_E[routes.ids_K[k]];
  if (!router.softmax_first) softmax(weights, router.top_k);
  float total = 0.0f;
  for (i64 k = 0; k < router.top_k; ++k) total += weights[k];
  for (i64 k = 0; k < router.top_k; ++k)
    weights[k] = (router.normalise ? weights[k] / total : weights[k]) * router.scale;
}

bool reads_blocks(const MLP& mlp) { return is_packed(mlp.gate.weight) || is_packed(mlp.up.weight); }

// The MLPs that a token passes: its experts in the order of the assignments, then the shared one.
struct Layer {
  const Sparse& layer;
  const Routes& routes;
  Row h;
  float *hidden, *blocks;  // of the experts, then of the shared MLP
  float shared_weight;

  i64 count() const { return routes.count + (has_shared() ? 1 : 0); }
  bool has_shared() const { return layer.shared.gate.weight.data; }
  const MLP& mlp(i64 slot) const { return slot < routes.count ? layer.experts[routes.ids_K[slot]] : layer.shared; }
  i64 inner(i64 slot) const { return mlp(slot).gate.weight.rows; }
  i64 expert_inner() const { return layer.experts.empty() ? 0 : layer.experts[0].gate.weight.rows; }
  float* hidden_of(i64 slot) const { return hidden + slot * expert_inner(); }
  float* blocks_of_slot(i64 slot) const { return blocks + slot * block_floats(expert_inner()); }
  Row row_of(i64 slot) const { return {hidden_of(slot), blocks_of_slot(slot)}; }

  // Hidden units: kBlock of them in packed matrices, so that gate and up are four strips together.
  static i64 units(const MLP& mlp) { return reads_blocks(mlp) ? kBlock : rows_a_task(mlp.gate.weight); }
  i64 hidden_tasks(i64 slot) const { return ceil_div(inner(slot), units(mlp(slot))); }

  Pieces hidden_pieces(i64 slot, i64 first) const {
    const MLP& each = mlp(slot);
    Pieces pieces;
    for (const Linear* linear : {&each.gate, &each.up}) {
      pieces.add(linear->weight, first);
      Piece& piece = pieces.piece[pieces.count - 1];
      piece.rows = std::min(piece.rows, units(each));
    }
    return pieces;
  }

  // The slot, one of some, and first unit of a task.
  i64 find(i64 task, const i64* some, i64& slot) const {
    for (slot = *some; task >= hidden_tasks(slot); slot = *++some) task -= hidden_tasks(slot);
    return task * units(mlp(slot));
  }

  void hidden_task(i64 task, i64 next, const i64* some) const {
    float out[2 * kMaxRows];
    i64 slot, next_slot = 0;
    const i64 first = find(task, some, slot);
    const Pieces now = hidden_pieces(slot, first);
    const i64 next_first = next < 0 ? 0 : find(next, some, next_slot);
    multiply(now, next < 0 ? Pieces{} : hidden_pieces(next_slot, next_first), h, out);
    const MLP& each = mlp(slot);
    const i64 rows = now.piece[0].rows;
    float* up = now.count > 1 ? out + now.piece[0].padded() : nullptr;
    add_bias(each.gate, first, rows, out, kF32);
    if (up) add_bias(each.up, first, rows, up, kF32);
    quant_tiles().glu(out, up, rows, layer.activation);
    round_to(layer.dtype, out, rows);
    keep(slot, first, rows, out);
  }

  // For the second matrix; the last task also clears the blocks that fill a row up.
  void keep(i64 slot, i64 first, i64 rows, const float* values) const {
    if (!is_packed(mlp(slot).down.weight)) {
      std::copy_n(values, rows, hidden_of(slot) + first);
      return;
    }
    const i64 last = first + rows == inner(slot) ? blocks_of(inner(slot)) : (first + rows) / kBlock;
    for (i64 block = first / kBlock; block < last; ++block) {
      const i64 from = std::min(block * kBlock - first, rows);
      char* record = reinterpret_cast<char*>(blocks_of_slot(slot)) + block * static_cast<i64>(kRecord);
      quant_tiles().quantise(values + from, std::min(kBlock, rows - from), record, 1, 0);
    }
  }

  Pieces down_pieces(i64 slot, i64 first, i64 rows) const {
    Pieces pieces;
    pieces.piece[pieces.count++] = {&mlp(slot).down.weight, first, rows};
    return pieces;
  }

  // Some rows of every MLP's output, weighted, summed in order, and added to x.
  void down_task(float* x, i64 first, i64 rows, i64 next, i64 next_rows) const {
    float sum[kMaxRows] = {}, out[kMaxRows];
    for (i64 slot = 0; slot < count(); ++slot) {
      Pieces then;
      if (slot + 1 < count())
        then = down_pieces(slot + 1, first, rows);
      else if (next >= 0)
        then = down_pieces(0, next, next_rows);
      multiply(down_pieces(slot, first, rows), then, row_of(slot), out);
      const bool shared = slot == routes.count;
      add_bias(mlp(slot).down, first, rows, out, shared ? layer.dtype : kF32);
      if (shared) {
        float weighted[kMaxRows] = {};
        quant_tiles().add_scaled(weighted, out, shared_weight, rows);
        round_to(layer.dtype, sum, rows);
        tiles().row.add_rounded(sum, weighted, rows, layer.dtype);
      } else {
        quant_tiles().add_scaled(sum, out, routes.weights_K[slot], rows);
      }
    }
    tiles().row.add_rounded(x + first, sum, rows, layer.dtype);
  }
};

// Where things are in the memory of one token: offsets in floats, each at 64 bytes.
struct State {
  const Sparse& sparse;
  i64 width, h, scratch, shared_weight, hidden, h_blocks, blocks, end = 0;

  State(const Sparse& layer, i64 count) : sparse(layer) {
    const MLP& any = layer.experts.empty() ? layer.shared : layer.experts[0];
    const i64 inner = layer.experts.empty() ? 0 : any.gate.weight.rows, shared = layer.shared.gate.weight.rows;
    width = any.gate.weight.cols;
    h = take(width);
    scratch = take(std::max(width, layer.router.weight.rows));
    shared_weight = take(1);
    hidden = take(inner * count + shared);
    h_blocks = take(block_floats(width));
    blocks = take(count * block_floats(inner) + block_floats(shared));
  }

  i64 take(i64 floats) {
    const i64 begin = end;
    end += ceil_div(floats, 16) * 16;
    return begin;
  }
  i64 size() const { return end; }
  Layer layer(const Routes& routes, float* memory) const {
    const Row row{memory + h, memory + h_blocks};
    return {sparse, routes, row, memory + hidden, memory + blocks, memory[shared_weight]};
  }
};

void check_ids(const Routes& routes, i64 experts) {
  for (i64 k = 0; k < routes.count; ++k)
    if (routes.ids_K[k] < 0 || routes.ids_K[k] >= experts)
      throw std::invalid_argument("expert id " + std::to_string(routes.ids_K[k]) + " is not one of 0 to " +
                                  std::to_string(experts - 1));
}

}  // namespace

void attention_step(const Attention& layer, float* x_D, const float* cosine, const float* sine, const Cache& cache,
                    i64 position, int threads) {
  const i64 hidden = layer.q.weight.cols, d = layer.head_dim, q_rows = layer.heads * d, kv_rows = layer.kv_heads * d;
  const i64 splits = ceil_div(position + 1, kSplit);
  const i64 floats = 2 * hidden + 2 * q_rows + 2 * kv_rows + layer.heads * splits * (d + 2);
  const i64 block_size = block_floats(std::max(hidden, q_rows));
  Workspace memory(Workspace::size_of<float>(floats) + Workspace::size_of<float>(block_size));
  float* h = memory.take<float>(floats);
  float *weight = h + hidden, *qkv = weight + hidden, *out_Hd = qkv + q_rows + 2 * kv_rows;
  float *parts_Hnd = out_Hd + q_rows, *max_Hn = parts_Hnd + layer.heads * splits * d;
  float* blocks = memory.take<float>(block_size);
  norm(layer.norm, layer.eps, x_D, hidden, weight, h, layer.dtype);

  const Linear *inputs[] = {&layer.q, &layer.k, &layer.v}, *output = &layer.o;
  float* parts[] = {qkv, qkv + q_rows, qkv + q_rows + kv_rows};
  const bool packed = is_packed(layer.q.weight) || is_packed(layer.k.weight) || is_packed(layer.v.weight);
  apply(inputs, 3, as_row(h, hidden, blocks, packed), layer.dtype, threads,
        [&](int which, i64 first, const float* values, i64 rows) { std::copy_n(values, rows, parts[which] + first); });

  const Heads heads{layer,  qkv,       cosine, sine,   cache, position, splits, out_Hd, parts_Hnd,
                    max_Hn, max_Hn + layer.heads * splits};
  parallel_for(layer.kv_heads * splits, threads, [&](i64 i) { heads.attend(i / splits, i % splits); });
  for (i64 head = 0; head < layer.heads; ++head) heads.merge(head);

  apply(&output, 1, as_row(out_Hd, q_rows, blocks, is_packed(layer.o.weight)), layer.dtype, threads,
        [&](int, i64 first, const float* values, i64 rows) {
          tiles().row.add_rounded(x_D + first, values, rows, layer.dtype);
        });
}

i64 mlp_state_size(const Sparse& layer, i64 count) { return State(layer, count).size(); }

void mlp_begin(const Sparse& layer, const float* x_D, const Routes& routes, float* memory, int threads) {
  const State state(layer, routes.count);
  float* h = memory + state.h;
  norm(layer.norm, layer.eps, x_D, state.width, memory + state.scratch, h, layer.dtype);
  const bool packed = std::any_of(layer.experts.begin(), layer.experts.end(), reads_blocks) ||
                      reads_blocks(layer.shared) || is_packed(layer.router.weight) || is_packed(layer.shared_gate);
  const Row row = as_row(h, state.width, memory + state.h_blocks, packed);
  const Linear gate{layer.shared_gate, {}}, router{layer.router.weight, {}};
  const Linear* inputs[] = {&gate, &router};
  apply(inputs, routes.logits_E ? 2 : 1, row, kF32, threads, [&](int which, i64 first, const float* values, i64 rows) {
    std::copy_n(values, rows, which ? routes.logits_E + first : memory + state.shared_weight);
  });
  float& shared_weight = memory[state.shared_weight];
  shared_weight = layer.shared_gate.data ? 1.0f / (1.0f + std::exp(-shared_weight)) : 1.0f;
  if (routes.logits_E) choose(layer.router, routes, memory + state.scratch);
  check_ids(routes, static_cast<i64>(layer.experts.size()));
}

void mlp_hidden(const Sparse& layer, const Routes& routes, const std::vector<i64>& slots, float* memory, int threads) {
  const Layer work = State(layer, routes.count).layer(routes, memory);
  i64 tasks = 0;
  for (const i64 slot : slots) {
    if (slot < 0 || slot >= work.count()) throw std::invalid_argument("there is no slot " + std::to_string(slot));
    tasks += work.hidden_tasks(slot);
  }
  parallel_ahead(tasks, threads, [&](i64 i, i64 next) { work.hidden_task(i, next, slots.data()); });
}

void mlp_finish(const Sparse& layer, float* x_D, const Routes& routes, float* memory, int threads) {
  const State state(layer, routes.count);
  const Layer work = state.layer(routes, memory);
  i64 step = kMaxRows;
  for (i64 slot = 0; slot < work.count(); ++slot) step = std::min(step, rows_a_task(work.mlp(slot).down.weight));
  const auto rows_from = [&](i64 first) { return std::min(step, state.width - first); };
  parallel_ahead(ceil_div(state.width, step), threads, [&](i64 i, i64 next) {
    work.down_task(x_D, i * step, rows_from(i * step), next < 0 ? -1 : next * step, rows_from(next * step));
  });
}

void mlp_step(const Sparse& layer, float* x_D, const Routes& routes, int threads) {
  const i64 size = mlp_state_size(layer, routes.count);
  Workspace memory(Workspace::size_of<float>(size));
  float* state = memory.take<float>(size);
  mlp_begin(layer, x_D, routes, state, threads);
  thread_local std::vector<i64> slots;
  slots.resize(routes.count + (layer.shared.gate.weight.data ? 1 : 0));
  std::iota(slots.begin(), slots.end(), i64{0});
  mlp_hidden(layer, routes, slots, state, threads);
  mlp_finish(layer, x_D, routes, state, threads);
}

void place(Sparse& layer, i64 expert, const void* gate, const void* up, const void* down) {
  if (expert < 0 || expert >= static_cast<i64>(layer.experts.size()))
    throw std::invalid_argument("there is no expert " + std::to_string(expert));
  MLP& mlp = layer.experts[expert];
  mlp.gate.weight.data = gate;
  mlp.up.weight.data = up;
  mlp.down.weight.data = down;
}

void linear_row(const Linear& layer, const void* x, void* out, int dtype, int threads) {
  const i64 cols = layer.weight.cols, width = static_cast<i64>(element_size(dtype));
  const bool packed = is_packed(layer.weight);
  const i64 block_size = packed ? block_floats(cols) : 0;
  Workspace memory(Workspace::size_of<float>(cols) + Workspace::size_of<float>(block_size));
  float* values = memory.take<float>(cols);
  tiles().row.load[dtype](x, values, cols);
  const Linear* only = &layer;
  const Row row = as_row(values, cols, memory.take<float>(block_size), packed);
  apply(&only, 1, row, dtype, threads, [&](int, i64 first, const float* part, i64 rows) {
    tiles().row.store[dtype](part, static_cast<char*>(out) + first * width, rows);
  });
}

}  // namespace moekit
