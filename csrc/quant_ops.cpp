#include "quant_ops.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "workspace.h"

namespace moekit {
namespace {

constexpr i64 kRowsATask = 4 * kStrip;   // of an output: as many streams from memory as a tile takes
constexpr i64 kUnitsATask = kBlock;      // of the inner width: one block of activations for the second matrix
constexpr i64 kTokensAtOnce = 1024;      // bounds the workspace; the weights are read again for the next ones
constexpr i64 kRowsAtOnce = 8192;

// Up to kMostTokens rows of one expert that are multiplied together; positions count rows in the experts' order.
struct Batch {
  i64 first, count;
  int size;
  i64 rows() const { return kTokens[size]; }
};

struct Group {
  i64 expert, first_batch, batches, rows;
};

// The batches of every expert that has rows.
struct Batches {
  std::vector<Group> groups;
  std::vector<Batch> all;
  i64 padded = 0;  // rows with those that fill records up

  void clear() {
    groups.clear();
    all.clear();
    padded = 0;
  }
  void add(i64 expert, i64 first, i64 rows) {
    groups.push_back({expert, static_cast<i64>(all.size()), (rows + kMostTokens - 1) / kMostTokens, rows});
    for (i64 done = 0; done < rows; done += kMostTokens) {
      const i64 count = std::min<i64>(kMostTokens, rows - done);
      all.push_back({first + done, count, token_size(count)});
      padded += all.back().rows();
    }
  }
};

// Rows as the batches multiply them.
struct Rows {
  i64 cols;
  char** records;        // of each batch
  const float* values;   // what plain matrices multiply; null where there are none
  const i64* row_of;     // the row of `values` at a position; null: the position itself

  i64 stride() const { return static_cast<i64>(row_bytes(cols)); }
  Tokens tokens(const Batches& b, i64 batch, const float* (&pointers)[kMostTokens]) const {
    const Batch& each = b.all[batch];
    if (values)
      for (i64 t = 0; t < each.count; ++t)
        pointers[t] = values + (row_of ? row_of[each.first + t] : each.first + t) * cols;
    return {each.size, each.count, records[batch], pointers};
  }
};

size_t bytes_of_records(const Batches& b, i64 cols) {
  return Workspace::size_of<char>(b.padded * static_cast<i64>(row_bytes(cols))) +
         Workspace::size_of<char*>(static_cast<i64>(b.all.size()));
}

// Room for every batch's records.
Rows take_records(Workspace& memory, const Batches& b, i64 cols) {
  Rows rows{cols, memory.take<char*>(static_cast<i64>(b.all.size())), nullptr, nullptr};
  char* at = memory.take<char>(b.padded * rows.stride());
  for (size_t i = 0; i < b.all.size(); ++i, at += b.all[i - 1].rows() * rows.stride()) rows.records[i] = at;
  return rows;
}

// One row's records become row t of `tokens`.
void interleave(const char* row, i64 blocks, char* records, i64 tokens, i64 t) {
  constexpr i64 kWords = kRecord / 4;
  for (; blocks; --blocks, row += kRecord, records += kRecord * tokens)
    for (i64 word = 0; word < kWords; ++word) std::memcpy(records + (word * tokens + t) * 4, row + word * 4, 4);
}

size_t bytes_of_quantised(const Batches& b, i64 rows, i64 cols) {
  return Workspace::size_of<char>(rows * static_cast<i64>(row_bytes(cols))) + bytes_of_records(b, cols);
}

// Every row of x in int8 once, then copied to the batches that multiply it; a batch of one row needs no copy.
Rows quantised(Workspace& memory, const Batches& b, const float* x, i64 rows, i64 cols, const i64* row_of,
               int threads) {
  Rows out = take_records(memory, b, cols);
  out.values = x;
  out.row_of = row_of;
  const i64 stride = out.stride();
  char* single = memory.take<char>(rows * stride);
  parallel_for(rows, rows * cols > (1 << 15) ? threads : 1,
               [&](i64 r) { quantise_row(x + r * cols, cols, single + r * stride); });
  const i64 batches = static_cast<i64>(b.all.size());
  parallel_for(batches, b.padded * cols > (1 << 15) ? threads : 1, [&](i64 i) {
    const Batch& batch = b.all[i];
    const auto row = [&](i64 t) { return single + (row_of ? row_of[batch.first + t] : batch.first + t) * stride; };
    if (batch.size == 0) {
      out.records[i] = row(0);
      return;
    }
    if (batch.count < batch.rows()) std::memset(out.records[i], 0, batch.rows() * stride);
    for (i64 t = 0; t < batch.count; ++t)
      interleave(row(t), blocks_of(cols), out.records[i], batch.rows(), t);
  });
  return out;
}

// The strips of a task, or none when the matrix is plain.
struct Run {
  const unsigned char* strips[kRowsATask / kStrip];
  i64 count = 0;

