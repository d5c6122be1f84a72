// Activations of a vector and their slopes, in fp32 to a few units in the last place.
#pragma once
#include "isa.h"
#include "vec.h"

namespace moekit {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// 2^n for -126 <= n <= 127.
inline VecF power_of_two(VecI n) { return (VecF)((n + 127) << 23); }

// e^x to 2 units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, the series of e^r to r^7, and 2^n in two
// steps, for what overflows or is denormal. A NaN stays one.
inline VecF exponential(VecF x) {
  x = x > 89.0f ? VecF{} + 89.0f : x;
  x = x < -104.0f ? VecF{} - 104.0f : x;
  const VecF magic = VecF{} + 12582912.0f;  // 1.5 · 2^23: adding it leaves a whole number in the low bits
  const VecF shifted = x * 1.44269504f + magic;
  const VecI n = (VecI)shifted - (VecI)magic;
  const VecF whole = shifted - magic;
  const VecF r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  VecF e = r * (1.0f / 5040) + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const VecI half = n >> 1;
  return e * power_of_two(half) * power_of_two(n - half);
}

inline VecF sigmoid(VecF x) { return 1.0f / (1.0f + exponential(-x)); }

// Φ(x), the normal distribution, given e^(−x²/2): Abramowitz and Stegun 7.1.26, to 1e-7.
inline VecF normal_cdf(VecF x, VecF bell) {
  const VecF size = x < 0.0f ? -x : x;
  const VecF t = 1.0f / (1.0f + size * (0.3275911f * 0.70710678f));
  VecF tail = t * 1.061405429f - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail = tail * t * bell * 0.5f;
  return x < 0.0f ? tail : 1.0f - tail;
}

template <int A>
inline VecF activation(VecF x, VecF& slope) {
  if constexpr (A == kSilu) {
    const VecF s = sigmoid(x);
    slope = s * (1.0f + x * (1.0f - s));
    return x * s;
  } else if constexpr (A == kGelu) {
    const VecF bell = exponential(x * x * -0.5f), cdf = normal_cdf(x, bell);
    slope = cdf + x * bell * 0.39894228f;
    return x * cdf;
  } else if constexpr (A == kGeluTanh) {  // ½ (1 + tanh z) = sigmoid(2z)
    const VecF s = sigmoid(x * (1.59576912f + x * x * 0.07135481f));
    VecF near = x > 16.0f ? VecF{} + 16.0f : x;  // beyond, s is 0 or 1 and must not meet an infinite factor
    near = near < -16.0f ? VecF{} - 16.0f : near;
    slope = s + near * s * (1.0f - s) * (1.59576912f + near * near * 0.21406443f);
    return x * s;
  } else {
    slope = x > 0.0f ? VecF{} + 1.0f : VecF{};
    return x < 0.0f ? VecF{} : x;  // a NaN passes
  }
}

template <int A>
inline VecF activation(VecF x) {
  VecF slope;
  return activation<A>(x, slope);
}

// Call with the activation as a constant.
template <class Body>
inline void with_activation(int activation, const Body& body) {
  switch (activation) {
    case kSilu:
      return body(Constant<kSilu>{});
    case kGelu:
      return body(Constant<kGelu>{});
    case kGeluTanh:
      return body(Constant<kGeluTanh>{});
    default:
      return body(Constant<kRelu>{});
  }
}

}  // namespace
}  // namespace moekit
