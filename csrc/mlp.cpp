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

constexpr i64 kRowsATime = 256;       // rows of A that pass one panel: their result stays in L2
constexpr i64 kRowsATask = 1024;      // rows of A that pass many panels
constexpr i64 kSumBytes = 1 << 20;    // what they give stays in L2
constexpr i64 kWordsATime = 64;       // rows of B, in words, that are packed at a time
constexpr i64 kTokensATask = 4096;    // tokens whose sums a task keeps while it goes through the experts
constexpr i64 kOuterRows = 1152;      // rows of a weight's gradient in a task, which packs the other operand once
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

// Some rows, and some columns of an expert's matrix.
struct Task {
  i64 expert, row, rows, first, cols;
};

// Some tokens from `from`, and some columns from `first`: their sums are panels of `tile` numbers.
struct Share {
  i64 from, first, end, tile;
  float* sums;
};

// A thread at work on a task.
class Working {
 public:
  explicit Working(const Panels& panels) : panels_(panels) { panels_.begin(); }
  ~Working() { panels_.end(); }
  Working(const Working&) = delete;
  Working& operator=(const Working&) = delete;

 private:
  const Panels& panels_;
};

// One array for the packed panels of B and the sums of a task.
struct Panes {
  char* panels;
  float* c;
  Panes(i64 panel_bytes, i64 sums) : panels(static_cast<char*>(thread_scratch(panel_bytes + sums * 4))) {
    c = reinterpret_cast<float*>(panels + panel_bytes);
  }
};

class Layer {
 public:
  Layer(const MlpInputs& in, const Mlp& s) : in_(in), s_(s), p_(panels(s.dtype)), order_(in, s) {
    if (order_.rows() * s.hidden * s.inner.width() < kAlone) s_.threads = 1;
  }

  void forward(void* out_TD, void* pre_AG);
  void backward(const void* grad_TD, const void* pre_AG, const MlpGradients& out);

