// One token through attention and MLP against plain loops over doubles, on every instruction set, without Python. Every
// array is a heap block of exactly its size, filled with NaN.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode.h"

namespace {

using namespace moekit;
using Doubles = std::vector<double>;

int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

std::mt19937 draw(5);

// `size` elements of a dtype.
class Array {
 public:
  explicit Array(i64 size, int dtype = kF32, bool fill = true)
      : size_(size), dtype_(dtype), bytes_(new unsigned char[size * element_size(dtype)]) {
    std::memset(bytes_.get(), 0xff, size * element_size(dtype));
    for (i64 i = 0; fill && i < size; ++i) set(i, static_cast<int>(draw() % 129 - 64) / 64.0);  // exact in every dtype
  }
  void* data() const { return bytes_.get(); }
  float* floats() const { return static_cast<float*>(data()); }
  i64 size() const { return size_; }
  Vector vector() const { return {data(), dtype_}; }

  // Multiples of 1/64 up to 1 in size, so that few bits hold them.
  void set(i64 i, double value) {
    const float number = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &number, 4);
    if (dtype_ == kBF16) bits >>= 16;
    if (dtype_ == kF16) {
      int exponent = 0;
      const double fraction = std::frexp(std::fabs(value), &exponent);  // value = fraction · 2^exponent
      bits = value == 0.0 ? 0 : static_cast<std::uint32_t>((exponent + 14) << 10) +
                                    (static_cast<std::uint32_t>(std::ldexp(fraction, 11)) & 0x3ffu);
      if (value < 0) bits |= 0x8000u;
    }
    std::memcpy(bytes_.get() + i * element_size(dtype_), &bits, element_size(dtype_));
  }
  double operator[](i64 i) const {
    std::uint32_t bits = 0;
    std::memcpy(&bits, bytes_.get() + i * element_size(dtype_), element_size(dtype_));
    if (dtype_ == kF16) {
      const int exponent = static_cast<int>(bits >> 10 & 31u);
      const double size = std::ldexp((exponent ? 1024.0 : 0.0) + (bits & 0x3ffu), std::max(exponent, 1) - 25);
      return exponent == 31 ? std::nan("") : bits & 0x8000u ? -size : size;
    }
    if (dtype_ == kBF16) bits <<= 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
  }

 private:
  i64 size_;
  int dtype_;
  std::unique_ptr<unsigned char[]> bytes_;
};

struct Layer {
  Array weight, bias;
  i64 rows, cols;
  Layer(i64 r, i64 c, int dtype) : weight(r * c, dtype), bias(r, dtype), rows(r), cols(c), kind_(dtype) {}
  Linear linear() const { return {{weight.data(), rows, cols, kind_, 0, 1, true}, bias.vector()}; }
  Doubles operator()(const Doubles& x) const {
    Doubles y(rows);
    for (i64 r = 0; r < rows; ++r) {
      y[r] = bias[r];
      for (i64 c = 0; c < cols; ++c) y[r] += weight[r * cols + c] * x[c];
    }
    return y;
  }

 private:
  int kind_;
};

constexpr double kEps = 1e-3;

Doubles norm(const Doubles& x, const Array& weight) {
  double squares = 0.0;
  for (const double each : x) squares += each * each;
  Doubles y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] / std::sqrt(squares / x.size() + kEps) * weight[i];
  return y;
}

// |got − want| ≤ limit · the largest wanted: fp32 sums, and for a 16-bit cache its rounding of the new position.
void compare(const Array& got, const Doubles& want, double limit, const std::string& what) {
  double most = 0.0, error = 0.0;
  for (i64 i = 0; i < got.size(); ++i) {
    most = std::max(most, std::fabs(want[i]));
    error = std::isnan(got[i]) ? INFINITY : std::max(error, std::fabs(got[i] - want[i]));
  }
  check(error <= limit * most, what + ": error " + std::to_string(error) + " of " + std::to_string(most));
}

// ---- attention ------------------------------------------------------------------------------------------------

struct AttentionCase {
  i64 hidden, heads, kv_heads, d, past;
  int dtype, cache;
};

Doubles head_of(const Doubles& all, i64 head, i64 d, const Array& weight, const Array& cosine, const Array& sine) {
  const Doubles x = norm(Doubles(all.begin() + head * d, all.begin() + (head + 1) * d), weight);
  Doubles y(d);
  for (i64 i = 0; i < d / 2; ++i) {
    y[i] = x[i] * cosine[i] - x[d / 2 + i] * sine[i];
    y[d / 2 + i] = x[d / 2 + i] * cosine[i] + x[i] * sine[i];
  }
  return y;
}

