// The ops on every instruction set of this machine against plain loops in double: no Python, no PyTorch, so that
// sanitizers and emulators can run it. Every array is a heap block of exactly its size, filled with NaN: a read or
// write past its end is AddressSanitizer's, an element that nobody wrote is a failure.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "ops.h"
#include "top_k.h"
#include "workspace.h"

namespace {

using namespace moekit;

// exp, erf and tanh in fp32 between two such sums; for bf16 the hidden values are rounded too.
constexpr double kDecodeLimit[] = {3e-6, 8e-3};

// ---- the three grouped ops ------------------------------------------------------------------------------------

struct Shape {
  std::vector<i64> counts;
  i64 nobody, out_width, in_width;  // rows of nobody are NaN

  i64 used() const {
    i64 sum = 0;
    for (const i64 count : counts) sum += count;
    return sum;
  }
  i64 rows() const { return used() + nobody; }
  i64 experts() const { return static_cast<i64>(counts.size()); }
  std::string name() const {
    std::ostringstream text;
    text << "counts";
    for (const i64 count : counts) text << ' ' << count;
    text << " and " << nobody << " of nobody, " << out_width << 'x' << in_width;
    return text.str();
  }
};

// Calls term(expert, row) for every row that an expert owns, in order.
void each_row(const Shape& s, const std::function<void(i64, i64)>& term) {
  i64 row = 0;
  for (i64 e = 0; e < s.experts(); ++e)
    for (i64 i = 0; i < s.counts[e]; ++i) term(e, row++);
}

using Sums = std::vector<double>;

Sums plain_mm(const Array& rows_RI, const Array& weight_EOI, const Shape& s) {
  Sums out_RO(s.rows() * s.out_width, 0.0);
  each_row(s, [&](i64 e, i64 r) {
    for (i64 o = 0; o < s.out_width; ++o)
      for (i64 i = 0; i < s.in_width; ++i)
        out_RO[r * s.out_width + o] += rows_RI[r * s.in_width + i] * weight_EOI[(e * s.out_width + o) * s.in_width + i];
  });
  return out_RO;
}

Sums plain_mm_transposed(const Array& rows_RO, const Array& weight_EOI, const Shape& s) {
  Sums out_RI(s.rows() * s.in_width, 0.0);
  each_row(s, [&](i64 e, i64 r) {
    for (i64 o = 0; o < s.out_width; ++o)
      for (i64 i = 0; i < s.in_width; ++i)
        out_RI[r * s.in_width + i] += rows_RO[r * s.out_width + o] * weight_EOI[(e * s.out_width + o) * s.in_width + i];
  });
  return out_RI;
}

Sums plain_outer(const Array& rows_RO, const Array& rows_RI, const Shape& s) {
  Sums out_EOI(s.experts() * s.out_width * s.in_width, 0.0);
  each_row(s, [&](i64 e, i64 r) {
    for (i64 o = 0; o < s.out_width; ++o)
      for (i64 i = 0; i < s.in_width; ++i)
        out_EOI[(e * s.out_width + o) * s.in_width + i] += rows_RO[r * s.out_width + o] * rows_RI[r * s.in_width + i];
  });
  return out_EOI;
}

struct Op {
  const char* name;
  void (*native)(const void*, const void*, const i64*, void*, const Grouped&);
  Sums (*plain)(const Array&, const Array&, const Shape&);
  bool left_is_out, right_is_weight;  // left rows are out_width wide; right is the weight, else rows in_width wide
};

constexpr Op kOps[] = {
    {"grouped_mm", grouped_mm, plain_mm, false, true},
    {"grouped_mm_transposed", grouped_mm_transposed, plain_mm_transposed, true, true},
    {"grouped_outer", grouped_outer, plain_outer, true, false},
};

void test_op(const Op& op, const Shape& s, int dtype, Values values, std::vector<int> threads) {
  std::mt19937 random(7);
  const i64 left_width = op.left_is_out ? s.out_width : s.in_width, weights = s.out_width * s.in_width;
  Array left(s.rows() * left_width, dtype);
  Array right(op.right_is_weight ? s.experts() * weights : s.rows() * s.in_width, dtype);
  fill(left, s.used() * left_width, values, random);
  fill(right, op.right_is_weight ? right.size() : s.used() * s.in_width, values, random);
  if (values == kWithNaN && s.used() * left_width > 0) left.set(s.used() * left_width - 1, NAN);
  const Sums want = op.plain(left, right, s);
  const double limit = values == kReal ? kSumLimit[dtype] : kExact;
  for (const std::string& isa : available_isas())
    for (const int count : threads) {
      use_isa(isa);
      Array out(static_cast<i64>(want.size()), dtype);
      op.native(left.data(), right.data(), s.counts.data(), out.data(),
                {s.rows(), s.experts(), s.out_width, s.in_width, dtype, count});
      compare(out, want, dtype, limit,
              isa + " " + op.name + " " + dtype_name(dtype) + " " + s.name() + " on " + std::to_string(count));
    }
}

// Each loop of each tile with and without a remainder.
void test_every_remainder() {
  for (const i64 rows : {1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 33, 47})
    for (const i64 out : {1, 2, 3, 4, 6, 7, 8, 9, 13, 16, 17, 31, 33, 49})
      for (const i64 in : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65})
        for (const int dtype : {kF32, kBF16})
          for (const Op& op : kOps) test_op(op, {{rows}, 0, out, in}, dtype, kWhole, {1});
}