 private:
  // Of a row: whole words, and a line more where rows would lie in the same sets of the caches.
  i64 width(i64 numbers) const {
    const i64 bytes = words(numbers) * 4;
    return (bytes % 1024 ? bytes : bytes + 64) / p_.row_bytes;
  }
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
  i64 tile(i64 rows) const { return chunks(rows, kRowStep) * kRowStep * p_.columns; }
  i64 panels_that_fit(i64 rows, i64 most) const;
  std::vector<Task> inner_tasks(i64 columns) const;
  void multiply_rows(const Rows& a, i64 r, i64 rows, const char* b, i64 ldb, i64 first, i64 cols, i64 depth,
                     const Panes& to) const;
  i64 packed_bytes(i64 cols) const { return kWordsATime * chunks(cols, p_.columns) * p_.columns * 4; }
  void activate(const Rows& x, const Rows& hidden, void* pre_AG) const;
  void activate_backward(const Rows& grad, const void* pre_AG, const Rows& grad_pre, const Rows& weighted,
                         float* parts) const;
  using Add = std::function<void(i64 expert, i64 row, i64 rows, const Share& to)>;
  i64 token_sums() const { return chunks(s_.hidden, p_.columns) * p_.columns * s_.tokens; }  // of all tokens, in panels
  void sum_by_token(Workspace& memory, void* out_TD, int dtype, const Add& add) const;
  void add_rows(const float* c, i64 row, i64 rows, i64 first, const float* weights, const void* bias_ED, i64 expert,
                const Share& to) const;
  void sum_input_gradient(Workspace& memory, const Rows& grad_pre, void* grad_x_TD) const;
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

// So many panels that their sums for so many rows stay in L2.
i64 Layer::panels_that_fit(i64 rows, i64 most) const {
  return std::clamp<i64>(kSumBytes / (4 * p_.columns * std::min(rows, kRowsATask)), 1, std::max<i64>(most, 1));
}

// The inner columns of each expert that has rows, `columns` of them to a panel: no task is more than a quarter of what
// a thread has to do.
std::vector<Task> Layer::inner_tasks(i64 columns) const {
  std::vector<Task> tasks;
  for (i64 e = 0; e < s_.experts; ++e) {
    const i64 row = order_.first[e], rows = order_.first[e + 1] - row;
    if (!rows) continue;
    const i64 most = chunks(chunks(s_.inner.inner * order_.rows(), 4 * s_.threads * rows), columns);
    const i64 cols = columns * panels_that_fit(rows, most);
    for (i64 first = 0; first < s_.inner.inner; first += cols)
      tasks.push_back({e, row, rows, first, std::min(cols, s_.inner.inner - first)});
  }
  return tasks;
}

void Layer::activate(const Rows& x, const Rows& hidden, void* pre_AG) const {
  const i64 half = s_.inner.gated ? p_.columns / 2 : p_.columns, inner = s_.inner.inner, width = s_.inner.width();
  const std::vector<Task> tasks = inner_tasks(half);
  parallel_for(static_cast<i64>(tasks.size()), s_.threads, [&](i64 i) {
    const Working working(p_);
    const Task& t = tasks[i];
    const Panes to(words(s_.hidden) * p_.columns * 4, chunks(t.cols, half) * tile(std::min(kRowsATask, t.rows)));
    const void* bias = in_.in_bias_EG ? element(in_.in_bias_EG, t.expert * width) : nullptr;
    for (i64 r = t.row; r < t.row + t.rows; r += kRowsATask) {
      const i64 rows = std::min(kRowsATask, t.row + t.rows - r);
      for (i64 at = 0; at < t.cols; at += half) {
        const char* gate = element(in_.in_proj_EGD, (t.expert * width + t.first + at) * s_.hidden);
        const char* up = s_.inner.gated ? element(gate, inner * s_.hidden) : nullptr;
        p_.pack_columns(gate, up, s_.hidden, std::min(half, t.cols - at), s_.hidden, to.panels);
        p_.multiply(row(x, r), words(x.ld), to.panels, rows, words(s_.hidden), to.c + at / half * tile(rows), false);
      }
      p_.activate(to.c, tile(rows), rows, t.first, t.cols, bias, pre_AG ? element(pre_AG, r * width) : nullptr,
                  row(hidden, r), hidden.ld, s_.inner);
    }
  });
}

// c = rows of A · some columns of B, whose rows are rows of memory. Only some of its rows are packed at a time: long
// pieces of a few pages are read twice as fast as pieces of a panel's width from every row.
void Layer::multiply_rows(const Rows& a, i64 r, i64 rows, const char* b, i64 ldb, i64 first, i64 cols, i64 depth,
                          const Panes& to) const {
  for (i64 at = 0; at < depth; at += kWordsATime * p_.step) {
    const i64 some = std::min(kWordsATime * p_.step, depth - at), panel_bytes = words(some) * p_.columns * 4;
    p_.pack_elements(element(b, at * ldb), ldb, first, cols, some, to.panels);
    for (i64 j = 0; j < chunks(cols, p_.columns); ++j)
      p_.multiply(row(a, r) + at * p_.row_bytes, words(a.ld), to.panels + j * panel_bytes, rows, words(some),
                  to.c + j * tile(rows), at > 0);
  }
}

// out_t = Σ over the token's rows of what `add` adds. A task owns some columns of some tokens and goes through the
// experts in order, so that nothing is shared and every sum has one order.
void Layer::sum_by_token(Workspace& memory, void* out_TD, int dtype, const Add& add) const {
  const i64 parts = std::max<i64>(1, chunks(s_.hidden, p_.columns));
  const i64 splits = std::max<i64>({1, chunks(s_.tokens, kTokensATask),
                                    std::min(chunks(s_.threads, parts), chunks(s_.tokens, kRowsATime))});
  const i64 wide = chunks(parts, chunks(s_.threads, splits)) * p_.columns;
  const i64 share = chunks(s_.tokens, splits), tasks = chunks(s_.hidden, wide);
  float* const all = memory.take<float>(token_sums());
  parallel_for(splits * tasks, s_.threads, [&](i64 i) {
    const Working working(p_);
    const i64 from = i / tasks * share, to = std::min(s_.tokens, from + share);
    if (from >= to) return;
    const i64 first = i % tasks * wide, end = std::min(s_.hidden, first + wide);
    float* const sums = all + from * parts * p_.columns + first * (to - from);
    const Share mine{from, first, end, (to - from) * p_.columns, sums};
    std::memset(sums, 0, chunks(end - first, p_.columns) * mine.tile * 4);
    for (i64 e = 0; e < s_.experts; ++e) {
      const auto begin = order_.tokens.begin() + order_.first[e], last = order_.tokens.begin() + order_.first[e + 1];
      const i64 r0 = std::lower_bound(begin, last, from) - order_.tokens.begin();
      const i64 r1 = std::lower_bound(begin, last, to) - order_.tokens.begin();
      if (r0 < r1) add(e, r0, r1 - r0, mine);
    }
    p_.store(sums, mine.tile, to - from, end - first,
             static_cast<char*>(out_TD) + (from * s_.hidden + first) * static_cast<i64>(element_size(dtype)), s_.hidden,
             dtype);
  });
}

// A panel of products, columns from `first`, to the sums of their tokens.
void Layer::add_rows(const float* c, i64 row, i64 rows, i64 first, const float* weights, const void* bias_ED,
                     i64 expert, const Share& to) const {
  p_.add_to_tokens(c, rows, &order_.tokens[row], to.from, weights ? weights + row : nullptr,
                   bias_ED ? element(bias_ED, expert * s_.hidden + first) : nullptr,
                   std::min(p_.columns, to.end - first), to.sums + (first - to.first) / p_.columns * to.tile);
}

void Layer::forward(void* out_TD, void* pre_AG) {
  const i64 inner = s_.inner.inner;
  Workspace memory(bytes_of(order_.rows(), s_.hidden) + bytes_of(order_.rows(), inner) +
                   Workspace::size_of<float>(token_sums()));
  const Rows hidden = new_rows(memory, order_.rows(), inner);
  activate(gather(memory, in_.x_TD, s_.dtype), hidden, pre_AG);
  sum_by_token(memory, out_TD, s_.out_dtype, [&](i64 expert, i64 from, i64 count, const Share& to) {
    const Panes mine(words(inner) * p_.columns * 4, tile(kRowsATime));
    for (i64 first = to.first; first < to.end; first += p_.columns) {
      p_.pack_columns(element(in_.down_proj_EDF, (expert * s_.hidden + first) * inner), nullptr, inner,
                      std::min(p_.columns, to.end - first), inner, mine.panels);
      for (i64 r = from; r < from + count; r += kRowsATime) {
        const i64 rows = std::min(kRowsATime, from + count - r);
        p_.multiply(row(hidden, r), words(hidden.ld), mine.panels, rows, words(inner), mine.c, false);
        add_rows(mine.c, r, rows, first, order_.weights.data(), in_.down_bias_ED, expert, to);
      }
    }
  });
}

// Everything that follows from the gradient of the hidden rows; what is null is not wanted.
void Layer::activate_backward(const Rows& grad, const void* pre_AG, const Rows& grad_pre, const Rows& weighted,
                              float* parts) const {
  const i64 inner = s_.inner.inner, count = chunks(inner, p_.columns);
  const std::vector<Task> tasks = inner_tasks(p_.columns);
  const bool product = grad_pre.data || parts;
  parallel_for(static_cast<i64>(tasks.size()), s_.threads, [&](i64 i) {
    const Working working(p_);
    const Task& t = tasks[i];
    const i64 sums = chunks(t.cols, p_.columns) * tile(std::min(kRowsATask, t.rows));
    const Panes to(packed_bytes(t.cols), sums);
    if (!product) std::memset(to.c, 0, sums * 4);
    for (i64 r = t.row; r < t.row + t.rows; r += kRowsATask) {
      const i64 rows = std::min(kRowsATask, t.row + t.rows - r);
      if (product)
        multiply_rows(grad, r, rows, element(in_.down_proj_EDF, t.expert * s_.hidden * inner), inner, t.first, t.cols,
                      s_.hidden, to);
      p_.activate_backward(to.c, tile(rows), rows, t.first, t.cols, element(pre_AG, r * s_.inner.width()),
                           &order_.weights[r], grad_pre.data ? row(grad_pre, r) : nullptr, grad_pre.ld,
                           weighted.data ? row(weighted, r) : nullptr, weighted.ld,
                           parts ? parts + r * count + t.first / p_.columns : nullptr, count, s_.inner);
    }
  });
}

void Layer::sum_input_gradient(Workspace& memory, const Rows& grad_pre, void* grad_x_TD) const {
  const i64 width = s_.inner.width();
  sum_by_token(memory, grad_x_TD, s_.dtype, [&](i64 expert, i64 from, i64 count, const Share& to) {
    for (i64 r = from; r < from + count; r += kRowsATask) {
      const i64 rows = std::min(kRowsATask, from + count - r);
      const i64 most = p_.columns * panels_that_fit(rows, chunks(to.end - to.first, p_.columns));
      const Panes mine(packed_bytes(most), most / p_.columns * tile(rows));
      for (i64 first = to.first; first < to.end; first += most) {
        const i64 cols = std::min(most, to.end - first);
        multiply_rows(grad_pre, r, rows, element(in_.in_proj_EGD, expert * width * s_.hidden), s_.hidden, first, cols,
                      width, mine);
        for (i64 j = 0; j * p_.columns < cols; ++j)
          add_rows(mine.c + j * tile(rows), r, rows, first + j * p_.columns, nullptr, nullptr, expert, to);
      }
    }
  });
}

// out_E = Σ over the rows of each expert of left ⊗ right, and bias_E = Σ weights · left.
void Layer::outer(const Side& left, const Side& right, const float* weights, void* out, void* bias) const {
  std::vector<Task> tasks;
  const i64 cols = std::min(kOuterRows, chunks(s_.experts * left.width, 4 * s_.threads * kRowStep) * kRowStep);
  for (i64 e = 0; e < s_.experts; ++e)
    for (i64 first = 0, row = order_.first[e]; first < left.width; first += cols)
      tasks.push_back({e, row, order_.first[e + 1] - row, first, std::min(cols, left.width - first)});
  parallel_for(static_cast<i64>(tasks.size()), s_.threads, [&](i64 i) {
    const Working working(p_);
    const Task& t = tasks[i];
    if (bias)
      p_.sum_rows(row(left.rows, t.row), left.rows.ld, t.rows, weights ? weights + t.row : nullptr, t.first, t.cols,
                  element(bias, t.expert * left.width + t.first));
    if (out) outer_task(t, left, right, element(out, (t.expert * left.width + t.first) * right.width));
  });
}

void Layer::outer_task(const Task& t, const Side& left, const Side& right, void* out) const {
  if (!t.rows) {
    std::memset(out, 0, t.cols * right.width * element_size(s_.dtype));
    return;
  }
  const i64 deepest = std::min(kOuterDepth, t.rows), parts = chunks(right.width, p_.columns), down = tile(t.cols);
  // Panels of sums: all of them if there is more to add later, else so many that they stay in L2.
  const i64 kept = t.rows > kOuterDepth ? parts : std::clamp<i64>(kSumBytes / (down * 4), 1, parts);
  const i64 panel_bytes = words(deepest) * p_.columns * 4;
  const i64 turned_bytes = words(deepest) * chunks(t.cols, kRowStep) * kRowStep * 4;
  const Panes to(panel_bytes + turned_bytes, kept * down);
  char* const turned = to.panels + panel_bytes;
  for (i64 from = t.row; from < t.row + t.rows; from += kOuterDepth) {
    const i64 depth = std::min(kOuterDepth, t.row + t.rows - from);
    p_.turn(row(left.rows, from), left.rows.ld, t.first, t.cols, depth, turned, words(deepest));
    for (i64 part = 0; part < parts; ++part) {
      const i64 first = part * p_.columns, end = std::min(first + p_.columns, right.width), at = part % kept;
      p_.pack_rows(row(right.rows, from), right.rows.ld, first, end - first, depth, to.panels);
      p_.multiply(turned, words(deepest), to.panels, t.cols, words(depth), to.c + at * down, from > t.row);
      if (from + depth == t.row + t.rows && (at == kept - 1 || part == parts - 1))
        p_.store(to.c, down, t.cols, end - first + at * p_.columns, element(out, first - at * p_.columns), right.width,
                 s_.dtype);
    }
  }
}

// d weight = grad · (expert's output, its bias included); the parts of a row are summed in order.
void Layer::router_gradient(const Rows& grad, const float* parts, i64 count, float* out_A) const {
  parallel_for(chunks(s_.assignments, kRowsATime), s_.threads, [&](i64 i) {
    i64 e = 0;
    for (i64 r = i * kRowsATime; r < std::min(s_.assignments, (i + 1) * kRowsATime); ++r) {
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
                   Workspace::size_of<float>(rows * parts) + Workspace::size_of<float>(token_sums()));
  const Rows grad = gather(memory, grad_TD, s_.out_dtype);
  Rows grad_pre, weighted;
  if (out.x_TD || out.in_proj_EGD || out.in_bias_EG) grad_pre = new_rows(memory, rows, width);
  if (out.down_proj_EDF) weighted = new_rows(memory, rows, inner);
  float* sums = out.weights_A ? memory.take<float>(rows * parts) : nullptr;
  if (grad_pre.data || weighted.data || sums) activate_backward(grad, pre_AG, grad_pre, weighted, sums);
  if (out.weights_A) router_gradient(grad, sums, parts, out.weights_A);
  if (out.x_TD) sum_input_gradient(memory, grad_pre, out.x_TD);
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
