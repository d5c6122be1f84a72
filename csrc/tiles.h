// The tile kernels, written once over vec.h; tiles_<isa>.cpp compiles them for one instruction set.
#pragma once
#include "isa.h"
#include "rows.h"
#include "vec.h"

namespace moekit {
namespace {

// ---- dot: both operands run along k, so nothing is packed -----------------------------------------------------

template <class E, int M, int N>
inline void accumulate(const void* const* a, const E* b, i64 ldb, i64 k, VecF (&acc)[M][N]) {
  using A = Arith<E>;
  i64 at = 0;
  for (; at + A::kWide <= k; at += A::kWide) {
    typename A::Loaded left[M];
    for (int m = 0; m < M; ++m) left[m] = A::load(static_cast<const E*>(a[m]) + at);
    for (int n = 0; n < N; ++n) {
      const typename A::Loaded right = A::load(b + n * ldb + at);
      for (int m = 0; m < M; ++m) acc[m][n] = A::mad(left[m], right, acc[m][n]);
    }
  }
  if (at == k) return;
  for (int n = 0; n < N; ++n) {
    const typename A::Loaded right = A::load(b + n * ldb + at, k - at);
    for (int m = 0; m < M; ++m)
      acc[m][n] = A::mad(A::load(static_cast<const E*>(a[m]) + at, k - at), right, acc[m][n]);
  }
}

template <class E, class C, int M, int N>
void dot_block(const void* const* a, const E* b, i64 ldb, C* c, i64 ldc, i64 k) {
  VecF acc[M][N] = {};
  accumulate<E, M, N>(a, b, ldb, k, acc);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const VecF sum = VecF{} + sum_lanes(acc[m][n]);
      store_some(c + m * ldc + n, sum, 1);
    }
}

template <class E, class C, int N, int M = kDotRows>
void dot_rows(const void* const* a, const E* b, i64 ldb, C* c, i64 ldc, i64 m, i64 k) {
  for (; m >= M; m -= M, a += M, c += M * ldc) dot_block<E, C, M, N>(a, b, ldb, c, ldc, k);
  if constexpr (M > 1) {
    if (m) dot_rows<E, C, N, M - 1>(a, b, ldb, c, ldc, m, k);
  }
}

template <class E, class C>
void dot_tile(const void* const* a, const void* b, i64 ldb, void* c, i64 ldc, i64 m, i64 n, i64 k) {
  const E* cols = static_cast<const E*>(b);
  C* out = static_cast<C*>(c);
  for (; n >= kDotCols; n -= kDotCols, cols += kDotCols * ldb, out += kDotCols)
    dot_rows<E, C, kDotCols>(a, cols, ldb, out, ldc, m, k);
  for (; n; --n, cols += ldb, ++out) dot_rows<E, C, 1>(a, cols, ldb, out, ldc, m, k);
}

// ---- gemm: both operands packed, A in panels of M rows, B in panels of kGemmN columns -------------------------

inline void set_word(float& word, const float* p, i64, i64) { word = *p; }
inline void set_word(float& word, const BF16* p, i64, i64) { word = to_f32(*p); }
inline void set_word(std::uint32_t& word, const BF16* p, i64 stride, i64 left) {
  word = p[0] | (left > 1 ? std::uint32_t(p[stride]) << 16 : 0u);
}

template <class E, int M>
void pack_a(const E* a, i64 a_m, i64 a_k, i64 m, i64 k, typename Arith<E>::Word* out) {
  for (i64 panel = 0; panel < m; panel += M)
    for (i64 at = 0; at < k; at += Arith<E>::kStep)
      for (int i = 0; i < M; ++i, ++out) {
        *out = 0;
        if (panel + i < m) set_word(*out, a + (panel + i) * a_m + at * a_k, a_k, k - at);
      }
}

// kLanes columns at `p`: `left` rows remain below, `cols` of the columns exist.
inline VecF b_words(const float* p, i64, i64, i64 cols, float) {
  return cols >= kLanes ? load_as<VecF>(p) : load_some<VecF>(p, cols, 4);
}
inline VecH b_row(const BF16* p, i64 cols) {
  return cols >= kLanes ? load_as<VecH>(p) : load_some<VecH>(p, cols, 2);
}
inline VecF b_words(const BF16* p, i64, i64, i64 cols, float) { return to_f32(b_row(p, cols)); }
inline VecU b_words(const BF16* p, i64 stride, i64 left, i64 cols, std::uint32_t) {
  const VecU low = widen(b_row(p, cols));
  return left > 1 ? low | (widen(b_row(p + stride, cols)) << 16) : low;
}

template <class E>
void pack_b(const E* b, i64 ldb, i64 n, i64 k, typename Arith<E>::Word* out) {
  using Word = typename Arith<E>::Word;
  for (i64 panel = 0; panel < n; panel += kGemmN)
    for (i64 at = 0; at < k; at += Arith<E>::kStep)
      for (int v = 0; v < kGemmV; ++v, out += kLanes) {
        const i64 first = panel + v * kLanes, cols = n - first;
        if (cols <= 0) {
          __builtin_memset(out, 0, kLanes * 4);
          continue;
        }
        const auto words = b_words(b + at * ldb + first, ldb, k - at, cols, Word{});
        __builtin_memcpy(out, &words, sizeof words);
      }
}

inline VecF load_word(const float* p) { return load_as<VecF>(p); }
inline VecU load_word(const std::uint32_t* p) { return load_as<VecU>(p); }
inline VecF mad_words(float a, VecF b, VecF c) { return a * b + c; }
#if defined(__AVX512BF16__)
inline VecF mad_words(std::uint32_t a, VecU b, VecF c) {
  return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}
#endif

// c (M × kGemmN) += one panel of A · one panel of B.
template <class Word, int M>
void micro(const Word* a, const Word* b, i64 steps, float* c, i64 ldc) {
  VecF acc[M][kGemmV] = {};
  for (i64 step = 0; step < steps; ++step, a += M, b += kGemmN)
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kGemmV; ++v) acc[m][v] = mad_words(a[m], load_word(b + v * kLanes), acc[m][v]);
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kGemmV; ++v) {
      float* at = c + m * ldc + v * kLanes;
      const VecF sum = load_as<VecF>(at) + acc[m][v];
      __builtin_memcpy(at, &sum, sizeof sum);
    }
}

