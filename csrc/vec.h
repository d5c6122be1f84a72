// Vectors of the instruction set this file is compiled for. Everything is in an anonymous namespace, and nothing
// of the standard library is instantiated, so that code for one instruction set never reaches a CPU without it.
#pragma once
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moekit {
namespace {

// kDotRows × kDotCols and kGemmM × kGemmV accumulators fill the register file without spilling.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kDotRows = 4, kDotCols = 6, kGemmM = 12, kGemmV = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kDotRows = 3, kDotCols = 3, kGemmM = 6, kGemmV = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kDotRows = 4, kDotCols = 6, kGemmM = 12, kGemmV = 2;
#else
constexpr int kLanes = 4, kDotRows = 3, kDotCols = 3, kGemmM = 6, kGemmV = 2;
#endif
constexpr int kGemmN = kGemmV * kLanes;

using BF16 = std::uint16_t;
typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t VecH __attribute__((vector_size(kLanes * 2)));

template <class V>
inline V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The first n elements, then zeros.
template <class V>
inline V load_some(const void* p, long n, int element) {
  V v = {};
  __builtin_memcpy(&v, p, n * element);
  return v;
}

// Asks for a line that is read soon, in L2 only: of rows or strips a power of two apart, as weights are, a few fill the
// sets of L1 that they share, and push each other's lines out before they are read.
[[gnu::always_inline]] inline void ask_ahead(const void* line) { __builtin_prefetch(line, 0, 2); }

inline VecU widen(VecH h) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VecU);
#endif
}

inline VecF to_f32(VecF v) { return v; }
inline VecF to_f32(VecH h) { return (VecF)(widen(h) << 16); }
inline float to_f32(float v) { return v; }
inline float to_f32(BF16 h) {
  const std::uint32_t bits = std::uint32_t(h) << 16;
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}

// Round to nearest, ties to even; a NaN stays a NaN. What is below 2^-126 becomes zero where the CPU rounds.
inline VecH to_bf16(VecF v) {
#if defined(__AVX512BF16__)
  return (VecH)_mm512_cvtneps_pbh((__m512)v);
#else
  const VecU bits = (VecU)v;
  const VecU nan = (VecU)((bits & 0x7fffffffu) > 0x7f800000u);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((nan & ((bits >> 16) | 0x40u)) | (~nan & rounded), VecH);
#endif
}

inline void store_some(float* p, VecF v, long n) { __builtin_memcpy(p, &v, n * 4); }
inline void store_some(BF16* p, VecF v, long n) {
  const VecH h = to_bf16(v);
  __builtin_memcpy(p, &h, n * 2);
}

// Pairwise, so the order is the same at every call.
inline float sum_lanes(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

// How a type's products are formed. `Word` is what packed operands hold: kStep elements of one row or column.
template <class E>
struct Arith;

template <>
struct Arith<float> {
  using Loaded = VecF;
  using Word = float;
  static constexpr int kWide = kLanes, kStep = 1;
  static Loaded load(const float* p) { return load_as<VecF>(p); }
  static Loaded load(const float* p, long n) { return load_some<VecF>(p, n, 4); }
  static VecF mad(Loaded a, Loaded b, VecF c) { return a * b + c; }
};

#if defined(__AVX512BF16__)
template <>
struct Arith<BF16> {
  typedef std::uint16_t Loaded __attribute__((vector_size(64)));
  using Word = std::uint32_t;
  static constexpr int kWide = 32, kStep = 2;
  static Loaded load(const BF16* p) { return load_as<Loaded>(p); }
  static Loaded load(const BF16* p, long n) { return load_some<Loaded>(p, n, 2); }
  static VecF mad(Loaded a, Loaded b, VecF c) {
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#else
template <>
struct Arith<BF16> {
  using Loaded = VecF;
  using Word = float;
  static constexpr int kWide = kLanes, kStep = 1;
  static Loaded load(const BF16* p) { return to_f32(load_as<VecH>(p)); }
  static Loaded load(const BF16* p, long n) { return to_f32(load_some<VecH>(p, n, 2)); }
  static VecF mad(Loaded a, Loaded b, VecF c) { return a * b + c; }
};
#endif

}  // namespace
}  // namespace moekit
