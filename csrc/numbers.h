// Numbers in memory as vectors of fp32, whatever they are stored as.
#pragma once
#include "isa.h"
#include "vec.h"

namespace moekit {
namespace {

struct F16 {
  std::uint16_t bits;
};

inline VecF widen_f16(VecH h) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  // A normal number is scaled from a float with the same fields; a subnormal one is subtracted out of 0.5's mantissa.
  const VecU word = widen(h) << 16, twice = word + word;
  const VecF normal = (VecF)((twice >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const VecF subnormal = (VecF)((twice >> 17) | (126u << 23)) - 0.5f;
  const VecU small = (VecU)(twice < (1u << 27));
  return (VecF)((word & 0x80000000u) | (small & (VecU)subnormal) | (~small & (VecU)normal));
#endif
}

// Round to nearest, ties to even; past 65519 infinity.
inline VecH narrow_f16(VecF v) {
  const VecU word = (VecU)v, twice = word + word;
  const VecF magnitude = (VecF)(word & 0x7fffffffu) * 0x1p112f * 0x1p-110f;
  VecU bias = twice & 0xff000000u;
  const VecU low = (VecU)(bias < 0x71000000u);
  bias = (low & 0x71000000u) | (~low & bias);
  const VecU rounded = (VecU)((VecF)((bias >> 1) + 0x07800000u) + magnitude);
  const VecU nan = (VecU)(twice > 0xff000000u);
  const VecU rest = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
  return __builtin_convertvector((word >> 16 & 0x8000u) | (nan & 0x7e00u) | (~nan & rest), VecH);
}

inline VecF read(const float* p) { return load_as<VecF>(p); }
inline VecF read(const BF16* p) { return to_f32(load_as<VecH>(p)); }
inline VecF read(const F16* p) { return widen_f16(load_as<VecH>(p)); }

inline VecF read_some(const float* p, i64 n) { return load_some<VecF>(p, n, 4); }
inline VecF read_some(const BF16* p, i64 n) { return to_f32(load_some<VecH>(p, n, 2)); }
inline VecF read_some(const F16* p, i64 n) { return widen_f16(load_some<VecH>(p, n, 2)); }
inline void write_some(float* p, VecF v, i64 n) { store_some(p, v, n); }
inline void write_some(BF16* p, VecF v, i64 n) { store_some(p, v, n); }
inline void write_some(F16* p, VecF v, i64 n) {
  const VecH h = narrow_f16(v);
  __builtin_memcpy(p, &h, n * 2);
}

// n numbers, at most a vector of them; what is not read is zero.
template <class E>
inline VecF read(const E* p, i64 n) {
  return n >= kLanes ? read(p) : read_some(p, n);
}
template <class E>
inline void write(E* p, VecF v, i64 n) {
  n >= kLanes ? write_some(p, v, kLanes) : write_some(p, v, n);
}

// Calls body(at, n) for each vector of n = kLanes elements, and for what is left.
template <class Body>
inline void each_vector(i64 size, const Body& body) {
  i64 at = 0;
  for (; at + kLanes <= size; at += kLanes) body(at, kLanes);
  if (at < size) body(at, size - at);
}

}  // namespace
}  // namespace moekit
