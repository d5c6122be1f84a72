// Grouped products and whole layers over quantised matrices, for test_quant.cpp: against plain loops in double.
#include <algorithm>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed.h"
#include "quant_ops.h"

namespace moekit {
namespace {

// The hidden row is rounded to int8: where it differs in its last fp32 bit it may fall on the other side of a tie, one
// step of 1/127 of its block's largest, in one of F terms.
constexpr double kLayerLimit = 5e-3;

// One matrix an expert, of one format, or of every one in turn.
struct Experts {
  std::vector<Weight> each;
  std::vector<Doubles> values;
  std::vector<i64> fields;
  bool packed = false;  // any of them

  Experts(const Format* format, i64 experts, i64 rows, i64 cols, i64 parts, std::mt19937& random) {
    for (i64 e = 0; e < experts; ++e) {
      const Format& own = format ? *format : kEveryFormat[e % std::size(kEveryFormat)];
      each.emplace_back(own, rows, cols, parts, random);
      values.push_back(each.back().values());
      const Matrix m = each.back().matrix();
      for (const i64 field : {reinterpret_cast<i64>(m.data), m.rows, m.cols, i64{m.kind}, i64{m.group}, i64{m.parts},
                              i64{m.symmetric}})
        fields.push_back(field);
      packed |= !own.plain();
    }
    fields.shrink_to_fit();
  }
  MatrixTable table() const { return {fields.data()}; }
};

struct Shape {
  std::vector<i64> counts;
  i64 nobody, out, in, parts;  // rows of nobody are NaN
};

void test_product(const Shape& s, const Format* format, bool with_nan) {
  std::mt19937 random(7);
  const i64 experts = static_cast<i64>(s.counts.size());
  const Experts weights(format, experts, s.out, s.in, s.parts, random);
  i64 used = 0;
  for (const i64 count : s.counts) used += count;
  const i64 rows = used + s.nobody;
  const Array exact = exact_rows(used, s.in, random);
  Array x(rows * s.in, kF32);
  for (i64 i = 0; i < used * s.in; ++i) x.set(i, exact[i]);
  if (with_nan && used) x.set((used - 1) * s.in, NAN);
  Doubles want;
  for (i64 e = 0, row = 0; e < experts; ++e)
    for (i64 i = 0; i < s.counts[e]; ++i, ++row) {
      const Doubles y = plain_product(weights.values[e], row_of(x, s.in, row).data(), s.out, s.in);
      want.insert(want.end(), y.begin(), y.end());
    }
  want.resize(rows * s.out, 0.0);
  on_every_isa([&](const std::string& isa) {
    const std::string what = isa + " quant_grouped_mm " + (format ? format->name() : "mixed") + " of " +
                             std::to_string(experts) + " " + std::to_string(s.out) + "x" + std::to_string(s.in);
    Array one(rows * s.out, kF32), two(rows * s.out, kF32);
    quant_grouped_mm(floats(x), weights.table(), s.counts.data(), floats(one), rows, experts, s.out, s.in, 1);
    quant_grouped_mm(floats(x), weights.table(), s.counts.data(), floats(two), rows, experts, s.out, s.in, 2);
    compare(one, want, kF32, kSumLimit[kF32], what);
    check(two.same_bits(one), what, "two threads change the bits");
  });
}

void test_products() {
  const Shape shapes[] = {
      {{}, 2, 5, 3, 1},                      // no experts, rows of nobody
      {{0, 0}, 3, 5, 3, 1},                  // rows of nobody alone
      {{1, 1, 2}, 1, 1, 1, 1},               // no width to speak of
      {{3, 0, 13, 1, 0, 40}, 3, 65, 129, 1}, // empty experts
      {{0, 25, 0, 2}, 0, 70, 33, 2},         // two parts
      {{12, 24}, 0, 200, 300, 1},            // more rows than a task takes
  };
  for (const Shape& shape : shapes)
    for (const Format& format : kEveryFormat)
      for (const bool with_nan : {false, true}) test_product(shape, &format, with_nan);
  test_product({{5, 1, 0, 3, 14, 2, 2, 1, 4, 0, 8, 13, 1}, 2, 66, 97, 2}, nullptr, false);
  test_product({{8190, 7, 0, 9}, 1, 3, 2, 1}, nullptr, false);  // past what the workspace takes at once
}

struct LayerInputs {
  Array x_TD, weights_TK;
  std::vector<i64> ids_TK;
  Experts gate_up_E, down_E;

