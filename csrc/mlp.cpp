#include "mlp.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "workspace.h"

namespace moekit {
namespace {

constexpr i64 kRowsATask = 256;       // rows of A that pass one panel: their result stays in L2
constexpr i64 kTokensATask = 4096;    // the largest fp32 sum of a panel's columns that stays in L2
constexpr i64 kOuterRows = 576;       // rows of a weight's gradient in a task, which packs the other operand once
constexpr i64 kOuterDepth = 512;      // rows of an expert that its operands hold at a time
constexpr i64 kAlone = 1 << 21;       // multiplications that one thread has done before others have begun

// Rows by expert, each expert's in token order.
struct Order {
  std::vector<i64> first;  // (E + 1): the first row of each expert, and the number of rows
  std::vector<i64> slots;  // the assignment of each row
  std::vector<i64> tokens;
  std::vector<float> weights;

  Order(const MlpInputs& in, const Mlp& s) : first(s.experts + 2, 0) {
    for (i64 a = 0; a < s.assignments; ++a) {
      const i64 expert = in.expert_ids_A[a], token = in.token_ids_A[a];
      if (expert < 0 || expert > s.experts)
        throw std::invalid_argument("expert id " + std::to_string(expert) + " is not one of 0 to " +
                                    std::to_string(s.experts));
      if (token < (a ? in.token_ids_A[a - 1] : 0) || token >= s.tokens)
        throw std::invalid_argument("token_ids_A must ascend from 0 to below " + std::to_string(s.tokens) + ", but [" +
                                    std::to_string(a) + "] is " + std::to_string(token));
      ++first[expert + 1];
    }
    for (i64 e = 0; e <= s.experts; ++e) first[e + 1] += first[e];
    std::vector<i64> next(first.begin(), first.end() - 1);
    slots.resize(s.assignments);
    for (i64 a = 0; a < s.assignments; ++a) slots[next[in.expert_ids_A[a]]++] = a;
    first.pop_back();
    tokens.reserve(rows());
    weights.reserve(rows());
    for (i64 r = 0; r < rows(); ++r) {
      tokens.push_back(in.token_ids_A[slots[r]]);
      weights.push_back(in.weights_A[slots[r]]);
    }
  }

  i64 rows() const { return first.back(); }
};

i64 chunks(i64 n, i64 size) { return (n + size - 1) / size; }

// An array of rows of words, as products read them.
struct Rows {
  char* data = nullptr;
  i64 ld = 0;  // numbers from row to row
};

struct Task {
  i64 expert, row, rows, part;
};

class Layer {
 public:
  Layer(const MlpInputs& in, const Mlp& s) : in_(in), s_(s), p_(panels(s.dtype)), order_(in, s) {
    if (order_.rows() * s.hidden * s.inner.width() < kAlone) s_.threads = 1;
  }

  void forward(void* out_TD, void* pre_AG);
  void backward(const void* grad_TD, const void* pre_AG, const MlpGradients& out);

 private:
  i64 width(i64 numbers) const { return chunks(numbers, p_.step) * p_.step; }
  i64 words(i64 numbers) const { return chunks(numbers, p_.step); }
  size_t bytes_of(i64 rows, i64 numbers) const {
    return Workspace::size_of<char>((rows + kRowStep) * width(numbers) * p_.row_bytes);
  }
  Rows new_rows(Workspace& memory, i64 rows, i64 numbers) const {
    return {memory.take<char>(static_cast<i64>(bytes_of(rows, numbers))), width(numbers)};
  }
  char* row(const Rows& rows, i64 r) const { return rows.data + r * rows.ld * p_.row_bytes; }
  const char* element(const void* base, i64 i) const {
    return static_cast<const char*>(base) + i * static_cast<i64>(element_size(s_.dtype));
  }
  char* element(void* base, i64 i) const {
    return static_cast<char*>(base) + i * static_cast<i64>(element_size(s_.dtype));
  }

  Rows gather(Workspace& memory, const void* from, int dtype) const;
  std::vector<Task> row_tasks(i64 parts) const;
  void activate(const Rows& x, const Rows& hidden, void* pre_AG) const;
  void activate_backward(const Rows& grad, const void* pre_AG, const Rows& grad_pre, const Rows& weighted,
                         float* parts) const;
  using Pack = std::function<void(i64 expert, i64 first, i64 cols, void* panel)>;
  void sum_by_token(const Rows& rows, i64 depth, const float* weights, const void* bias_ED, void* out_TD, int dtype,
                    const Pack& pack) const;
  struct Side {
    Rows rows;
    i64 width;
  };
  void outer(const Side& left, const Side& right, const float* weights, void* out, void* bias) const;
  void outer_task(const Task& task, const Side& left, const Side& right, void* out) const;
  void router_gradient(const Rows& grad, const float* parts, i64 count, float* out_A) const;

