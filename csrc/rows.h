// The inner loops of decoding, where there is one row of activations and everything else streams past it: written
// once over vec.h, compiled for each instruction set by tiles_<isa>.cpp. Activations and sums are fp32. A result
// depends on its own row or head alone, so the same bits come out however the work is cut.
#pragma once
#include "activation.h"
#include "isa.h"
#include "numbers.h"

namespace moekit {
namespace {

inline VecF rounded(VecF v, int dtype) { return dtype == kBF16 ? to_f32(to_bf16(v)) : v; }

// ---- weights: rows of a matrix times the activations ----------------------------------------------------------

// Rows that are read at the same time, and how far ahead. Measured with 2 threads on 4 KiB pages, where the hardware's
// prefetcher gets lost: 14 GB/s without, 27 GB/s with; a plain read reaches 24.
constexpr int kRowsAtOnce = 8;
constexpr i64 kBytesAhead = 1024;

// `next`: as many rows, to prefetch from near the end of these.
template <class E, int N>
inline void dot_with(const E* w, i64 ld, const float* x, float* out, i64 k, const E* next) {
  constexpr i64 kAhead = kBytesAhead / static_cast<i64>(sizeof(E)), kLine = 64 / static_cast<i64>(sizeof(E));
  static_assert(kLine % kLanes == 0 || kLanes % kLine == 0);
  VecF acc[N] = {};
  i64 at = 0;
  for (; at + kLanes <= k; at += kLanes) {
    const VecF right = read(x + at);
    const E* ahead = at + kAhead < k ? w + at + kAhead : next + (at + kAhead - k);
    for (int n = 0; n < N; ++n) {
      if (at % kLine == 0) ask_ahead(ahead + n * ld);
      acc[n] = read(w + n * ld + at) * right + acc[n];
    }
  }
  if (at < k) {
    const VecF right = read(x + at, k - at);
    for (int n = 0; n < N; ++n) acc[n] = read(w + n * ld + at, k - at) * right + acc[n];
  }
  for (int n = 0; n < N; ++n) out[n] = sum_lanes(acc[n]);
}

template <class E>
void matvec_rows(const void* weight, i64 ld, const float* x, float* out, i64 rows, i64 k, const void* then) {
  const E* w = static_cast<const E*>(weight);
  for (; rows >= kRowsAtOnce; rows -= kRowsAtOnce, w += kRowsAtOnce * ld, out += kRowsAtOnce) {
    const E* next = rows >= 2 * kRowsAtOnce ? w + kRowsAtOnce * ld : static_cast<const E*>(then);
    dot_with<E, kRowsAtOnce>(w, ld, x, out, k, next);
  }
  for (; rows; --rows, w += ld, ++out) dot_with<E, 1>(w, ld, x, out, k, w + (rows > 1 ? ld : 0));
}

// ---- attention: G query heads share one head of keys and values -----------------------------------------------

constexpr int kSums = 8;  // independent sums in flight

template <class E, int G>
void score_some(const float* q, const E* k, i64 positions, i64 d, float* out, i64 stride) {
  constexpr int P = kSums / G;
  const auto block = [&](auto count, const E* keys, float* to) {
    constexpr int N = decltype(count)::value;
    VecF acc[N][G] = {};
    each_vector(d, [&](i64 at, i64 n) {
      VecF query[G];
      for (int g = 0; g < G; ++g) query[g] = read(q + g * d + at, n);
      for (int p = 0; p < N; ++p) {
        const VecF key = read(keys + p * d + at, n);
        for (int g = 0; g < G; ++g) acc[p][g] = key * query[g] + acc[p][g];
      }
    });
    for (int p = 0; p < N; ++p)
      for (int g = 0; g < G; ++g) to[g * stride + p] = sum_lanes(acc[p][g]);
  };
  i64 s = 0;
  for (; s + P <= positions; s += P) block(Constant<P>{}, k + s * d, out + s);
  for (; s < positions; ++s) block(Constant<1>{}, k + s * d, out + s);
}

template <class E, int G>
void mix_some(const float* p, i64 stride, const E* v, i64 positions, i64 d, float* out) {
  constexpr int V = kSums / G;
  const auto columns = [&](auto count, i64 first, i64 n) {
    constexpr int N = decltype(count)::value;
    VecF acc[G][N] = {};
    for (i64 s = 0; s < positions; ++s)
      for (int c = 0; c < N; ++c) {
        const E* at = v + s * d + first + c * kLanes;
        const VecF value = read(at, n);
        for (int g = 0; g < G; ++g) acc[g][c] = value * p[g * stride + s] + acc[g][c];
      }
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < N; ++c) write(out + g * d + first + c * kLanes, acc[g][c], n);
  };
  i64 first = 0;
  for (; first + V * kLanes <= d; first += V * kLanes) columns(Constant<V>{}, first, kLanes);
  for (; first < d; first += kLanes) columns(Constant<1>{}, first, d - first < kLanes ? d - first : kLanes);
}

// out_GS[g][s] = q_Gd[g] · k_Sd[s]
template <class E>
void scores(const float* q_Gd, i64 heads, const void* k_Sd, i64 positions, i64 d, float* out_GS, i64 stride) {
  const E* k = static_cast<const E*>(k_Sd);
  for (; heads >= 4; heads -= 4, q_Gd += 4 * d, out_GS += 4 * stride)
    score_some<E, 4>(q_Gd, k, positions, d, out_GS, stride);
  for (; heads >= 2; heads -= 2, q_Gd += 2 * d, out_GS += 2 * stride)
    score_some<E, 2>(q_Gd, k, positions, d, out_GS, stride);
  if (heads) score_some<E, 1>(q_Gd, k, positions, d, out_GS, stride);
}

// out_Gd[g] = Σ_s p_GS[g][s] · v_Sd[s]
template <class E>
void mix(const float* p_GS, i64 stride, i64 heads, const void* v_Sd, i64 positions, i64 d, float* out_Gd) {
  const E* v = static_cast<const E*>(v_Sd);
  for (; heads >= 4; heads -= 4, p_GS += 4 * stride, out_Gd += 4 * d)
    mix_some<E, 4>(p_GS, stride, v, positions, d, out_Gd);
  for (; heads >= 2; heads -= 2, p_GS += 2 * stride, out_Gd += 2 * d)
    mix_some<E, 2>(p_GS, stride, v, positions, d, out_Gd);
  if (heads) mix_some<E, 1>(p_GS, stride, v, positions, d, out_Gd);
}

// ---- element by element ---------------------------------------------------------------------------------------

// x becomes e^(x·scale − max), where max is the largest x·scale; returns the sum.
inline float exp_and_sum(float* x, i64 size, float scale, float* max) {
  VecF most = VecF{} - __builtin_inff(), total = {};
  i64 at = 0;
  for (; at + kLanes <= size; at += kLanes) {
    const VecF v = read(x + at) * scale;
    most = v > most ? v : most;
  }
  *max = -__builtin_inff();
  for (int lane = 0; lane < kLanes; ++lane) *max = most[lane] > *max ? most[lane] : *max;
  for (; at < size; ++at) *max = x[at] * scale > *max ? x[at] * scale : *max;
  each_vector(size, [&](i64 first, i64 n) {
    write(x + first, exponential(read(x + first, n) * scale - *max), n);
    total += read(x + first, n);
  });
  return sum_lanes(total);
}

// x / sqrt(mean(x²) + eps) · weight, rounded to dtype before and after the weight; out may be x.
inline void rms_norm(const float* x, const float* weight, float eps, float* out, i64 size, int dtype) {
  VecF squares = {};
  each_vector(size, [&](i64 at, i64 n) {
    const VecF v = read(x + at, n);
    squares = v * v + squares;
  });
  const float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(size) + eps);
  each_vector(size, [&](i64 at, i64 n) {
    write(out + at, rounded(rounded(read(x + at, n) * factor, dtype) * read(weight + at, n), dtype), n);
  });
}