void test_grouped() {
  const Shape shapes[] = {
      {{}, 0, 5, 3},                          // no experts
      {{}, 2, 5, 3},                          // no experts, rows of nobody
      {{0, 0, 0}, 0, 5, 3},                   // no rows
      {{0, 0}, 4, 5, 3},                      // rows of nobody alone
      {{2, 1}, 1, 5, 0},                      // nothing to sum, or nothing to write
      {{2, 1}, 1, 0, 5},                      // the same the other way
      {{1, 1, 2}, 1, 1, 1},                   // no width to speak of
      {{3, 0, 13, 1, 0, 70}, 3, 65, 301},     // empty experts
      {{0, 0, 37, 0}, 2, 24, 48},             // one expert has all
      {{5, 261, 33}, 7, 270, 263},            // past the largest tile in every direction
      {{8, 1, 7, 0, 32}, 1, 9, 1030},         // few rows: the weight streams, past its columns
      {{9, 40}, 0, 523, 30},                  // deep
  };
  for (const Shape& shape : shapes)
    for (const int dtype : {kF32, kBF16})
      for (const Values values : {kWhole, kWithNaN, kReal})
        for (const Op& op : kOps) test_op(op, shape, dtype, values, {1, 2});
}

// ---- moe_decode -----------------------------------------------------------------------------------------------

struct DecodeInputs {
  Array x_TD, in_proj_EGD, down_proj_EDF;
  std::vector<i64> ids_TK;
  Array weights_TK;

  explicit DecodeInputs(const Decode& s)
      : x_TD(s.tokens * s.hidden, s.dtype),
        in_proj_EGD(s.experts * (s.gated ? 2 : 1) * s.inner * s.hidden, s.dtype),
        down_proj_EDF(s.experts * s.hidden * s.inner, s.dtype),
        weights_TK(s.tokens * s.top_k, kF32) {
    std::mt19937 random(11);
    for (Array* each : {&x_TD, &in_proj_EGD, &down_proj_EDF, &weights_TK}) fill(*each, each->size(), kReal, random);
    for (i64 t = 0; t < s.tokens; ++t)
      for (i64 k = 0; k < s.top_k; ++k) ids_TK.push_back((t * t + k) % s.experts);
    ids_TK.shrink_to_fit();
  }
};

// One inner unit of one expert for one token.
double plain_hidden(const DecodeInputs& in, const Decode& s, i64 token, i64 expert, i64 unit) {
  const i64 width = (s.gated ? 2 : 1) * s.inner;
  double gate = 0.0, up = s.gated ? 0.0 : 1.0;
  for (i64 d = 0; d < s.hidden; ++d) {
    const double x = in.x_TD[token * s.hidden + d];
    gate += x * in.in_proj_EGD[(expert * width + unit) * s.hidden + d];
    if (s.gated) up += x * in.in_proj_EGD[(expert * width + s.inner + unit) * s.hidden + d];
  }
  return plain_activation(gate, s.activation) * up;
}

Sums plain_decode(const DecodeInputs& in, const Decode& s) {
  Sums out_TD(s.tokens * s.hidden, 0.0);
  for (i64 a = 0; a < s.tokens * s.top_k; ++a)
    for (i64 f = 0; f < s.inner; ++f) {
      const double value = in.weights_TK[a] * plain_hidden(in, s, a / s.top_k, in.ids_TK[a], f);
      for (i64 d = 0; d < s.hidden; ++d)
        out_TD[a / s.top_k * s.hidden + d] += value * in.down_proj_EDF[(in.ids_TK[a] * s.hidden + d) * s.inner + f];
    }
  return out_TD;
}

Array native_decode(const DecodeInputs& in, const Decode& s) {
  Array out(s.tokens * s.hidden, s.dtype);
  moe_decode(in.x_TD.data(), in.ids_TK.data(), static_cast<const float*>(in.weights_TK.data()), in.in_proj_EGD.data(),
             in.down_proj_EDF.data(), out.data(), s);
  return out;
}

