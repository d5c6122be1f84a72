#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "parallel.h"
#include "workspace.h"

namespace moekit {
namespace {

// A tile of `dot`: few enough rows of A to stay in L2 while the columns pass, a multiple of every kDotCols.
constexpr i64 kDotRowsATask = 64, kDotColsATask = 48;
constexpr i64 kDecodeRowsATask = 48;

const char* at(const void* base, i64 index, int dtype) {
  return static_cast<const char*>(base) + index * static_cast<i64>(element_size(dtype));
}
char* at(void* base, i64 index, int dtype) {
  return static_cast<char*>(base) + index * static_cast<i64>(element_size(dtype));
}

// first[e] is the first row of expert e; first[E] is the number of rows that belong to somebody.
std::vector<i64> first_rows(const i64* counts_E, const Grouped& size) {
  std::vector<i64> first(size.experts + 1, 0);
  for (i64 e = 0; e < size.experts; ++e) {
    if (counts_E[e] < 0 || counts_E[e] > size.rows - first[e])
      throw std::invalid_argument("counts_E[" + std::to_string(e) + "] is " + std::to_string(counts_E[e]) + ", but " +
                                  std::to_string(size.rows - first[e]) + " of the " + std::to_string(size.rows) +
                                  " rows are left");
    first[e + 1] = first[e] + counts_E[e];
  }
  return first;
}

struct Task {
  i64 expert, row, rows, col, cols;
};

// Every (rows_a_task × cols_a_task) tile of (rows of expert e) × cols, tiles of the same columns next to each other.
void add_tasks(std::vector<Task>& tasks, i64 expert, i64 row0, i64 row1, i64 cols, i64 rows_a_task, i64 cols_a_task) {
  for (i64 col = 0; col < cols; col += cols_a_task)
    for (i64 row = row0; row < row1; row += rows_a_task)
      tasks.push_back({expert, row, std::min(rows_a_task, row1 - row), col, std::min(cols_a_task, cols - col)});
}

// An empty array has no address, which memset may not be given.
void zero_rows(void* out, i64 from, i64 to, i64 width, int dtype) {
  std::fill_n(at(out, from * width, dtype), (to - from) * width * static_cast<i64>(element_size(dtype)), '\0');
}

float activate(float x, int activation) {
  switch (activation) {
    case kSilu:
      return x / (1.0f + std::exp(-x));
    case kGelu:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case kGeluTanh:
      return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    default:
      return x < 0.0f ? 0.0f : x;  // a NaN passes
  }
}

std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void store(void* out, i64 index, float value, int dtype) {
  if (dtype == kF32)
    static_cast<float*>(out)[index] = value;
  else
    static_cast<std::uint16_t*>(out)[index] = to_bf16(value);
}

// The assignments (token · K + slot) of each expert that has any: weights stream once, whoever shares them.
struct Chosen {
  i64 expert;
  std::vector<i64> assignments;
};

std::vector<Chosen> group_by_expert(const i64* ids_TK, const Decode& size) {
  std::vector<i64> place(size.experts, -1);
  std::vector<Chosen> groups;
  for (i64 a = 0; a < size.tokens * size.top_k; ++a) {
    const i64 id = ids_TK[a];
    if (id < 0 || id >= size.experts)
      throw std::invalid_argument("expert id " + std::to_string(id) + " is not one of 0 to " +
                                  std::to_string(size.experts - 1));
    if (place[id] < 0) {
      place[id] = static_cast<i64>(groups.size());
      groups.push_back({id, {}});
    }
    groups[place[id]].assignments.push_back(a);
  }
  return groups;
}

// hidden[a, f] for `rows` inner units of one expert, rounded to the weights' type once.
void decode_in(const void* x_TD, const Chosen& group, const void* in_proj_EGD, i64 first, i64 rows, void* hidden_AF,
               const Decode& s) {
  const i64 n = static_cast<i64>(group.assignments.size());
  std::vector<const void*> tokens(n);
  for (i64 i = 0; i < n; ++i) tokens[i] = at(x_TD, group.assignments[i] / s.top_k * s.hidden, s.dtype);
  std::vector<float> gate(n * rows), up(s.gated ? n * rows : 0);
  const i64 weight = group.expert * (s.gated ? 2 : 1) * s.inner + first;
  const DotTile dot = tiles().dot_to_f32[s.dtype];
  dot(tokens.data(), at(in_proj_EGD, weight * s.hidden, s.dtype), s.hidden, gate.data(), rows, n, rows, s.hidden);
  if (s.gated)
    dot(tokens.data(), at(in_proj_EGD, (weight + s.inner) * s.hidden, s.dtype), s.hidden, up.data(), rows, n, rows,
        s.hidden);
  for (i64 i = 0; i < n; ++i)
    for (i64 r = 0; r < rows; ++r) {
      const float value = activate(gate[i * rows + r], s.activation) * (s.gated ? up[i * rows + r] : 1.0f);
      store(hidden_AF, group.assignments[i] * s.inner + first + r, value, s.dtype);
    }
}

void decode_down(const void* hidden_AF, const Chosen& group, const void* down_proj_EDF, i64 first, i64 rows,
                 float* parts_AD, const Decode& s) {
  const i64 n = static_cast<i64>(group.assignments.size());
  std::vector<const void*> hidden(n);
  for (i64 i = 0; i < n; ++i) hidden[i] = at(hidden_AF, group.assignments[i] * s.inner, s.dtype);
  std::vector<float> out(n * rows);
  const void* weight = at(down_proj_EDF, (group.expert * s.hidden + first) * s.inner, s.dtype);
  tiles().dot_to_f32[s.dtype](hidden.data(), weight, s.inner, out.data(), rows, n, rows, s.inner);
  for (i64 i = 0; i < n; ++i)
    std::copy_n(out.data() + i * rows, rows, parts_AD + group.assignments[i] * s.hidden + first);
}

void sum_slots(const float* parts_AD, const float* weights_TK, void* out_TD, i64 token, const Decode& s) {
  for (i64 d = 0; d < s.hidden; ++d) {
    float sum = 0.0f;
    for (i64 a = token * s.top_k; a < (token + 1) * s.top_k; ++a) sum += weights_TK[a] * parts_AD[a * s.hidden + d];
    store(out_TD, token * s.hidden + d, sum, s.dtype);
  }
}

}  // namespace

void grouped_mm(const void* rows_RI, const void* weight_EOI, const i64* counts_E, void* out_RO, const Grouped& s) {
  const std::vector<i64> first = first_rows(counts_E, s);
  std::vector<Task> tasks;
  for (i64 e = 0; e < s.experts; ++e)
    add_tasks(tasks, e, first[e], first[e + 1], s.out_width, kDotRowsATask, kDotColsATask);
  const DotTile dot = tiles().dot[s.dtype];
  parallel_for(static_cast<i64>(tasks.size()), s.threads, [&](i64 i) {
    const Task& t = tasks[i];
    const void* rows[kDotRowsATask];
    for (i64 r = 0; r < t.rows; ++r) rows[r] = at(rows_RI, (t.row + r) * s.in_width, s.dtype);
    const void* weight = at(weight_EOI, (t.expert * s.out_width + t.col) * s.in_width, s.dtype);
    void* out = at(out_RO, t.row * s.out_width + t.col, s.dtype);
    dot(rows, weight, s.in_width, out, s.out_width, t.rows, t.cols, s.in_width);
  });
  zero_rows(out_RO, first.back(), s.rows, s.out_width, s.dtype);
}

void grouped_mm_transposed(const void* rows_RO, const void* weight_EOI, const i64* counts_E, void* out_RI,
                           const Grouped& s) {
  const std::vector<i64> first = first_rows(counts_E, s);
  std::vector<Task> tasks;
  for (i64 e = 0; e < s.experts; ++e) {
    const bool few = counts_E[e] <= 4 * kStreamRows;  // beyond, packing the weight pays
    add_tasks(tasks, e, first[e], first[e + 1], s.in_width, few ? kStreamRows : kGemmRows,
              few ? kStreamCols : kGemmCols);
  }
  const GemmTile gemm = tiles().gemm[s.dtype];
  parallel_for(static_cast<i64>(tasks.size()), s.threads, [&](i64 i) {
    const Task& t = tasks[i];
    const void* rows = at(rows_RO, t.row * s.out_width, s.dtype);
    const void* weight = at(weight_EOI, t.expert * s.out_width * s.in_width + t.col, s.dtype);
    void* out = at(out_RI, t.row * s.in_width + t.col, s.dtype);
    gemm(rows, s.out_width, 1, weight, s.in_width, out, s.in_width, t.rows, t.cols, s.out_width,
         thread_scratch(kScratchBytes));
  });
  zero_rows(out_RI, first.back(), s.rows, s.in_width, s.dtype);
}

void grouped_outer(const void* rows_RO, const void* rows_RI, const i64* counts_E, void* out_EOI, const Grouped& s) {
  const std::vector<i64> first = first_rows(counts_E, s);
  std::vector<Task> tasks;  // here a task's rows are rows of the output, and depth is the expert's rows
  for (i64 e = 0; e < s.experts; ++e) add_tasks(tasks, e, 0, s.out_width, s.in_width, kGemmRows, kGemmCols);
  const GemmTile gemm = tiles().gemm[s.dtype];
  parallel_for(static_cast<i64>(tasks.size()), s.threads, [&](i64 i) {
    const Task& t = tasks[i];
    const void* left = at(rows_RO, first[t.expert] * s.out_width + t.row, s.dtype);
    const void* right = at(rows_RI, first[t.expert] * s.in_width + t.col, s.dtype);
    void* out = at(out_EOI, (t.expert * s.out_width + t.row) * s.in_width + t.col, s.dtype);
    gemm(left, 1, s.out_width, right, s.in_width, out, s.in_width, t.rows, t.cols, counts_E[t.expert],
         thread_scratch(kScratchBytes));
  });
}

void moe_decode(const void* x_TD, const i64* ids_TK, const float* weights_TK, const void* in_proj_EGD,
                const void* down_proj_EDF, void* out_TD, const Decode& s) {
  const std::vector<Chosen> groups = group_by_expert(ids_TK, s);
  const i64 assignments = s.tokens * s.top_k, active = static_cast<i64>(groups.size());
  const std::unique_ptr<char[]> hidden_AF(new char[assignments * s.inner * element_size(s.dtype)]);
  const std::unique_ptr<float[]> parts_AD(new float[assignments * s.hidden]);
  const auto each_chunk = [&](i64 width, auto body) {
    const i64 chunks = (width + kDecodeRowsATask - 1) / kDecodeRowsATask;
    parallel_for(active * chunks, s.threads, [&](i64 i) {
      const i64 chunk_first = i % chunks * kDecodeRowsATask;
      body(groups[i / chunks], chunk_first, std::min(kDecodeRowsATask, width - chunk_first));
    });
  };
  each_chunk(s.inner, [&](const Chosen& group, i64 chunk_first, i64 rows) {
    decode_in(x_TD, group, in_proj_EGD, chunk_first, rows, hidden_AF.get(), s);
  });
  each_chunk(s.hidden, [&](const Chosen& group, i64 chunk_first, i64 rows) {
    decode_down(hidden_AF.get(), group, down_proj_EDF, chunk_first, rows, parts_AD.get(), s);
  });
  parallel_for(s.tokens, s.threads, [&](i64 token) { sum_slots(parts_AD.get(), weights_TK, out_TD, token, s); });
}

}  // namespace moekit
