// What happens to rows before and after a product of panels.h: conversion, activation and its gradient, weighted sums.
#pragma once
#include "activation.h"
#include "numbers.h"
#include "panels.h"

namespace moekit {
namespace {

template <class From, class To>
void convert(const From* from, i64 n, To* to) {
  for (i64 i = 0; i < n; i += kLanes) write(to + i, read(from + i, n - i), n - i);
}

// The row ends with a whole word: what is past its last number must not be a NaN.
template <class R>
inline void end_row(R* row, i64 n) {
  for (; n * sizeof(R) % 4; ++n) row[n] = 0;
}

template <class W>
void to_row(const void* from, int dtype, i64 n, void* row) {
  using R = typename Word<W>::Element;
  if (dtype == kF32)
    convert(static_cast<const float*>(from), n, static_cast<R*>(row));
  else
    convert(static_cast<const BF16*>(from), n, static_cast<R*>(row));
  end_row(static_cast<R*>(row), n);
}

template <class W>
void turn(const void* rows, i64 ld, i64 first, i64 m, i64 k, void* words, i64 words_ld) {
  using R = typename Word<W>::Element;
  constexpr int kStep = Word<W>::kStep;
  const auto row = [&](i64 r) {
    return r < k ? static_cast<const R*>(rows) + first + r * ld : nullptr;
  };
  for (i64 at = 0; at < k; at += kLanes * kStep) {
    W* const out = static_cast<W*>(words) + at / kStep;
    const i64 some = (k - at + kStep - 1) / kStep < kLanes ? (k - at + kStep - 1) / kStep : kLanes;
    const R *even[kLanes], *odd[kLanes];
    for (i64 i = 0; i < some; ++i) even[i] = row(at + i * kStep), odd[i] = row(at + i * kStep + kStep - 1);
    for (i64 j = 0; j < m; j += kLanes) {
      VecU v[kLanes] = {};
      for (i64 i = 0; i < some; ++i) v[i] = (VecU)words_at(even[i] + j, odd[i] ? odd[i] + j : nullptr, m - j, W{});
      transpose(v);
      for (i64 i = 0; i < kLanes && j + i < m; ++i)
        __builtin_memcpy(out + (j + i) * words_ld, &v[i], some == kLanes ? sizeof v[i] : some * 4);
    }
  }
}

// ---- the inner rows --------------------------------------------------------------------------------------------

// c's panels lie `tile` numbers apart: a row of all of them is written at a time, since rows are pages apart.
template <class E, class R, int A, bool Gated>
void activate_rows(const float* c, i64 tile, i64 rows, i64 first, i64 cols, const E* bias, E* pre, R* hidden,
                   i64 hidden_ld, i64 inner) {
  constexpr i64 kCols = Gated ? kPanel / 2 : kPanel;
  for (i64 row = 0; row < rows; ++row, c += kPanel, hidden += hidden_ld) {
    const float* panel = c;
    for (i64 from = 0; from < cols; from += kCols, panel += tile)
      for (i64 j = 0; j < kCols; j += kLanes) {
        const i64 at = first + from + j, n = cols - from - j;
        if (n <= 0) break;
        VecF gate = load_as<VecF>(panel + j), up = {};
        if constexpr (Gated) up = load_as<VecF>(panel + kPanel / 2 + j);
        if (bias) {
          gate += read(bias + at, n);
          if constexpr (Gated) up += read(bias + inner + at, n);
        }
        if (pre) {
          write(pre + at, gate, n);
          if constexpr (Gated) write(pre + inner + at, up, n);
        }
        const VecF act = activation<A>(gate);
        write(hidden + at, Gated ? act * up : act, n);
      }
    if (first + cols == inner) end_row(hidden, inner);
    if (pre) pre += Gated ? 2 * inner : inner;
  }
}

template <class E, class R, int A, bool Gated>
void activate_rows_backward(const float* c, i64 tile, i64 rows, i64 first, i64 cols, const E* pre,
                            const float* weights, R* grad_pre, i64 grad_ld, R* weighted, i64 hidden_ld,
                            float* grad_weight, i64 grad_weight_ld, i64 inner) {
  const i64 width = Gated ? 2 * inner : inner;
  for (i64 row = 0; row < rows; ++row, c += kPanel, pre += width) {
    const float* panel = c;
    for (i64 from = 0; from < cols; from += kPanel, panel += tile) {
      VecF sum = {};
      for (i64 j = 0; j < kPanel; j += kLanes) {
        const i64 at = first + from + j, n = cols - from - j;
        if (n <= 0) break;
        __builtin_prefetch(panel + 2 * kPanel + j);  // rows below are far apart
        __builtin_prefetch(pre + width + at);
        if constexpr (Gated) __builtin_prefetch(pre + width + inner + at);
        const VecF gate = read(pre + at, n), grad = load_as<VecF>(panel + j);
        VecF up = VecF{} + 1.0f;
        if constexpr (Gated) up = read(pre + inner + at, n);
        VecF slope;
        const VecF act = activation<A>(gate, slope), hidden = act * up, own = grad * weights[row];
        sum += grad * hidden;  // the columns past `cols` are zeros in c
        if (grad_pre) {
          write(grad_pre + row * grad_ld + at, own * up * slope, n);
          if constexpr (Gated) write(grad_pre + row * grad_ld + inner + at, own * act, n);
        }
        if (weighted) write(weighted + row * hidden_ld + at, hidden * weights[row], n);
      }
      if (grad_weight) grad_weight[row * grad_weight_ld + from / kPanel] = sum_lanes(sum);
    }
    if (grad_pre && first + cols == inner) end_row(grad_pre + row * grad_ld, width);
  }
}

// Call with the activation and whether there is a gate as constants.
template <class Body>
inline void with_inner(const Inner& inner, const Body& body) {
  with_activation(inner.activation, [&](auto activation) {
    inner.gated ? body(activation, Constant<1>{}) : body(activation, Constant<0>{});
  });
}

template <class E, class W>
void activate(const float* c, i64 tile, i64 rows, i64 first, i64 cols, const void* bias, void* pre, void* hidden,
              i64 hidden_ld, const Inner& inner) {
  using R = typename Word<W>::Element;
  with_inner(inner, [&](auto act, auto gated) {
    activate_rows<E, R, act.value, gated.value>(c, tile, rows, first, cols, static_cast<const E*>(bias),
                                                static_cast<E*>(pre), static_cast<R*>(hidden), hidden_ld,
                                                inner.inner);
  });
}

template <class E, class W>
void activate_backward(const float* c, i64 tile, i64 rows, i64 first, i64 cols, const void* pre,
                       const float* weights, void* grad_pre, i64 grad_ld, void* weighted, i64 hidden_ld,
                       float* grad_weight, i64 grad_weight_ld, const Inner& inner) {
  using R = typename Word<W>::Element;
  with_inner(inner, [&](auto act, auto gated) {
    activate_rows_backward<E, R, act.value, gated.value>(
        c, tile, rows, first, cols, static_cast<const E*>(pre), weights, static_cast<R*>(grad_pre), grad_ld,
        static_cast<R*>(weighted), hidden_ld, grad_weight, grad_weight_ld, inner.inner);
  });
}

// ---- sums ------------------------------------------------------------------------------------------------------

template <class E>
void add_to_tokens(const float* c, i64 rows, const i64* place, i64 from, const float* weights, const void* bias,
                   i64 cols, float* acc) {
  const E* more = static_cast<const E*>(bias);
  for (i64 row = 0; row < rows; ++row, c += kPanel) {
    float* sum = acc + (place[row] - from) * kPanel;
    for (i64 j = 0; j < cols; j += kLanes) {
      VecF v = load_as<VecF>(c + j);
      if (bias) v += read(more + j, cols - j);
      if (weights) v *= weights[row];
      v += load_as<VecF>(sum + j);
      __builtin_memcpy(sum + j, &v, sizeof v);
    }
  }
}

// Whole lines of results that nobody reads soon go to memory without reading what was there: with 256 experts, whose
// gradients are most of what a step moves, that is a tenth of it. `at(j)` is the vector of numbers from j.
#if defined(__AVX2__)
constexpr bool kStreams = true;
template <class At>
inline void stream_line(float* out, const At& at) {
#if defined(__AVX512F__)
  _mm512_stream_ps(out, (__m512)at(0));
#else
  for (i64 j = 0; j < 16; j += kLanes) _mm256_stream_ps(out + j, (__m256)at(j));
#endif
}
template <class At>
inline void stream_line(BF16* out, const At& at) {
#if defined(__AVX512BF16__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), (__m512i)_mm512_cvtne2ps_pbh((__m512)at(kLanes), (__m512)at(0)));
#elif defined(__AVX512F__)
  const __m256i low = (__m256i)to_bf16(at(0)), high = (__m256i)to_bf16(at(kLanes));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#else
  for (i64 j = 0; j < 32; j += kLanes) _mm_stream_si128(reinterpret_cast<__m128i*>(out + j), (__m128i)to_bf16(at(j)));
#endif
}
inline void end_stream() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
template <class To, class At>
inline void stream_line(To*, const At&) {}
inline void end_stream() {}
#endif

// c's panels lie `tile` numbers apart.
template <class To>
void store_rows(const float* c, i64 tile, i64 rows, i64 cols, To* out, i64 ld) {
  constexpr i64 kLine = 64 / sizeof(To);
  for (i64 row = 0; row < rows; ++row, c += kPanel, out += ld) {
    const auto at = [&](i64 col) { return load_as<VecF>(c + col / kPanel * tile + col % kPanel); };
    i64 col = 0;
    if (kStreams && reinterpret_cast<std::uintptr_t>(out) % 64 == 0)
      for (; col + kLine <= cols; col += kLine) stream_line(out + col, [&](i64 j) { return at(col + j); });
    for (; col < cols; col += kLanes) write(out + col, at(col), cols - col);
  }
}

inline void store(const float* c, i64 tile, i64 rows, i64 cols, void* out, i64 ld, int dtype) {
  if (dtype == kF32)
    store_rows(c, tile, rows, cols, static_cast<float*>(out), ld);
  else
    store_rows(c, tile, rows, cols, static_cast<BF16*>(out), ld);
}

template <class E, class W>
void sum_rows(const void* rows, i64 ld, i64 n, const float* weights, i64 first, i64 cols, void* out) {
  using R = typename Word<W>::Element;
  const R* base = static_cast<const R*>(rows) + first;
  for (i64 j = 0; j < cols; j += kLanes) {
    VecF sum = {};
    for (i64 r = 0; r < n; ++r) {
      const VecF v = read(base + r * ld + j, cols - j);
      sum += weights ? v * weights[r] : v;
    }
    write(static_cast<E*>(out) + j, sum, cols - j);
  }
}

template <class E, class W>
float dot_row(const void* row, const void* elements, i64 n) {
  using R = typename Word<W>::Element;
  VecF sum = {};
  for (i64 i = 0; i < n; i += kLanes)
    sum += read(static_cast<const R*>(row) + i, n - i) * read(static_cast<const E*>(elements) + i, n - i);
  return sum_lanes(sum);
}

inline void nothing() {}

template <class E, class W>
constexpr Panels panel_table(decltype(Panels::multiply) product = multiply<W>, void (*begin)() = nothing,
                             void (*end)() = end_stream) {
  using R = typename Word<W>::Element;
  return {kPanel,
          Word<W>::kStep,
          sizeof(R),
          pack_columns<E, W>,
          pack_rows<E, W>,
          pack_rows<R, W>,
          product,
          to_row<W>,
          turn<W>,
          activate<E, W>,
          activate_backward<E, W>,
          add_to_tokens<E>,
          store,
          sum_rows<E, W>,
          dot_row<E, W>,
          begin,
          end};
}

}  // namespace
}  // namespace moekit

#define MOEKIT_PANELS(NAME)                        \
  const moekit::Panels moekit::panels_##NAME[2] = { \
      moekit::panel_table<float, float>(), moekit::panel_table<moekit::BF16, float>()};