  void add(const Matrix& m, i64 first, i64 rows) {
    if (!is_packed(m)) return;
    const Strips where(m);
    for (i64 r = 0; r < rows; r += kStrip) strips[count++] = where.at(m, first + r);
  }
  // As many as `now` has: where this is shorter, there is nothing new to prefetch.
  void fill_up(const Run& now) {
    for (; count < now.count; ++count) strips[count] = now.strips[count];
  }
};

Run run_of(const Matrix& m, i64 first, i64 rows) {
  Run run;
  run.add(m, first, rows);
  return run;
}

// emit(position, row offset, values, n) for all the group's rows times `rows` rows of m. Two strips stay in the
// cache while many rows pass; few rows take all strips at once.
template <class Emit>
void multiply_group(const Matrix& m, i64 first, i64 rows, Run then, const Group& group, const Batches& b,
                    const Rows& x, const Emit& emit) {
  float out[kMostTokens * kRowsATask];
  const float* pointers[kMostTokens];
  const Run now = run_of(m, first, rows);
  then.fill_up(now);
  const i64 step = group.rows > 2 && now.count ? 2 * kStrip : kRowsATask;
  for (i64 r = 0; r < rows; r += step)
    for (i64 i = group.first_batch; i < group.first_batch + group.batches; ++i) {
      const Tokens tokens = x.tokens(b, i, pointers);
      const i64 n = std::min(step, rows - r), s = r / kStrip;
      if (now.count)
        multiply_strips(m, now.strips + s, then.strips + s, (n + kStrip - 1) / kStrip, tokens, out, kRowsATask);
      else
        multiply(m, first, rows, tokens, out, kRowsATask);
      for (i64 t = 0; t < tokens.count; ++t) emit(b.all[i].first + t, r, out + t * kRowsATask, n);
    }
}

// ---- grouped_mm -------------------------------------------------------------------------------------------------

struct Product {
  MatrixTable weight_E;
  i64 out_width, in_width, parts;
  int threads;
};

// Rows that fit the workspace, sorted by expert.
void multiply_some(const float* rows_RI, float* out_RO, i64 rows, const Batches& b, const Product& p) {
  Workspace memory(bytes_of_quantised(b, rows, p.in_width));
  const Rows x = quantised(memory, b, rows_RI, rows, p.in_width, nullptr, p.threads);
  const i64 part_rows = p.out_width / p.parts, a_part = (part_rows + kRowsATask - 1) / kRowsATask;
  const i64 chunks = p.parts * a_part;  // none crosses from one part into the next
  const auto first_of = [&](i64 task) {
    const i64 chunk = task % chunks;
    return chunk / a_part * part_rows + chunk % a_part * kRowsATask;
  };
  const auto rows_from = [&](i64 first) { return std::min(kRowsATask, part_rows - first % part_rows); };
  parallel_ahead(static_cast<i64>(b.groups.size()) * chunks, p.threads, [&](i64 i, i64 next) {
    const Group& group = b.groups[i / chunks];
    const i64 first = first_of(i);
    Run then;
    if (next >= 0) then = run_of(p.weight_E[b.groups[next / chunks].expert], first_of(next), rows_from(first_of(next)));
    multiply_group(p.weight_E[group.expert], first, rows_from(first), then, group, b, x,
                   [&](i64 position, i64 row, const float* values, i64 n) {
                     std::copy_n(values, n, out_RO + position * p.out_width + first + row);
                   });
  });
}

// ---- MoE ----------------------------------------------------------------------------------------------------------

// Who computes what for some tokens; vectors keep their memory from call to call.
struct Routed {
  Batches batches;
  std::vector<i64> token_of, assignment_of, next_of;  // by position; next_of: by expert

