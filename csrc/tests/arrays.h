// Arrays, plain arithmetic and comparison for the test programs of the kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"

namespace moekit {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what, const std::string& why) {
  ok ? ++passed : ++failed;
  if (!ok) std::fprintf(stderr, "FAILED %s: %s\n", what.c_str(), why.c_str());
}

// Whether a call throws std::invalid_argument.
inline void refuses(const std::string& what, const std::function<void()>& call) {
  try {
    call();
    check(false, what, "accepted");
  } catch (const std::invalid_argument&) {
    check(true, what, "");
  }
}

// ---- arrays ---------------------------------------------------------------------------------------------------

// The nearest number of 8 significant bits, ties to even, by arithmetic: independent of the kernels' bit tricks.
inline double round_to_bf16(double value) {
  if (!std::isfinite(value)) return value;
  int exponent;
  const double fraction = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8);
}

// `size` elements of a dtype; the address is null when there are none, as that of an empty tensor is.
class Array {
 public:
  Array(i64 size, int dtype) : size_(size), dtype_(dtype) {
    if (size == 0) return;
    bytes_.reset(new unsigned char[bytes()]);
    std::memset(bytes_.get(), 0xff, bytes());
  }

  i64 size() const { return size_; }
  void* data() const { return bytes_.get(); }
  bool same_bits(const Array& other) const { return size_ == 0 || !std::memcmp(data(), other.data(), bytes()); }

  double operator[](i64 i) const {
    std::uint32_t bits = 0;
    const size_t width = element_size(dtype_);
    std::memcpy(&bits, &bytes_[i * width], width);
    if (dtype_ == kBF16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  void set(i64 i, double value) {
    const float rounded = static_cast<float>(dtype_ == kBF16 ? round_to_bf16(value) : value);
    std::uint32_t bits;
    std::memcpy(&bits, &rounded, 4);
    if (dtype_ == kBF16) bits >>= 16;
    const size_t width = element_size(dtype_);
    std::memcpy(&bytes_[i * width], &bits, width);
  }

 private:
  size_t bytes() const { return size_ * element_size(dtype_); }
  i64 size_;
  int dtype_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// Whole: from -8 to 8, so that every sum of every order is a whole number below 2^24, exact in fp32. WithNaN: whole,
// and one NaN. Real: uniform in (-1, 1) with all the bits of the dtype.
enum Values { kWhole, kWithNaN, kReal };

inline void fill(Array& array, i64 used, Values values, std::mt19937& random) {
  for (i64 i = 0; i < used; ++i)
    array.set(i, values == kReal ? std::ldexp(1.0 + random(), -31) - 1.0 : static_cast<double>(random() % 17) - 8.0);
}

// ---- what is close enough -------------------------------------------------------------------------------------

constexpr double kExact = -1.0;  // whole numbers: no error is allowed before the output is rounded
// Sums of a few hundred products in fp32: sqrt(n) roundings of 2^-24, and a few; for bf16 the inputs are exact and
// the output alone is rounded, to 2^-8, with a little for a sum that lies near a tie.
constexpr double kSumLimit[] = {3e-6, 4e-3};

// |got - want| <= limit * max|want|; a NaN belongs where the reference has one and nowhere else.
inline void compare(const Array& got, const std::vector<double>& want, int dtype, double limit,
                    const std::string& what) {
  double scale = 0.0;
  for (const double each : want)
    if (!std::isnan(each)) scale = std::max(scale, std::fabs(each));
  for (i64 i = 0; i < got.size(); ++i) {
    const double exact = dtype == kBF16 ? round_to_bf16(want[i]) : want[i];
    const bool close = limit == kExact ? got[i] == exact : std::fabs(got[i] - want[i]) <= limit * scale;
    if (close || (std::isnan(want[i]) && std::isnan(got[i]))) continue;
    return check(false, what,
                 "element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " + std::to_string(want[i]));
  }
  check(true, what, "");
}

inline const char* dtype_name(int dtype) { return dtype == kF32 ? "f32" : "bf16"; }

inline double plain_activation(double x, int activation) {
  if (activation == kSilu) return x / (1.0 + std::exp(-x));
  if (activation == kGelu) return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
  const double root = std::sqrt(2.0 / std::acos(-1.0));
  if (activation == kGeluTanh) return 0.5 * x * (1.0 + std::tanh(root * (x + 0.044715 * x * x * x)));
  return std::max(x, 0.0);
}

void test_mlp();  // test_mlp.cpp

}  // namespace moekit