  const MlpInputs in_;
  Mlp s_;
  const Panels& p_;
  const Order order_;
};

// x or its gradient in expert order: products read even rows best, and read them once a panel.
Rows Layer::gather(Workspace& memory, const void* from, int dtype) const {
  const Rows rows = new_rows(memory, order_.rows(), s_.hidden);
  constexpr i64 kSome = 64;
  parallel_for(chunks(order_.rows(), kSome), s_.threads, [&](i64 i) {
    for (i64 r = i * kSome; r < std::min(order_.rows(), (i + 1) * kSome); ++r)
      p_.to_row(static_cast<const char*>(from) + order_.tokens[r] * s_.hidden * static_cast<i64>(element_size(dtype)),
                dtype, s_.hidden, row(rows, r));
  });
  return rows;
}

// Each part of each expert that has rows.
std::vector<Task> Layer::row_tasks(i64 parts) const {
  std::vector<Task> tasks;
  for (i64 e = 0; e < s_.experts; ++e)
    if (order_.first[e + 1] > order_.first[e])
      for (i64 part = 0; part < parts; ++part)
        tasks.push_back({e, order_.first[e], order_.first[e + 1] - order_.first[e], part});
  return tasks;
}

void Layer::activate(const Rows& x, const Rows& hidden, void* pre_AG) const {
  const i64 cols = s_.inner.gated ? p_.columns / 2 : p_.columns, inner = s_.inner.inner, width = s_.inner.width();
  const std::vector<Task> tasks = row_tasks(chunks(inner, cols));
  const i64 panel_bytes = words(s_.hidden) * p_.columns * 4;
  parallel_for(static_cast<i64>(tasks.size()), s_.threads, [&](i64 i) {
    const Task& t = tasks[i];
    char* panel = static_cast<char*>(thread_scratch(panel_bytes + kRowsATask * p_.columns * 4));
    float* c = reinterpret_cast<float*>(panel + panel_bytes);
    const i64 first = t.part * cols, some = std::min(cols, inner - first);
    const char* weight = element(in_.in_proj_EGD, (t.expert * width + first) * s_.hidden);
    const char* up = s_.inner.gated ? element(weight, inner * s_.hidden) : nullptr;
    p_.pack_columns(weight, up, s_.hidden, some, s_.hidden, panel);
    const void* bias = in_.in_bias_EG ? element(in_.in_bias_EG, t.expert * width) : nullptr;
    for (i64 r = t.row; r < t.row + t.rows; r += kRowsATask) {
      const i64 count = std::min(kRowsATask, t.row + t.rows - r);
      p_.multiply(row(x, r), words(x.ld), panel, count, words(s_.hidden), c, false);
      p_.activate(c, count, first, some, bias, pre_AG ? element(pre_AG, r * width) : nullptr, row(hidden, r),
                  hidden.ld, s_.inner);
    }
  });
}

// out_t = Σ over the token's rows of weight · (row · B_expert + bias). A task owns some columns of some tokens and
// goes through the experts in order, so that nothing is shared and every sum has one order.
void Layer::sum_by_token(const Rows& rows, i64 depth, const float* weights, const void* bias_ED, void* out_TD,
                         int dtype, const Pack& pack) const {
  const i64 parts = chunks(s_.hidden, p_.columns);
  const i64 splits = std::max<i64>(1, std::max(chunks(s_.tokens, kTokensATask),
                                               std::min(chunks(2 * s_.threads, std::max<i64>(parts, 1)),
                                                        chunks(s_.tokens, kRowsATask))));
  const i64 share = chunks(s_.tokens, splits), panel_bytes = words(depth) * p_.columns * 4;
  parallel_for(splits * parts, s_.threads, [&](i64 i) {
    const i64 from = i / parts * share, to = std::min(s_.tokens, from + share);
    if (from >= to) return;
    const i64 first = i % parts * p_.columns, cols = std::min(p_.columns, s_.hidden - first);
    const i64 row_bytes = p_.columns * 4;
    char* panel = static_cast<char*>(thread_scratch(panel_bytes + (kRowsATask + to - from) * row_bytes));
    float* c = reinterpret_cast<float*>(panel + panel_bytes);
    float* sums = c + kRowsATask * p_.columns;
    std::memset(sums, 0, (to - from) * row_bytes);
    for (i64 e = 0; e < s_.experts; ++e) {
      const auto begin = order_.tokens.begin() + order_.first[e], end = order_.tokens.begin() + order_.first[e + 1];
      const i64 r0 = std::lower_bound(begin, end, from) - order_.tokens.begin();
      const i64 r1 = std::lower_bound(begin, end, to) - order_.tokens.begin();
      if (r0 == r1) continue;
      pack(e, first, cols, panel);
      for (i64 r = r0; r < r1; r += kRowsATask) {
        const i64 count = std::min(kRowsATask, r1 - r);
        p_.multiply(row(rows, r), words(rows.ld), panel, count, words(depth), c, false);
        p_.add_to_tokens(c, count, &order_.tokens[r], from, weights ? weights + r : nullptr,
                         bias_ED ? element(bias_ED, e * s_.hidden + first) : nullptr, cols, sums);
      }
    }
    char* out = static_cast<char*>(out_TD) + (from * s_.hidden + first) * static_cast<i64>(element_size(dtype));
    p_.store(sums, to - from, cols, out, s_.hidden, dtype);
  });
}

void Layer::forward(void* out_TD, void* pre_AG) {
  Workspace memory(bytes_of(order_.rows(), s_.hidden) + bytes_of(order_.rows(), s_.inner.inner));
  const Rows hidden = new_rows(memory, order_.rows(), s_.inner.inner);
  activate(gather(memory, in_.x_TD, s_.dtype), hidden, pre_AG);
  const i64 inner = s_.inner.inner;
  sum_by_token(hidden, inner, order_.weights.data(), in_.down_bias_ED, out_TD, s_.out_dtype,
               [&](i64 expert, i64 first, i64 cols, void* panel) {
                 const char* weight = element(in_.down_proj_EDF, (expert * s_.hidden + first) * inner);
                 p_.pack_columns(weight, nullptr, inner, cols, inner, panel);
               });
}

// Everything that follows from the gradient of the hidden rows; what is null is not wanted.
void Layer::activate_backward(const Rows& grad, const void* pre_AG, const Rows& grad_pre, const Rows& weighted,
                              float* parts) const {
  const i64 inner = s_.inner.inner, count = chunks(inner, p_.columns);
  const std::vector<Task> tasks = row_tasks(count);
  const i64 panel_bytes = words(s_.hidden) * p_.columns * 4;
  const bool product = grad_pre.data || parts;
  parallel_for(static_cast<i64>(tasks.size()), s_.threads, [&](i64 i) {
    const Task& t = tasks[i];
    char* panel = static_cast<char*>(thread_scratch(panel_bytes + kRowsATask * p_.columns * 4));
    float* c = reinterpret_cast<float*>(panel + panel_bytes);
    const i64 first = t.part * p_.columns, some = std::min(p_.columns, inner - first);
    if (product)
      p_.pack_elements(element(in_.down_proj_EDF, t.expert * s_.hidden * inner), inner, first, some, s_.hidden,
                       panel);
    else
      std::memset(c, 0, kRowsATask * p_.columns * 4);
    for (i64 r = t.row; r < t.row + t.rows; r += kRowsATask) {
      const i64 rows = std::min(kRowsATask, t.row + t.rows - r);
      if (product) p_.multiply(row(grad, r), words(grad.ld), panel, rows, words(s_.hidden), c, false);
      p_.activate_backward(c, rows, first, some, element(pre_AG, r * s_.inner.width()), &order_.weights[r],
                           grad_pre.data ? row(grad_pre, r) : nullptr, grad_pre.ld,
                           weighted.data ? row(weighted, r) : nullptr, weighted.ld,
                           parts ? parts + r * count + t.part : nullptr, count, s_.inner);
    }
  });
}

// out_E = Σ over the rows of each expert of left ⊗ right, and bias_E = Σ weights · left.
void Layer::outer(const Side& left, const Side& right, const float* weights, void* out, void* bias) const {
  std::vector<Task> tasks;
  for (i64 e = 0; e < s_.experts; ++e)
    for (i64 m = 0; m < left.width; m += kOuterRows) tasks.push_back({e, m, std::min(kOuterRows, left.width - m), 0});
  parallel_for(static_cast<i64>(tasks.size()), s_.threads, [&](i64 i) {
    const Task& t = tasks[i];
    const i64 from = order_.first[t.expert], count = order_.first[t.expert + 1] - from;
    if (bias)
      p_.sum_rows(row(left.rows, from), left.rows.ld, count, weights ? weights + from : nullptr, t.row, t.rows,
                  element(bias, t.expert * left.width + t.row));
    if (out) outer_task(t, left, right, element(out, (t.expert * left.width + t.row) * right.width));
  });
}

void Layer::outer_task(const Task& t, const Side& left, const Side& right, void* out) const {
  const i64 begin = order_.first[t.expert], end = order_.first[t.expert + 1];
  if (begin == end) {
    std::memset(out, 0, t.rows * right.width * element_size(s_.dtype));
    return;
  }
  const i64 deepest = std::min(kOuterDepth, end - begin), parts = chunks(right.width, p_.columns);
  const i64 rows = chunks(t.rows, kRowStep) * kRowStep, tile = rows * p_.columns;
  const i64 tiles = end - begin > kOuterDepth ? parts : 1;
  const i64 panel_bytes = words(deepest) * p_.columns * 4;
  const i64 turned_bytes = static_cast<i64>(Workspace::size_of<float>(words(deepest) * rows));
  char* panel = static_cast<char*>(thread_scratch(panel_bytes + turned_bytes + tiles * tile * 4));
  char* turned = panel + panel_bytes;
  float* c = reinterpret_cast<float*>(turned + turned_bytes);
  for (i64 from = begin; from < end; from += kOuterDepth) {
    const i64 depth = std::min(kOuterDepth, end - from);
    p_.turn(row(left.rows, from), left.rows.ld, t.row, t.rows, depth, turned, words(deepest));
    for (i64 part = 0; part < parts; ++part) {
      const i64 first = part * p_.columns, cols = std::min(p_.columns, right.width - first);
      float* sums = c + (tiles > 1 ? part * tile : 0);
      p_.pack_rows(row(right.rows, from), right.rows.ld, first, cols, depth, panel);
      p_.multiply(turned, words(deepest), panel, t.rows, words(depth), sums, from > begin);
      if (from + depth == end) p_.store(sums, t.rows, cols, element(out, first), right.width, s_.dtype);
    }
  }
}

// d weight = grad · (expert's output, its bias included); the parts of a row are summed in order.
void Layer::router_gradient(const Rows& grad, const float* parts, i64 count, float* out_A) const {
  parallel_for(chunks(s_.assignments, kRowsATask), s_.threads, [&](i64 i) {
    i64 e = 0;
    for (i64 r = i * kRowsATask; r < std::min(s_.assignments, (i + 1) * kRowsATask); ++r) {
      float sum = 0.0f;
      if (r < order_.rows()) {
        for (i64 part = 0; part < count; ++part) sum += parts[r * count + part];
        while (r >= order_.first[e + 1]) ++e;
        if (in_.down_bias_ED)
          sum += p_.dot(row(grad, r), element(in_.down_bias_ED, e * s_.hidden), s_.hidden);
      }
      out_A[order_.slots[r]] = sum;
    }
  });
}

void Layer::backward(const void* grad_TD, const void* pre_AG, const MlpGradients& out) {
  const i64 rows = order_.rows(), inner = s_.inner.inner, width = s_.inner.width(), hidden = s_.hidden;
  const i64 parts = chunks(inner, p_.columns);
  Workspace memory(2 * bytes_of(rows, hidden) + bytes_of(rows, width) + bytes_of(rows, inner) +
                   Workspace::size_of<float>(rows * parts));
  const Rows grad = gather(memory, grad_TD, s_.out_dtype);
  Rows grad_pre, weighted;
  if (out.x_TD || out.in_proj_EGD || out.in_bias_EG) grad_pre = new_rows(memory, rows, width);
  if (out.down_proj_EDF) weighted = new_rows(memory, rows, inner);
  float* sums = out.weights_A ? memory.take<float>(rows * parts) : nullptr;
  if (grad_pre.data || weighted.data || sums) activate_backward(grad, pre_AG, grad_pre, weighted, sums);
  if (out.weights_A) router_gradient(grad, sums, parts, out.weights_A);
  if (out.x_TD)
    sum_by_token(grad_pre, width, nullptr, nullptr, out.x_TD, s_.dtype,
                 [&](i64 expert, i64 first, i64 cols, void* panel) {
                   p_.pack_elements(element(in_.in_proj_EGD, expert * width * hidden), hidden, first, cols, width,
                                    panel);
                 });
  if (out.in_proj_EGD || out.in_bias_EG)
    outer({grad_pre, width}, {gather(memory, in_.x_TD, s_.dtype), hidden}, nullptr, out.in_proj_EGD, out.in_bias_EG);
  if (out.down_proj_EDF || out.down_bias_ED)
    outer({grad, hidden}, {weighted, inner}, order_.weights.data(), out.down_proj_EDF, out.down_bias_ED);
}

}  // namespace

void moe_mlp(const MlpInputs& in, void* out_TD, void* pre_AG, const Mlp& s) { Layer(in, s).forward(out_TD, pre_AG); }

void moe_mlp_backward(const MlpInputs& in, const void* grad_TD, const void* pre_AG, const MlpGradients& out,
                      const Mlp& s) {
  Layer(in, s).backward(grad_TD, pre_AG, out);
}

}  // namespace moekit