  void sort(const i64* ids_TK, const QuantMoE& s) {
    const i64 assignments = s.tokens * s.top_k;
    next_of.assign(s.experts + 1, 0);
    for (i64 a = 0; a < assignments; ++a) {
      if (ids_TK[a] < -1 || ids_TK[a] >= s.experts)
        throw std::invalid_argument("expert id " + std::to_string(ids_TK[a]) + " is not one of 0 to " +
                                    std::to_string(s.experts - 1));
      if (ids_TK[a] >= 0) ++next_of[ids_TK[a] + 1];
    }
    batches.clear();
    for (i64 e = 0; e < s.experts; ++e) {
      if (next_of[e + 1]) batches.add(e, next_of[e], next_of[e + 1]);
      next_of[e + 1] += next_of[e];
    }
    token_of.resize(next_of[s.experts]);
    assignment_of.resize(next_of[s.experts]);
    for (i64 a = 0; a < assignments; ++a) {
      if (ids_TK[a] < 0) continue;
      const i64 position = next_of[ids_TK[a]]++;
      token_of[position] = a / s.top_k;
      assignment_of[position] = a;
    }
  }
};

// Tokens that fit the workspace.
class Layer {
 public:
  Layer(const float* x_TD, const float* weights_TK, MatrixTable gate_up_E, MatrixTable down_E, float* out_TD,
        const Routed& routed, const QuantMoE& size)
      : weights_TK_(weights_TK), gate_up_E_(gate_up_E), down_E_(down_E), out_TD_(out_TD), routed_(routed),
        batches_(routed.batches), s_(size),
        memory_(bytes_of_quantised(batches_, s_.tokens, s_.hidden) + bytes_of_records(batches_, s_.inner) +
                Workspace::size_of<float>(plain_values())) {
    x_ = quantised(memory_, batches_, x_TD, s_.tokens, s_.hidden, routed.token_of.data(), s_.threads);
    hidden_ = take_records(memory_, batches_, s_.inner);
    if (plain_values()) hidden_.values = values_ = memory_.take<float>(plain_values());
  }

  void run() {
    const i64 chunks = (s_.inner + kUnitsATask - 1) / kUnitsATask;
    parallel_ahead(static_cast<i64>(batches_.groups.size()) * chunks, s_.threads, [&](i64 i, i64 next) {
      Run then;
      if (next >= 0) then = units_run(batches_.groups[next / chunks], next % chunks * kUnitsATask);
      units(batches_.groups[i / chunks], i % chunks * kUnitsATask, then);
    });
    if (s_.add && batches_.groups.empty()) return;
    parallel_ahead((s_.hidden + kRowsATask - 1) / kRowsATask, s_.threads,
                   [&](i64 i, i64 next) { combine(i * kRowsATask, next * kRowsATask); });
  }

 private:
  // Hidden values that are kept for plain matrices.
  i64 plain_values() const {
    const bool any = std::any_of(batches_.groups.begin(), batches_.groups.end(),
                                 [&](const Group& g) { return !is_packed(down_E_[g.expert]); });
    return any ? static_cast<i64>(routed_.token_of.size()) * s_.inner : 0;
  }

  i64 units_from(i64 first) const { return std::min(kUnitsATask, s_.inner - first); }

  Run units_run(const Group& group, i64 first) const {
    const Matrix m = gate_up_E_[group.expert];
    Run run = run_of(m, first, units_from(first));
    if (s_.gated) run.add(m, s_.inner + first, units_from(first));
    return run;
  }

  // act(gate) · up of some inner units for all of an expert's rows, in int8 where the second matrix is packed.
  void units(const Group& group, i64 first, Run then) const {
    const Matrix m = gate_up_E_[group.expert];
    const Run now = units_run(group, first);
    then.fill_up(now);
    const i64 n = units_from(first), second = (n + kStrip - 1) / kStrip * kStrip;
    float out[kMostTokens * kRowsATask];
    const float* pointers[kMostTokens];
    for (i64 i = group.first_batch; i < group.first_batch + group.batches; ++i) {
      const Tokens tokens = x_.tokens(batches_, i, pointers);
      if (now.count) {
        multiply_strips(m, now.strips, then.strips, now.count, tokens, out, kRowsATask);
      } else {
        multiply(m, first, n, tokens, out, kRowsATask);
        if (s_.gated) multiply(m, s_.inner + first, n, tokens, out + second, kRowsATask);
      }
      for (i64 t = 0; t < tokens.count; ++t)
        quant_tiles().glu(out + t * kRowsATask, s_.gated ? out + t * kRowsATask + second : nullptr, n, s_.activation);
      keep(out, i, first, n);
    }
  }

  void keep(const float* out, i64 batch, i64 first, i64 n) const {
    const Batch& b = batches_.all[batch];
    const i64 bytes = static_cast<i64>(kRecord) * b.rows(), block = first / kBlock;
    char* record = hidden_.records[batch] + block * bytes;
    for (i64 t = 0; t < b.rows(); ++t)
      quant_tiles().quantise(out + t * kRowsATask, t < b.count ? n : 0, record, static_cast<int>(b.rows()),
                             static_cast<int>(t));
    if (first + n == s_.inner) std::memset(record + bytes, 0, (blocks_of(s_.inner) - block - 1) * bytes);
    if (values_)
      for (i64 t = 0; t < b.count; ++t)
        std::copy_n(out + t * kRowsATask, n, values_ + (b.first + t) * s_.inner + first);
  }

