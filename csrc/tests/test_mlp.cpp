// moe_mlp and its gradient against plain loops in double, on every instruction set; arrays as in test_ops.cpp.
#include "mlp.h"

#include <functional>
#include <stdexcept>

#include "arrays.h"

namespace moekit {
namespace {

using Sums = std::vector<double>;

// Three sums in fp32 with an activation between; for bf16 pre-activations are rounded to 2^-8 and multiply each other.
constexpr double kMlpLimit[] = {1e-5, 3e-2};

struct Inputs {
  Array x_TD, in_proj, in_bias, down_proj, down_bias, weights, grad;
  std::vector<i64> tokens, experts;

  Inputs(const Mlp& s, bool bias)
      : x_TD(s.tokens * s.hidden, s.dtype),
        in_proj(s.experts * s.inner.width() * s.hidden, s.dtype),
        in_bias(bias ? s.experts * s.inner.width() : 0, s.dtype),
        down_proj(s.experts * s.hidden * s.inner.inner, s.dtype),
        down_bias(bias ? s.experts * s.hidden : 0, s.dtype),
        weights(s.assignments, kF32),
        grad(s.tokens * s.hidden, s.out_dtype) {
    std::mt19937 random(5);
    for (Array* each : {&x_TD, &in_proj, &in_bias, &down_proj, &down_bias, &weights, &grad})
      fill(*each, each->size(), kReal, random);
    // Some tokens have none, or all the same number; expert 1 has none; some assignments are nobody's.
    for (i64 a = 0; a < s.assignments; ++a) tokens.push_back(a * s.tokens / s.assignments);
    for (i64 a = 0; a < s.assignments; ++a) {
      const i64 expert = random() % (s.experts + 1);
      experts.push_back(expert == 1 ? 0 : expert);
    }
    tokens.shrink_to_fit();
    experts.shrink_to_fit();
  }

  MlpInputs addresses() const {
    return {x_TD.data(),    tokens.data(),  experts.data(),   static_cast<const float*>(weights.data()),
            in_proj.data(), in_bias.data(), down_proj.data(), down_bias.data()};
  }
};

// The slope by a central difference in double: good to 1e-9.
double plain_slope(double x, int activation) {
  const double step = 1e-5;
  return (plain_activation(x + step, activation) - plain_activation(x - step, activation)) / (2 * step);
}

struct Wanted {
  Sums out, x, weights, in_proj, in_bias, down_proj, down_bias;
};

Wanted plain(const Inputs& in, const Mlp& s) {
  const i64 width = s.inner.width(), inner = s.inner.inner, hidden = s.hidden;
  Wanted w{Sums(s.tokens * hidden),       Sums(s.tokens * hidden),     Sums(s.assignments),
           Sums(in.in_proj.size()),       Sums(s.experts * width),     Sums(in.down_proj.size()),
           Sums(s.experts * hidden)};
  for (i64 a = 0; a < s.assignments; ++a) {
    const i64 e = in.experts[a], t = in.tokens[a];
    if (e == s.experts) continue;
    Sums pre(width), act(inner), slope(inner), grad_act(inner);
    for (i64 g = 0; g < width; ++g) {
      if (in.in_bias.size()) pre[g] = in.in_bias[e * width + g];
      for (i64 d = 0; d < hidden; ++d) pre[g] += in.x_TD[t * hidden + d] * in.in_proj[(e * width + g) * hidden + d];
    }
    for (i64 f = 0; f < inner; ++f) {
      act[f] = plain_activation(pre[f], s.inner.activation) * (s.inner.gated ? pre[inner + f] : 1.0);
      slope[f] = plain_slope(pre[f], s.inner.activation);
    }
    for (i64 d = 0; d < hidden; ++d) {
      double y = in.down_bias.size() ? in.down_bias[e * hidden + d] : 0.0;
      const double grad = in.grad[t * hidden + d], share = grad * in.weights[a];
      for (i64 f = 0; f < inner; ++f) {
        const i64 at = (e * hidden + d) * inner + f;
        y += in.down_proj[at] * act[f];
        grad_act[f] += share * in.down_proj[at];
        w.down_proj[at] += share * act[f];
      }
      w.out[t * hidden + d] += in.weights[a] * y;
      w.weights[a] += grad * y;
      w.down_bias[e * hidden + d] += share;
    }
    for (i64 g = 0; g < width; ++g) {
      const i64 f = g % inner;
      const double grad = g < inner ? grad_act[f] * slope[f] * (s.inner.gated ? pre[inner + f] : 1.0)
                                    : grad_act[f] * plain_activation(pre[f], s.inner.activation);
      w.in_bias[e * width + g] += grad;
      for (i64 d = 0; d < hidden; ++d) {
        w.in_proj[(e * width + g) * hidden + d] += grad * in.x_TD[t * hidden + d];
        w.x[t * hidden + d] += grad * in.in_proj[(e * width + g) * hidden + d];
      }
    }
  }
  return w;
}

struct Got {
  Array out, pre, x, weights, in_proj, in_bias, down_proj, down_bias;