  LayerInputs(const QuantMoE& s, const Format* format, std::mt19937 random = std::mt19937(8))
      : x_TD(exact_rows(s.tokens, s.hidden, random)), weights_TK(s.tokens * s.top_k, kF32),
        gate_up_E(format, s.experts, (s.gated ? 2 : 1) * s.inner, s.hidden, s.gated ? 2 : 1, random),
        down_E(format, s.experts, s.hidden, s.inner, 1, random) {
    fill(weights_TK, weights_TK.size(), kReal, random);
    const i64 busy = std::max<i64>(s.experts - 1, 1);  // one is empty
    for (i64 t = 0; t < s.tokens; ++t)
      for (i64 k = 0; k < s.top_k; ++k) ids_TK.push_back((t * t + k) % busy);
    ids_TK.shrink_to_fit();
  }
};

// To int8 and back, in blocks of 32.
void round_to_int8(Doubles& x) {
  for (size_t first = 0; first < x.size(); first += 32) {
    const auto begin = x.begin() + first, end = x.begin() + std::min(first + 32, x.size());
    double most = 0.0;
    for (auto each = begin; each != end; ++each) most = std::max(most, std::fabs(*each));
    for (auto each = begin; most > 0.0 && each != end; ++each)
      *each = std::nearbyint(*each / most * 127.0) * most / 127.0;
  }
}

Doubles plain_layer(const LayerInputs& in, const QuantMoE& s) {
  Doubles out_TD(s.tokens * s.hidden, 0.0);
  for (i64 a = 0; a < s.tokens * s.top_k; ++a) {
    const i64 token = a / s.top_k, e = in.ids_TK[a];
    Doubles hidden = plain_product(in.gate_up_E.values[e], row_of(in.x_TD, s.hidden, token).data(),
                                   in.gate_up_E.each[e].rows(), s.hidden);
    for (i64 f = 0; f < s.inner; ++f)
      hidden[f] = plain_activation(hidden[f], s.activation) * (s.gated ? hidden[s.inner + f] : 1.0);
    hidden.resize(s.inner);
    if (!in.down_E.each[e].format().plain()) round_to_int8(hidden);
    const Doubles y = plain_product(in.down_E.values[e], hidden.data(), s.hidden, s.inner);
    for (i64 d = 0; d < s.hidden; ++d) out_TD[token * s.hidden + d] += in.weights_TK[a] * y[d];
  }
  return out_TD;
}

void test_layer(QuantMoE s, const Format* format) {
  const LayerInputs in(s, format);
  const Doubles want = plain_layer(in, s);
  on_every_isa([&](const std::string& isa) {
    const std::string what = isa + " quant_moe " + (format ? format->name() : "mixed") + " T" +
                             std::to_string(s.tokens) + " K" + std::to_string(s.top_k) + " D" +
                             std::to_string(s.hidden) + " F" + std::to_string(s.inner) +
                             (s.gated ? " gated " : " ") + std::to_string(s.activation);
    Array one(s.tokens * s.hidden, kF32), two(s.tokens * s.hidden, kF32);
    for (const int threads : {1, 2}) {
      s.threads = threads;
      quant_moe(floats(in.x_TD), in.ids_TK.data(), floats(in.weights_TK), in.gate_up_E.table(), in.down_E.table(),
                floats(threads == 1 ? one : two), s);
    }
    compare(one, want, kF32, in.down_E.packed ? kLayerLimit : 1e-5, what);
    check(two.same_bits(one), what, "two threads change the bits");
    for (i64 e = 0; e < s.experts; ++e) {  // one expert a call
      std::vector<i64> ids(in.ids_TK);
      for (i64& id : ids) id = id == e ? id : -1;
      s.add = e > 0;
      quant_moe(floats(in.x_TD), ids.data(), floats(in.weights_TK), in.gate_up_E.table(), in.down_E.table(),
                floats(two), s);
    }
    s.add = false;
    check(two.same_bits(one), what, "one expert a call changes the bits");
  });
}

void test_layers() {
  const i64 sizes[][5] = {
      // tokens, top_k, experts, hidden, inner
      {0, 2, 4, 8, 8},    {2, 0, 4, 8, 8},   {1, 1, 1, 1, 1},     {1, 2, 6, 64, 48},  {5, 3, 7, 101, 37},
      {16, 2, 4, 33, 129}, {40, 2, 3, 70, 65}, {3, 13, 14, 67, 34}, {2, 1, 2, 129, 160},
  };
  for (const auto& [tokens, top_k, experts, hidden, inner] : sizes)
    for (const bool gated : {true, false})
      for (const int activation : {kSilu, kGelu, kGeluTanh, kRelu}) {
        const QuantMoE size{tokens, top_k, experts, hidden, inner, gated, activation, 1};
        test_layer(size, nullptr);
        if (activation == (gated ? kSilu : kRelu))
          for (const Format& format : kEveryFormat) test_layer(size, &format);
      }
  test_layer({1027, 1, 3, 5, 3, true, kSilu, 1}, &kEveryFormat[2]);  // past what the workspace takes at once
}

// ---- what must be refused before memory is touched -----------------------------------------

void test_refusals() {
  const i64 most = INT64_MAX;
  for (const std::vector<i64>& counts : {std::vector<i64>{2, 2}, {-1, 2}, {most, most}, {1, most}})
    refuses("quant_grouped_mm with counts that do not fit",
            [&] { quant_grouped_mm(nullptr, {nullptr}, counts.data(), nullptr, 3, 2, 5, 7, 1); });
  for (const i64 id : {i64{-2}, i64{4}, most, INT64_MIN})
    refuses("quant_moe with expert " + std::to_string(id), [&] {
      quant_moe(nullptr, &id, nullptr, {nullptr}, {nullptr}, nullptr, {1, 1, 4, 8, 8, true, kSilu, 1});
    });
}

}  // namespace

void test_quant_ops() {
  test_products();
  test_layers();
  test_refusals();
}

}  // namespace moekit
