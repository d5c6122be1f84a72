// Integer products of 16 rows on the instruction set this file is compiled for: kParts vectors of kLanes rows.
#pragma once
#include "vec.h"

namespace moekit {
namespace {

constexpr int kParts = 16 / kLanes;
typedef std::uint8_t VecB __attribute__((vector_size(kLanes * 4)));  // four codes of each row

// Strips, and tokens that pass two of them: their sums over all blocks and over one stay in registers, which
// with 12 tokens they do not.
#if defined(__AVX512F__)
constexpr int kTileStrips = 4, kTileTokens = 6;
#else
constexpr int kTileStrips = 1, kTileTokens = 4;
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || !defined(__AVX2__)
constexpr bool kSignTrick = false;
#else
// Without VNNI the products of unsigned and signed bytes are summed in 16 bits, where 255 · 127 · 2 does not fit, but
// 127 · 127 · 2 does: codes around 128 go as magnitudes, with their signs given to the activations.
constexpr bool kSignTrick = true;
#endif

#if defined(__AVX512VNNI__)
constexpr char kProducts[] = "vpdpbusd on 512 bits";
#elif defined(__AVXVNNI__)
constexpr char kProducts[] = "vpdpbusd on 256 bits";
#elif defined(__AVX512F__)
constexpr char kProducts[] = "vpmaddubsw on 512 bits, for want of VNNI";
#elif defined(__AVX2__)
constexpr char kProducts[] = "vpmaddubsw on 256 bits, for want of VNNI";
#else
constexpr char kProducts[] = "plain C++, for want of AVX2";
#endif

// sums + Σ_j codes[4r + j] · a_j, where the word `a` holds four int8.
inline VecI dot_codes(VecI sums, VecB codes, std::int32_t a) {
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(a));
#elif defined(__AVXVNNI__)
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(a));
#elif defined(__AVX512F__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(a));
  return sums + (VecI)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(a));
  return sums + (VecI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const VecI words = (VecI)codes;
  for (int j = 0; j < 4; ++j) sums += ((words >> (8 * j)) & 255) * static_cast<std::int8_t>(a >> (8 * j));
  return sums;
#endif
}

// The same where a code c stands for c - 128, already subtracted if kSignTrick.
inline VecI dot_around_128(VecI sums, VecB codes, std::int32_t a) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || !defined(__AVX2__)
  return dot_codes(sums, codes, a);
#elif defined(__AVX512F__)
  const __m512i w = (__m512i)(codes ^ 128), all = _mm512_set1_epi32(a);
  const __m512i turned = _mm512_mask_sub_epi8(all, _mm512_movepi8_mask(w), _mm512_setzero_si512(), all);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), turned);
  return sums + (VecI)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
  const __m256i w = (__m256i)(codes ^ 128);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(a), w));
  return sums + (VecI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// table[code] of every byte; codes are below 16.
inline VecB look_up(const std::uint8_t (&table)[16], VecB codes) {
#if defined(__AVX512F__)
  return (VecB)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), (__m512i)codes);
#elif defined(__AVX2__)
  return (VecB)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)),
                                   (__m256i)codes);
#else
  VecB found;
  for (int i = 0; i < kLanes * 4; ++i) found[i] = table[codes[i]];
  return found;
#endif
}

inline VecB low_nibbles(VecB bytes) { return bytes & 15; }
inline VecB high_nibbles(VecB bytes) {
  typedef std::uint16_t Wide __attribute__((vector_size(kLanes * 4)));
  return (VecB)((Wide)bytes >> 4) & 15;
}

inline VecU from_bytes(const void* p) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
#else
  VecU wide;
  for (int i = 0; i < kLanes; ++i) wide[i] = static_cast<const std::uint8_t*>(p)[i];
  return wide;
#endif
}

inline std::uint32_t largest_lane(VecU v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)v);
#else
  std::uint32_t top = 0;
  for (int i = 0; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

inline std::int32_t total_of_lanes(VecI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  std::int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

inline VecF to_floats(VecI v) { return __builtin_convertvector(v, VecF); }
inline VecF splat(float x) { return VecF{} + x; }

// Keeps a product from being fused with the sum that follows: every instruction set then rounds it alike.
inline VecF rounded(VecF product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

}  // namespace
}  // namespace moekit