  Got(const Inputs& in, const Mlp& s)
      : out(s.tokens * s.hidden, s.out_dtype),
        pre(s.assignments * s.inner.width(), s.dtype),
        x(in.x_TD.size(), s.dtype),
        weights(s.assignments, kF32),
        in_proj(in.in_proj.size(), s.dtype),
        in_bias(in.in_bias.size(), s.dtype),
        down_proj(in.down_proj.size(), s.dtype),
        down_bias(in.down_bias.size(), s.dtype) {
    moe_mlp(in.addresses(), out.data(), pre.data(), s);
    moe_mlp_backward(in.addresses(), in.grad.data(), pre.data(),
                     {x.data(), static_cast<float*>(weights.data()), in_proj.data(), in_bias.data(), down_proj.data(),
                      down_bias.data()},
                     s);
  }
};

void test_one(Mlp s, bool bias) {
  const Inputs in(s, bias);
  const Wanted want = plain(in, s);
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    const std::string what = isa + " moe_mlp " + dtype_name(s.dtype) + " T" + std::to_string(s.tokens) + " A" +
                             std::to_string(s.assignments) + " D" + std::to_string(s.hidden) + " F" +
                             std::to_string(s.inner.inner) + (s.inner.gated ? " gated " : " ") +
                             std::to_string(s.inner.activation) + ": ";
    s.threads = 1;
    const Got got(in, s);
    const double limit = kMlpLimit[s.dtype];
    compare(got.out, want.out, s.out_dtype, limit, what + "out");
    compare(got.x, want.x, s.dtype, limit, what + "x");
    compare(got.weights, want.weights, kF32, limit, what + "weights");
    compare(got.in_proj, want.in_proj, s.dtype, limit, what + "in_proj");
    compare(got.down_proj, want.down_proj, s.dtype, limit, what + "down_proj");
    if (bias) {
      compare(got.in_bias, want.in_bias, s.dtype, limit, what + "in_bias");
      compare(got.down_bias, want.down_bias, s.dtype, limit, what + "down_bias");
    }
    s.threads = 2;
    const Got two(in, s);
    const bool same = two.out.same_bits(got.out) && two.x.same_bits(got.x) && two.weights.same_bits(got.weights) &&
                      two.in_proj.same_bits(got.in_proj) && two.down_proj.same_bits(got.down_proj) &&
                      two.in_bias.same_bits(got.in_bias) && two.down_bias.same_bits(got.down_bias);
    check(same, what, "two threads change the bits");
  }
}

void refuses_ids(const std::string& what, i64 token, i64 expert) {
  const MlpInputs in{nullptr, &token, &expert, nullptr, nullptr, nullptr, nullptr, nullptr};
  refuses(what, [&] { moe_mlp(in, nullptr, nullptr, {3, 1, 2, 4, {4, true, kSilu}, kF32, kF32, 1}); });
}

}  // namespace

void test_mlp() {
  const i64 sizes[][5] = {
      // tokens, assignments, experts, hidden, inner
      {0, 0, 2, 5, 3},    {4, 0, 2, 5, 3},     {3, 3, 1, 1, 1},      {9, 14, 3, 16, 32},  {5, 40, 3, 65, 33},
      {40, 60, 4, 67, 70}, {700, 1400, 2, 33, 17}, {12, 9, 3, 130, 200}, {300, 30, 5, 9, 40}, {9, 14, 2, 301, 290},
      {1100, 1100, 1, 40, 90},
  };
  for (const auto& [tokens, assignments, experts, hidden, inner] : sizes)
    for (const int dtype : {kF32, kBF16})
      for (const bool gated : {true, false})
        for (const int activation : {kSilu, kGelu, kGeluTanh, kRelu})
          test_one({tokens, assignments, experts, hidden, {inner, gated, activation}, dtype,
                    activation == kGelu ? kF32 : dtype, 1},
                   activation != kSilu);
  for (const i64 far : {i64{-1}, i64{3}, INT64_MAX, INT64_MIN}) {
    refuses_ids("moe_mlp with token " + std::to_string(far), far, 0);
    refuses_ids("moe_mlp with expert " + std::to_string(far), 0, far);
  }
}

}  // namespace moekit