void test_one_decode(Decode s) {
  const DecodeInputs in(s);
  const Sums want = plain_decode(in, s);
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    const std::string what = isa + " moe_decode " + dtype_name(s.dtype) + " T" + std::to_string(s.tokens) + " K" +
                             std::to_string(s.top_k) + " D" + std::to_string(s.hidden) + " F" +
                             std::to_string(s.inner) + " activation " + std::to_string(s.activation);
    s.threads = 1;
    const Array alone = native_decode(in, s);
    compare(alone, want, s.dtype, kDecodeLimit[s.dtype], what);
    s.threads = 2;
    check(native_decode(in, s).same_bits(alone), what, "two threads change the bits");
  }
}

void test_decode() {
  const i64 sizes[][5] = {
      // tokens, top_k, experts, hidden, inner
      {0, 2, 4, 8, 8},     {2, 0, 4, 8, 8},      {1, 1, 1, 3, 5},    {1, 2, 6, 64, 48},
      {5, 3, 7, 101, 37},  {16, 2, 3, 33, 129},  {4, 4, 4, 40, 72},  {3, 1, 9, 1, 1},
  };
  for (const auto& [tokens, top_k, experts, hidden, inner] : sizes)
    for (const int dtype : {kF32, kBF16})
      for (const bool gated : {true, false})
        for (const int activation : {kSilu, kGelu, kGeluTanh, kRelu})
          test_one_decode({tokens, top_k, experts, hidden, inner, gated, activation, dtype, 1});
}

// ---- choice ----------------------------------------------------------------------------------------------------

void test_top_k() {
  std::mt19937 random(3);
  const float nan = std::nanf(""), values[] = {0.0f, -0.0f, 1.0f, 2.0f, -1.0f, HUGE_VALF, -HUGE_VALF, nan};
  for (const auto& [tokens, experts, k] : {std::array<i64, 3>{0, 4, 2}, {3, 1, 0}, {5, 1, 1}, {9, 7, 7}, {700, 64, 8},
                                           {40, 300, 32}, {40, 300, 33}, {3, 20000, 500}}) {
    const std::unique_ptr<float[]> scores(new float[tokens * experts]);
    for (i64 i = 0; i < tokens * experts; ++i) scores[i] = values[random() % 8];
    const std::unique_ptr<i64[]> ids(new i64[tokens * k]);
    top_k(scores.get(), ids.get(), tokens, experts, k, 2);
    bool right = true;
    for (i64 t = 0; t < tokens; ++t) {
      const float* const row = scores.get() + t * experts;
      std::vector<i64> want(experts);
      std::iota(want.begin(), want.end(), i64{0});
      std::stable_sort(want.begin(), want.end(), [&](i64 a, i64 b) {
        return std::isnan(row[a]) ? !std::isnan(row[b]) : row[a] > row[b];
      });
      right = right && std::equal(ids.get() + t * k, ids.get() + (t + 1) * k, want.begin());
    }
    check(right, "top_k of " + std::to_string(experts) + " K" + std::to_string(k), "not the largest in order");
  }
}

// ---- memory that is handed out and comes back ------------------------------------------------------------------

void test_arrays() {
  constexpr size_t kBytes = size_t{5} << 20;
  const auto written = [](size_t bytes, int with) {
    void* const array = take_array(bytes);
    std::memset(array, with, bytes);
    return static_cast<char*>(array);
  };
  char *const first = written(kBytes, 1), *const second = written(kBytes, 2);
  check(first + kBytes <= second || second + kBytes <= first, "take_array", "two arrays overlap");
  give_back(first);
  char* const third = written(kBytes - 1000, 3);
  check(third == first, "take_array", "what came back is not used again");
  check(second[0] == 2 && second[kBytes - 1] == 2, "take_array", "an array in use was written to");
  give_back(third);
  give_back(written(3 * kBytes, 4));  // more than was ever in use: what is kept goes
  give_back(second);
  release_arrays();
  give_back(written(kBytes, 5));
}

// ---- what must be refused before memory is touched ------------------------------------------------------------

void test_refusals() {
  const i64 most = INT64_MAX;
  for (const std::vector<i64>& counts : {std::vector<i64>{2, 2}, {-1, 2}, {most, most}, {1, most}})
    for (const Op& op : kOps)
      refuses(std::string(op.name) + " with counts that do not fit",
              [&] { op.native(nullptr, nullptr, counts.data(), nullptr, {3, 2, 5, 7, kF32, 1}); });
  for (const i64 id : {i64{-1}, i64{4}, most, INT64_MIN})
    refuses("moe_decode with expert " + std::to_string(id), [&] {
      moe_decode(nullptr, &id, nullptr, nullptr, nullptr, nullptr, {1, 1, 4, 8, 8, true, kSilu, kF32, 1});
    });
  refuses("an unknown instruction set", [] { use_isa("abacus"); });
}

}  // namespace

int main() {
  test_every_remainder();
  test_grouped();
  test_decode();
  test_mlp();
  test_top_k();
  test_arrays();
  test_refusals();
  for (const std::string& isa : available_isas()) std::printf("%s ", isa.c_str());
  std::printf("\n%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