template <class Word, int M>
void multiply_packed(const Word* a, const Word* b, i64 m, i64 n, i64 steps, float* c) {
  for (i64 col = 0; col < n; col += kGemmN)
    for (i64 row = 0; row < m; row += M)
      micro<Word, M>(a + row * steps, b + col * steps, steps, c + row * kGemmCols + col, kGemmCols);
}

template <class E>
void write_out(const float* c, i64 ld, E* out, i64 ldc, i64 m, i64 n) {
  for (i64 row = 0; row < m; ++row)
    for (i64 col = 0; col < n; col += kLanes) {
      const VecF v = load_as<VecF>(c + row * ld + col);
      if (n - col >= kLanes)
        store_some(out + row * ldc + col, v, kLanes);
      else
        store_some(out + row * ldc + col, v, n - col);
    }
}

template <class E, int M>
void gemm_rows(const E* a, i64 a_m, i64 a_k, const E* b, i64 ldb, E* c, i64 ldc, i64 m, i64 n, i64 k, void* scratch) {
  using Word = typename Arith<E>::Word;
  static_assert(kGemmRows % M == 0 && kGemmCols % kGemmN == 0);
  float* sums = static_cast<float*>(scratch);
  Word* packed_a = reinterpret_cast<Word*>(sums + kGemmRows * kGemmCols);
  Word* packed_b = packed_a + kGemmRows * kGemmDepth;
  __builtin_memset(sums, 0, (m + M - 1) / M * M * kGemmCols * sizeof(float));
  for (i64 at = 0; at < k; at += kGemmDepth) {
    const i64 depth = k - at < kGemmDepth ? k - at : kGemmDepth;
    pack_a<E, M>(a + at * a_k, a_m, a_k, m, depth, packed_a);
    pack_b<E>(b + at * ldb, ldb, n, depth, packed_b);
    const i64 steps = (depth + Arith<E>::kStep - 1) / Arith<E>::kStep;
    multiply_packed<Word, M>(packed_a, packed_b, m, n, steps, sums);
  }
  write_out(sums, kGemmCols, c, ldc, m, n);
}