  // Columns of the output, expert after expert: nobody else writes them.
  void combine(i64 first, i64 after) const {
    const i64 rows = std::min(kRowsATask, s_.hidden - first);
    const size_t bytes = static_cast<size_t>(s_.tokens * kRowsATask) * sizeof(float);
    // (T, 64) side by side: in the output they lie a row apart.
    float* sums = static_cast<float*>(thread_scratch(bytes));
    std::memset(sums, 0, bytes);
    if (s_.add)
      for (i64 t = 0; t < s_.tokens; ++t)
        std::copy_n(out_TD_ + t * s_.hidden + first, rows, sums + t * kRowsATask);
    for (const Group& group : batches_.groups) {
      Run then;
      if (&group != &batches_.groups.back())
        then = run_of(down_E_[(&group)[1].expert], first, rows);
      else if (after >= 0)
        then = run_of(down_E_[batches_.groups.front().expert], after, std::min(kRowsATask, s_.hidden - after));
      multiply_group(down_E_[group.expert], first, rows, then, group, batches_, hidden_,
                     [&](i64 position, i64 row, const float* values, i64 n) {
                       quant_tiles().add_scaled(sums + routed_.token_of[position] * kRowsATask + row, values,
                                                weights_TK_[routed_.assignment_of[position]], n);
                     });
    }
    for (i64 t = 0; t < s_.tokens; ++t)
      std::copy_n(sums + t * kRowsATask, rows, out_TD_ + t * s_.hidden + first);
  }

  const float* weights_TK_;
  MatrixTable gate_up_E_, down_E_;
  float* out_TD_;
  const Routed& routed_;
  const Batches& batches_;
  QuantMoE s_;
  Workspace memory_;
  Rows x_, hidden_;
  float* values_ = nullptr;  // hidden rows in fp32
};

}  // namespace

Matrix MatrixTable::operator[](i64 index) const {
  const i64* f = fields + 7 * index;
  return {reinterpret_cast<const void*>(f[0]), f[1], f[2], static_cast<int>(f[3]), static_cast<int>(f[4]),
          static_cast<int>(f[5]), f[6] != 0};
}

void quant_grouped_mm(const float* rows_RI, MatrixTable weight_E, const i64* counts_E, float* out_RO, i64 rows,
                      i64 experts, i64 out_width, i64 in_width, int threads) {
  i64 used = 0;
  for (i64 e = 0; e < experts; used += counts_E[e++])
    if (counts_E[e] < 0 || counts_E[e] > rows - used)
      throw std::invalid_argument("counts_E[" + std::to_string(e) + "] is " + std::to_string(counts_E[e]) + ", but " +
                                  std::to_string(rows - used) + " of the " + std::to_string(rows) + " rows are left");
  thread_local Batches batches;
  const Product product{weight_E, out_width, in_width, experts ? weight_E[0].parts : 1, threads};
  i64 expert = 0, first = 0, of_expert = 0;  // rows done, and those of this expert
  while (first < used) {
    batches.clear();
    i64 taken = 0;
    while (expert < experts && taken < kRowsAtOnce) {
      const i64 n = std::min(counts_E[expert] - of_expert, kRowsAtOnce - taken);
      if (n) batches.add(expert, taken, n);
      taken += n;
      of_expert += n;
      if (of_expert == counts_E[expert]) ++expert, of_expert = 0;
    }
    multiply_some(rows_RI + first * in_width, out_RO + first * out_width, taken, batches, product);
    first += taken;
  }
  std::fill(out_RO + used * out_width, out_RO + rows * out_width, 0.0f);
}

void quant_moe(const float* x_TD, const i64* ids_TK, const float* weights_TK, MatrixTable gate_up_E,
               MatrixTable down_E, float* out_TD, const QuantMoE& size) {
  thread_local Routed routed;
  for (i64 first = 0; first < size.tokens; first += kTokensAtOnce) {
    QuantMoE some = size;
    some.tokens = std::min(kTokensAtOnce, size.tokens - first);
    routed.sort(ids_TK + first * size.top_k, some);
    Layer(x_TD + first * size.hidden, weights_TK + first * size.top_k, gate_up_E, down_E, out_TD + first * size.hidden,
          routed, some)
        .run();
  }
}

}  // namespace moekit
