// Matrix products C (rows × kPanel columns) = A · B in fp32, one packed panel of B at a time, written once over vec.h.
//
// A operand is made of 4-byte words: an fp32 number, or a pair of bf16 that are neighbours in depth. A panel holds
// kPanel columns of B, word row after word row. A is never packed: its words are read one by one.
#pragma once
#include <utility>

#include "isa.h"
#include "vec.h"

namespace moekit {
namespace {

// kMicroM × kMicroV accumulators, kMicroV vectors of B and one word of A fit the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMicroM = 6, kMicroV = 4;
#else
constexpr int kMicroM = 6, kMicroV = 2;
#endif
constexpr int kPanel = kMicroV * kLanes;
constexpr i64 kWordsAPass = 128;  // so many word rows of a panel stay in L1 while the rows of A pass

template <class W>
struct Word;
template <>
struct Word<float> {
  using Element = float;  // what a row of words is made of
  static constexpr int kStep = 1;
};
template <>
struct Word<std::uint32_t> {
  using Element = BF16;
  static constexpr int kStep = 2;
};

// ---- words of B ------------------------------------------------------------------------------------------------

// v[i] and v[i + H] for every i without bit H: lane j of the first takes lane j − H of the second where j has bit H.
template <int H, int... J>
inline void exchange(VecU (&v)[kLanes], std::integer_sequence<int, J...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & H) continue;
    const VecU a = v[i], b = v[i + H];
    v[i] = __builtin_shufflevector(a, b, ((J & H) ? kLanes + J - H : J)...);
    v[i + H] = __builtin_shufflevector(a, b, ((J & H) ? kLanes + J : J + H)...);
  }
}

template <int H = kLanes / 2>
inline void transpose(VecU (&v)[kLanes]) {
  exchange<H>(v, std::make_integer_sequence<int, kLanes>{});
  if constexpr (H > 1) transpose<H / 2>(v);
}

inline void put(float* out, const VecU (&v)[kLanes], i64 k, const float*) {
  for (i64 i = 0; i < kLanes && i < k; ++i) __builtin_memcpy(out + i * kPanel, &v[i], sizeof v[i]);
}
inline void put(std::uint32_t* out, const VecU (&v)[kLanes], i64 k, const BF16*) {
  for (i64 i = 0; i < kLanes && 2 * i < k; ++i) __builtin_memcpy(out + i * kPanel, &v[i], sizeof v[i]);
}
inline void put(float* out, const VecU (&v)[kLanes], i64 k, const BF16*) {
  for (i64 i = 0; i < kLanes && 2 * i < k; ++i) {
    const VecU low = v[i] << 16, high = v[i] & 0xffff0000u;
    __builtin_memcpy(out + 2 * i * kPanel, &low, sizeof low);
    if (2 * i + 1 < k) __builtin_memcpy(out + (2 * i + 1) * kPanel, &high, sizeof high);
  }
}

constexpr i64 kBytesAheadOfPacking = 512;

// kLanes columns of a panel from as many rows of `b`, of which `cols` exist; k elements of each.
template <class E, class W>
void pack_lanes(const E* b, i64 ldb, i64 cols, i64 k, W* out) {
  constexpr i64 kWide = kLanes * 4 / static_cast<i64>(sizeof(E));
  constexpr i64 kAhead = kBytesAheadOfPacking / static_cast<i64>(sizeof(E));
  for (i64 at = 0; at < k; at += kWide, out += kWide / Word<W>::kStep * kPanel) {
    VecU v[kLanes];
    const i64 some = k - at < kWide ? k - at : kWide;
    const i64 beyond = at + kAhead - k;  // the rows below follow
    const E* const ahead = beyond < 0 ? b + at + kAhead : b + kLanes * ldb + beyond;
    for (i64 i = 0; i < kLanes; ++i) {
      ask_ahead(ahead + i * ldb);
      if (i >= cols)
        v[i] = VecU{};
      else if (some == kWide)
        v[i] = load_as<VecU>(b + i * ldb + at);
      else
        v[i] = load_some<VecU>(b + i * ldb + at, some, sizeof(E));
    }
    transpose(v);
    put(out, v, some, b);
  }
}

// B's columns are rows of memory: `cols` rows from `first`; with `second`, so many from each, a half panel apart.
template <class E, class W>
void pack_columns(const void* first, const void* second, i64 ldb, i64 cols, i64 k, void* panel) {
  const i64 width = second ? kMicroV / 2 : kMicroV;
  for (i64 v = 0; v < kMicroV; ++v) {
    const i64 from = v % width * kLanes, left = cols - from;
    const E* rows = static_cast<const E*>(v < width ? first : second) + (left > 0 ? from * ldb : 0);
    pack_lanes<E, W>(rows, ldb, left, k, static_cast<W*>(panel) + v * kLanes);
  }
}

inline VecF words_at(const float* row, const float*, i64 cols, float) {
  return cols >= kLanes ? load_as<VecF>(row) : load_some<VecF>(row, cols, 4);
}
inline VecH halves_at(const BF16* row, i64 cols) {
  return cols >= kLanes ? load_as<VecH>(row) : load_some<VecH>(row, cols, 2);
}
inline VecF words_at(const BF16* row, const BF16*, i64 cols, float) { return to_f32(halves_at(row, cols)); }
inline VecU words_at(const BF16* row, const BF16* next, i64 cols, std::uint32_t) {
  const VecU low = widen(halves_at(row, cols));
  return next ? low | (widen(halves_at(next, cols)) << 16) : low;
}