// Rotate (first half, second half) pairs by the angles whose cosines and sines are given, d/2 of each.
inline void rotate(float* x, const float* cosine, const float* sine, i64 d, int dtype) {
  each_vector(d / 2, [&](i64 at, i64 n) {
    const VecF left = read(x + at, n), right = read(x + d / 2 + at, n);
    const VecF c = read(cosine + at, n), s = read(sine + at, n);
    write(x + at, rounded(left * c - right * s, dtype), n);
    write(x + d / 2 + at, rounded(right * c + left * s, dtype), n);
  });
}

// y += x, both rounded to dtype.
inline void add_rounded(float* y, const float* x, i64 size, int dtype) {
  each_vector(size, [&](i64 at, i64 n) {
    write(y + at, rounded(read(y + at, n) + rounded(read(x + at, n), dtype), dtype), n);
  });
}

template <class E>
void store_as(const float* x, void* out, i64 size) {
  each_vector(size, [&](i64 at, i64 n) { write(static_cast<E*>(out) + at, read(x + at, n), n); });
}

template <class E>
void load_from(const void* x, float* out, i64 size) {
  each_vector(size, [&](i64 at, i64 n) { write(out + at, read(static_cast<const E*>(x) + at, n), n); });
}

constexpr RowOps kRowOps = {
    {matvec_rows<float>, matvec_rows<BF16>},
    {scores<float>, scores<BF16>, scores<F16>},
    {mix<float>, mix<BF16>, mix<F16>},
    {store_as<float>, store_as<BF16>, store_as<F16>},
    {load_from<float>, load_from<BF16>, load_from<F16>},
    exp_and_sum,
    rms_norm,
    rotate,
    add_rounded,
};

}  // namespace
}  // namespace moekit