// ---- few rows of A: packing B would cost more than the product, so its rows stream past once ------------------

constexpr int kStreamWords = 4;

// sums (M × n) += kStreamWords words of A · as many of B's rows; fewer at the end of k, `left` rows of B.
template <class E, int M, int U>
void stream_words(const E* a, i64 a_m, i64 a_k, const E* b, i64 ldb, float* sums, i64 n, i64 left) {
  using A = Arith<E>;
  typename A::Word words[U][M];
  for (int u = 0; u < U; ++u)
    for (int m = 0; m < M; ++m) set_word(words[u][m], a + m * a_m + u * A::kStep * a_k, a_k, left - u * A::kStep);
  for (i64 col = 0; col < n; col += kLanes) {
    VecF acc[M];
    for (int m = 0; m < M; ++m) acc[m] = load_as<VecF>(sums + m * kStreamCols + col);
    for (int u = 0; u < U; ++u) {
      const i64 row = u * A::kStep;
      const auto right = b_words(b + row * ldb + col, ldb, left - row, n - col, typename A::Word{});
      for (int m = 0; m < M; ++m) acc[m] = mad_words(words[u][m], right, acc[m]);
    }
    for (int m = 0; m < M; ++m) __builtin_memcpy(sums + m * kStreamCols + col, &acc[m], sizeof(VecF));
  }
}

template <class E, int M = kStreamRows>
void stream_rows(const E* a, i64 a_m, i64 a_k, const E* b, i64 ldb, E* c, i64 ldc, i64 m, i64 n, i64 k, float* sums) {
  if constexpr (M > 1) {
    if (m < M) return stream_rows<E, M - 1>(a, a_m, a_k, b, ldb, c, ldc, m, n, k, sums);
  }
  constexpr i64 kStep = Arith<E>::kStep, kMany = kStep * kStreamWords;
  __builtin_memset(sums, 0, M * kStreamCols * sizeof(float));
  i64 at = 0;
  for (; at + kMany <= k; at += kMany)
    stream_words<E, M, kStreamWords>(a + at * a_k, a_m, a_k, b + at * ldb, ldb, sums, n, kMany);
  for (; at < k; at += kStep) stream_words<E, M, 1>(a + at * a_k, a_m, a_k, b + at * ldb, ldb, sums, n, k - at);
  write_out(sums, kStreamCols, c, ldc, M, n);
}

template <class E>
void gemm_tile(const void* a, i64 a_m, i64 a_k, const void* b, i64 ldb, void* c, i64 ldc, i64 m, i64 n, i64 k,
               void* scratch) {
  const E *left = static_cast<const E*>(a), *right = static_cast<const E*>(b);
  E* out = static_cast<E*>(c);
  if (m == 0) return;
  if (m <= kStreamRows)
    stream_rows<E>(left, a_m, a_k, right, ldb, out, ldc, m, n, k, static_cast<float*>(scratch));
  else
    gemm_rows<E, kGemmM>(left, a_m, a_k, right, ldb, out, ldc, m, n, k, scratch);
}

}  // namespace
}  // namespace moekit

#define MOEKIT_TILES(NAME)                                                      \
  const moekit::Tiles moekit::tiles_##NAME = {                                  \
      #NAME,                                                                    \
      {moekit::dot_tile<float, float>, moekit::dot_tile<moekit::BF16, moekit::BF16>}, \
      {moekit::dot_tile<float, float>, moekit::dot_tile<moekit::BF16, float>},  \
      {moekit::gemm_tile<float>, moekit::gemm_tile<moekit::BF16>},              \
      moekit::kRowOps,                                                          \
  };