void test_attention(const AttentionCase& c) {
  const i64 capacity = c.past + 3, d = c.d, group = c.heads / c.kv_heads;
  const Array input(c.hidden), weight(c.hidden, c.dtype), q_norm(d), k_norm(d), cosine(d / 2), sine(d / 2);
  const Layer q(c.heads * d, c.hidden, c.dtype), k(c.kv_heads * d, c.hidden, c.dtype);
  const Layer v(c.kv_heads * d, c.hidden, c.dtype), o(c.hidden, c.heads * d, c.dtype);
  Array keys(c.kv_heads * capacity * d, c.cache), values(c.kv_heads * capacity * d, c.cache);
  for (i64 h = 0; h < c.kv_heads; ++h)  // what was never written
    for (i64 i = c.past * d; i < capacity * d; ++i)
      std::memset(static_cast<char*>(keys.data()) + (h * capacity * d + i) * element_size(c.cache), 0xff,
                  element_size(c.cache));
  Doubles x(c.hidden), mixed(c.heads * d, 0.0);
  for (i64 i = 0; i < c.hidden; ++i) x[i] = input[i];
  const Doubles h = norm(x, weight), all_q = q(h), all_k = k(h), all_v = v(h);
  for (i64 head = 0; head < c.heads; ++head) {
    const i64 kv = head / group;
    const Doubles query = head_of(all_q, head, d, q_norm, cosine, sine);
    const Doubles key = head_of(all_k, kv, d, k_norm, cosine, sine);
    Doubles p(c.past + 1, 0.0);
    double total = 0.0;
    for (i64 s = 0; s <= c.past; ++s) {
      for (i64 i = 0; i < d; ++i) p[s] += query[i] * (s < c.past ? keys[(kv * capacity + s) * d + i] : key[i]);
      total += p[s] = std::exp(p[s] / std::sqrt(static_cast<double>(d)));
    }
    for (i64 s = 0; s <= c.past; ++s)
      for (i64 i = 0; i < d; ++i)
        mixed[head * d + i] +=
            p[s] / total * (s < c.past ? values[(kv * capacity + s) * d + i] : all_v[kv * d + i]);
  }
  const Doubles added = o(mixed);
  for (i64 i = 0; i < c.hidden; ++i) x[i] += added[i];
  const Attention layer{weight.vector(), q_norm.vector(), k_norm.vector(), static_cast<float>(kEps), q.linear(),
                        k.linear(), v.linear(), o.linear(), c.heads, c.kv_heads, d, kF32};
  Array first(c.hidden);
  for (const std::string& isa : available_isas())
    for (const int threads : {1, 2}) {
      use_isa(isa);
      Array out(c.hidden);
      std::memcpy(out.data(), input.data(), c.hidden * 4);
      attention_step(layer, out.floats(), cosine.floats(), sine.floats(),
                     {keys.data(), values.data(), capacity, c.cache}, c.past, threads);
      const std::string what = isa + " attention of " + std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) +
                               " heads of " + std::to_string(d) + " after " + std::to_string(c.past);
      compare(out, x, c.cache == kF32 ? 1e-5 : c.cache == kF16 ? 2e-3 : 1e-2, what);
      if (threads == 1) std::memcpy(first.data(), out.data(), c.hidden * 4);
      check(!std::memcmp(first.data(), out.data(), c.hidden * 4), what + ": two threads change the bits");
    }
}

// ---- MLP ------------------------------------------------------------------------------------------------------

double silu(double x) { return x / (1.0 + std::exp(-x)); }

struct Expert {
  Layer gate, up, down;
  Expert(i64 hidden, i64 inner, int dtype)
      : gate(inner, hidden, dtype), up(inner, hidden, dtype), down(hidden, inner, dtype) {}
  MLP mlp() const { return {gate.linear(), up.linear(), down.linear()}; }
  Doubles operator()(const Doubles& x) const {
    Doubles left = gate(x), right = up(x);
    for (size_t i = 0; i < left.size(); ++i) left[i] = silu(left[i]) * right[i];
    return down(left);
  }
};

// mlp_step with experts that are placed, last slot first, when their turn comes.
void in_parts(const Sparse& whole, float* x, const Routes& routes, int threads) {
  Sparse layer = whole;
  for (i64 e = 0; e < static_cast<i64>(layer.experts.size()); ++e) place(layer, e, nullptr, nullptr, nullptr);
  Array state(mlp_state_size(layer, routes.count));
  mlp_begin(layer, x, routes, state.floats(), threads);
  mlp_hidden(layer, routes, {routes.count}, state.floats(), threads);
  for (i64 slot = routes.count - 1; slot >= 0; --slot) {
    const i64 expert = routes.ids_K[slot];
    const MLP& mlp = whole.experts[expert];
    place(layer, expert, mlp.gate.weight.data, mlp.up.weight.data, mlp.down.weight.data);
    mlp_hidden(layer, routes, {slot}, state.floats(), threads);
  }
  mlp_finish(layer, x, routes, state.floats(), threads);
}