constexpr i64 kRowsAtATime = 16;  // as many rows as the hardware follows and fetches ahead

// B's rows are rows of memory, columns from `first`. More columns than one panel's go to panels that follow each other.
template <class E, class W>
void pack_rows(const void* b, i64 ldb, i64 first, i64 cols, i64 k, void* panels) {
  constexpr i64 kStep = Word<W>::kStep, kLine = 64 / static_cast<i64>(sizeof(E));
  constexpr i64 kAhead = kBytesAheadOfPacking / static_cast<i64>(sizeof(E));
  const i64 panel_words = (k + kStep - 1) / kStep * kPanel;
  const E* rows = static_cast<const E*>(b) + first;
  W* out = static_cast<W*>(panels);
  for (i64 at = 0; at < k; at += kRowsAtATime, rows += kRowsAtATime * ldb, out += kRowsAtATime / kStep * kPanel) {
    const i64 some = k - at < kRowsAtATime ? k - at : kRowsAtATime;
    for (i64 line = 0; line < cols || line % kPanel; line += kPanel < kLine ? kPanel : kLine) {
      const i64 beyond = line + kAhead - cols;  // the rows below follow
      const E* const ahead = beyond < 0 ? rows + line + kAhead : rows + kRowsAtATime * ldb + beyond;
      W* const words_out = out + line / kPanel * panel_words + line % kPanel;
      for (i64 r = 0; r < some; r += kStep) {
        const E *row = rows + r * ldb, *next = r + kStep - 1 < some ? row + (kStep - 1) * ldb : nullptr;
        for (i64 i = 0; i < kStep; ++i) ask_ahead(ahead + (r + i) * ldb);
        for (i64 j = 0; j < kLine && j < kPanel; j += kLanes) {
          const i64 col = line + j;
          W* const place = words_out + r / kStep * kPanel + j;
          if (col >= cols) {
            __builtin_memset(place, 0, kLanes * 4);
            continue;
          }
          const auto words = words_at(row + col, next ? next + col : nullptr, cols - col, W{});
          __builtin_memcpy(place, &words, sizeof words);
        }
      }
    }
  }
}

// ---- the product -----------------------------------------------------------------------------------------------

inline VecF mad_word(float a, VecF b, VecF c) { return a * b + c; }
inline VecF panel_words(const float* p) { return load_as<VecF>(p); }
inline VecU panel_words(const std::uint32_t* p) { return load_as<VecU>(p); }
#if defined(__AVX512BF16__)
inline VecF mad_word(std::uint32_t a, VecU b, VecF c) {
  return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}
#endif

// c (M × kPanel) = A · panel, or += it.
template <class W, int M>
void micro(const W* a, i64 ld, const W* panel, i64 words, float* c, bool add) {
  VecF acc[M][kMicroV] = {};
  const W* row[M];
  for (int m = 0; m < M; ++m) row[m] = a + m * ld;
#pragma GCC unroll 2
  for (i64 i = 0; i < words; ++i, panel += kPanel) {
    decltype(panel_words(panel)) right[kMicroV];
    for (int v = 0; v < kMicroV; ++v) right[v] = panel_words(panel + v * kLanes);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kMicroV; ++v) acc[m][v] = mad_word(row[m][i], right[v], acc[m][v]);
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kMicroV; ++v) {
      float* at = c + m * kPanel + v * kLanes;
      const VecF sum = add ? load_as<VecF>(at) + acc[m][v] : acc[m][v];
      __builtin_memcpy(at, &sum, sizeof sum);
    }
}

template <class W, int M>
void micro_of(int m, const W* a, i64 ld, const W* panel, i64 words, float* c, bool add) {
  if constexpr (M > 1) {
    if (m < M) return micro_of<W, M - 1>(m, a, ld, panel, words, c, add);
  }
  micro<W, M>(a, ld, panel, words, c, add);
}

// Asks for `words` words of some rows of A.
template <class W>
inline void fetch_rows(const W* a, i64 ld, i64 rows, i64 words) {
  for (i64 r = 0; r < rows; ++r)
    for (i64 at = 0; at < words; at += 16) __builtin_prefetch(a + r * ld + at, 0, 3);
}

// An element of c has the same bits whatever rows it is computed with.
template <class W>
void multiply(const void* a, i64 ld, const void* panel, i64 rows, i64 words, float* c, bool add) {
  const W* right = static_cast<const W*>(panel);
  i64 at = 0;
  do {
    const i64 depth = words - at < kWordsAPass ? words - at : kWordsAPass;
    i64 blocks = (rows + kMicroM - 1) / kMicroM;
    for (i64 row = 0; blocks; --blocks) {  // blocks of nearly equal size: a lone last row would run at half speed
      const int m = static_cast<int>((rows - row) / blocks);
      const i64 after = rows - row - m;
      const W* left = static_cast<const W*>(a) + row * ld + at;
      fetch_rows(left + m * ld, ld, after < kMicroM ? after : kMicroM, depth);
      micro_of<W, kMicroM>(m, left, ld, right + at * kPanel, depth, c + row * kPanel, add || at > 0);
      row += m;
    }
    at += depth;
  } while (at < words);
}

}  // namespace
}  // namespace moekit