void test_mlp(i64 hidden, i64 inner, i64 experts, i64 top_k, int dtype) {
  const Array input(hidden), weight(hidden, dtype), shared_gate(hidden, dtype), router(experts * hidden, dtype);
  std::vector<Expert> each;
  for (i64 e = 0; e < experts; ++e) each.emplace_back(hidden, inner, dtype);
  const Expert shared(hidden, inner + 3, dtype);
  Doubles x(hidden);
  for (i64 i = 0; i < hidden; ++i) x[i] = input[i];
  const Doubles h = norm(x, weight);
  Doubles logits(experts, 0.0);
  double gate = 0.0;
  for (i64 i = 0; i < hidden; ++i) gate += shared_gate[i] * h[i];
  for (i64 e = 0; e < experts; ++e)
    for (i64 i = 0; i < hidden; ++i) logits[e] += router[e * hidden + i] * h[i];
  std::vector<i64> order(experts);
  for (i64 e = 0; e < experts; ++e) order[e] = e;
  std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return logits[a] > logits[b]; });
  double total = 0.0;
  for (i64 k = 0; k < top_k; ++k) total += std::exp(logits[order[k]]);
  for (i64 k = 0; k < top_k; ++k) {
    const Doubles y = each[order[k]](h);
    for (i64 i = 0; i < hidden; ++i) x[i] += 1.5 * std::exp(logits[order[k]]) / total * y[i];
  }
  const Doubles y = shared(h);
  for (i64 i = 0; i < hidden; ++i) x[i] += y[i] / (1.0 + std::exp(-gate));
  const Matrix gate_row{shared_gate.data(), 1, hidden, dtype, 0, 1, true};
  Sparse layer{weight.vector(), static_cast<float>(kEps),
               {{router.data(), experts, hidden, dtype, 0, 1, true}, top_k, true, true, 1.5f},
               {}, shared.mlp(), gate_row, kSilu, kF32};
  for (const Expert& one : each) layer.experts.push_back(one.mlp());
  Array first(hidden);
  for (const std::string& isa : available_isas())
    for (const int threads : {1, 2}) {
      use_isa(isa);
      Array out(hidden), got_logits(experts, kF32, false), weights(top_k, kF32, false);
      std::vector<i64> ids(top_k);
      ids.shrink_to_fit();
      std::memcpy(out.data(), input.data(), hidden * 4);
      mlp_step(layer, out.floats(), {got_logits.floats(), ids.data(), weights.floats(), top_k}, threads);
      const std::string what = isa + " mlp of " + std::to_string(hidden) + "x" + std::to_string(inner);
      compare(out, x, 1e-5, what);
      compare(got_logits, logits, 1e-5, what + " logits");
      check(std::equal(ids.begin(), ids.end(), order.begin()), what + " ids");
      if (threads == 1) std::memcpy(first.data(), out.data(), hidden * 4);
      check(!std::memcmp(first.data(), out.data(), hidden * 4), what + ": two threads change the bits");
      std::memcpy(out.data(), input.data(), hidden * 4);
      in_parts(layer, out.floats(), {got_logits.floats(), ids.data(), weights.floats(), top_k}, threads);
      check(!std::memcmp(first.data(), out.data(), hidden * 4), what + ": parts change the bits");
      for (i64 bad : {i64{-1}, experts}) try {
          float one = 1.0f;
          mlp_step(layer, out.floats(), {nullptr, &bad, &one, 1}, threads);
          check(false, what + " takes an expert that does not exist");
        } catch (const std::invalid_argument&) {
          check(true, what);
        }
    }
}

}  // namespace

int main() {
  for (const int dtype : {kF32, kBF16}) {
    for (const int cache : {kF32, kBF16, kF16})
      for (const AttentionCase& c : {AttentionCase{5, 1, 1, 2, 0, dtype, cache}, {37, 7, 1, 34, 17, dtype, cache},
                                     {48, 4, 2, 16, 511, dtype, cache}, {33, 6, 2, 10, 1300, dtype, cache},
                                     {300, 3, 3, 64, 5, dtype, cache}})
        test_attention(c);
    test_mlp(5, 3, 1, 1, dtype);
    test_mlp(37, 65, 7, 3, dtype);
    test_mlp(301, 270, 4, 2, dtype);
  }
  for (const std::string& isa : available_isas()) std::printf("%s ", isa.c_str());
  std::printf("\n%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
