// The kernels of matrix.h, written once over quant_vec.h; quant_<isa>.cpp compiles them for one instruction set.
#pragma once
#include "activation.h"
#include "matrix.h"
#include "numbers.h"
#include "ops.h"
#include "quant_vec.h"

namespace moekit {
namespace {

using Bytes = const unsigned char*;

// ---- formats: how 64 bytes of codes become unsigned bytes around kZero, and what a step is worth ----------------

// NF4's levels · 127, rounded: at most 1/254 of the group's largest weight away. Around 128, as int8's.
constexpr std::uint8_t kNF4Codes[16] = {1,   40,  61,  78,  92,  105, 116, 128,
                                        138, 148, 159, 171, 184, 199, 220, 255};
constexpr std::uint8_t kMXFP4Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <int Kind>
struct Codes;

struct HalfScales {
  static constexpr int kScaleBytes = 2;
  static constexpr bool kMinima = false;
  static VecF scale(Bytes strip, const TileArgs& a, i64 group, int part) {
    return read(reinterpret_cast<const F16*>(strip + a.scales + group * 32 + part * kLanes * 2));
  }
};
template <>
struct Codes<0> : HalfScales {  // int8
  static constexpr int kZero = 128, kBits = 8;
  static VecB decode(VecB codes) { return codes; }
};
template <>
struct Codes<1> : HalfScales {  // int4
  static constexpr int kZero = 8, kBits = 4;
  static VecB decode(VecB codes) { return codes; }
};
template <>
struct Codes<2> {  // nf4
  static constexpr int kZero = 128, kBits = 4, kScaleBytes = 1;
  static constexpr bool kMinima = false;
  static VecB decode(VecB codes) { return look_up(kNF4Codes, codes); }
  static VecF scale(Bytes strip, const TileArgs& a, i64 group, int part) {
    float pair[2];
    __builtin_memcpy(pair, strip + a.extra, 8);
    const VecU codes = from_bytes(strip + a.scales + group * 16 + part * kLanes);
    return (splat(pair[1]) + pair[0] * __builtin_convertvector((VecI)codes, VecF)) * (1.0f / 127.0f);
  }
};
template <>
struct Codes<3> {  // mxfp4: the values are doubled to be whole, so a step is 2^(e - 128), subnormal for e < 2
  static constexpr int kZero = 12, kBits = 4, kScaleBytes = 1;
  static constexpr bool kMinima = false;
  static VecB decode(VecB codes) { return look_up(kMXFP4Codes, codes); }
  static VecF scale(Bytes strip, const TileArgs& a, i64 group, int part) {
    const VecU e = from_bytes(strip + a.scales + group * 16 + part * kLanes);
    return (VecF)(e < 2u ? (VecU)(VecU{} + 0x200000u) << e : (e - 1u) << 23);
  }
};
template <>
struct Codes<4> : HalfScales {  // int4 asymmetric
  static constexpr int kZero = 0, kBits = 4;
  static constexpr bool kMinima = true;
  static VecB decode(VecB codes) { return codes; }
};

// ---- strips × tokens ----------------------------------------------------------------------------------------

constexpr i64 kAhead = 1024;  // bytes between what is multiplied and what is prefetched

// Asks for some lines, in L2 as `ask_ahead` does unless told otherwise. (GCC drops a call that does nothing else,
// unless it is inlined before GCC sees that.)
template <int Bytes, int Locality = 2>
[[gnu::always_inline]] inline void prefetch(const unsigned char* at) {
  for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(at + line, 0, Locality);
}

// sums (T tokens × S strips × 16 rows) of one block of 32 columns.
template <class C, int S, int N>
inline void multiply_block(Bytes const* codes, const unsigned char* q, int tokens, VecI (&acc)[N][S][kParts]) {
  const auto quad = [&](int at, VecB (&w)[S][kParts]) {
    for (int t = 0; t < N; ++t) {
      std::int32_t word;
      __builtin_memcpy(&word, q + (at * tokens + t) * 4, 4);
      for (int s = 0; s < S; ++s)
        for (int p = 0; p < kParts; ++p)
          acc[t][s][p] = C::kZero == 128 ? dot_around_128(acc[t][s][p], w[s][p], word)
                                         : dot_codes(acc[t][s][p], w[s][p], word);
    }
  };
  VecB raw[S][kParts], w[S][kParts];
  for (int at = 0; at < 8; at += 8 / C::kBits) {
    const int offset = at * 8 * C::kBits;
    for (int s = 0; s < S; ++s)
      for (int p = 0; p < kParts; ++p) raw[s][p] = load_as<VecB>(codes[s] + offset + p * kLanes * 4);
    if constexpr (C::kBits == 8) {
      quad(at, raw);
    } else {
      for (int s = 0; s < S; ++s)
        for (int p = 0; p < kParts; ++p) w[s][p] = C::decode(low_nibbles(raw[s][p]));
      quad(at, w);
      for (int s = 0; s < S; ++s)
        for (int p = 0; p < kParts; ++p) w[s][p] = C::decode(high_nibbles(raw[s][p]));
      quad(at + 1, w);
    }
  }
}

// Tokens from `first` on of the T of a record. For every row and token, in fp32 and in the order of the columns:
//   sum ← sum + float(Σ q · (code - zero)) · (weight's scale · activation's scale)
//   and for minima   + m · (activation's scale · Σ q)
template <class C, int S, int T, int N>
inline void tile_of(const TileArgs& a, int first) {
  constexpr int kBytes = kBlock * kStrip * C::kBits / 8, kTable = C::kScaleBytes * kStrip;
  constexpr int kZero = kSignTrick && C::kZero == 128 ? 0 : C::kZero;
  constexpr bool kStreams = T <= 2;  // weights come from memory, and nothing hides it
  const i64 groups = a.blocks / a.group_blocks;
  Bytes codes[S], ahead[S];
  i64 until_next = a.blocks - kAhead / kBytes;  // blocks until what is prefetched is the next strips'
  for (int s = 0; s < S; ++s) {
    codes[s] = a.strips[s];
    ahead[s] = codes[s] + kAhead;
  }
  VecF sums[N][S][kParts] = {};
  const unsigned char* record = static_cast<const unsigned char*>(a.records);
  for (i64 group = 0; group < groups; ++group) {
    VecF steps[S][kParts], minima[S][kParts];
    const i64 soon = group + 4;  // two lines of the tables
    for (int s = 0; s < S; ++s) {
      for (int p = 0; p < kParts; ++p) {
        steps[s][p] = C::scale(a.strips[s], a, group, p);
        if constexpr (C::kMinima)
          minima[s][p] = read(reinterpret_cast<const F16*>(a.strips[s] + a.extra + group * kTable + p * kLanes * 2));
      }
      if constexpr (kStreams) {
        const unsigned char* table = soon < groups ? a.strips[s] + soon * kTable : a.next[s] + (soon - groups) * kTable;
        prefetch<1>(table + a.scales);
        if constexpr (C::kMinima) prefetch<1>(table + a.extra);
      }
    }
    for (i64 block = 0; block < a.group_blocks; ++block, record += kRecord * T) {
      if constexpr (kStreams) {
        if (until_next-- == 0)
          for (int s = 0; s < S; ++s) ahead[s] = a.next[s];
        for (int s = 0; s < S; ++s, ahead[s - 1] += kBytes) prefetch<kBytes>(ahead[s]);
      } else {  // many tokens leave the time to bring the next strips near
        for (int s = 0; s < S; ++s) prefetch<kBytes>(a.next[s] + (codes[s] - a.strips[s]));
        prefetch<static_cast<int>(kRecord) * T, 3>(record + 2 * kRecord * T);
      }
      const unsigned char* scales = record + 32 * T + 4 * first;
      VecI acc[N][S][kParts];
      for (int t = 0; t < N; ++t) {
        const std::int32_t sum = load_as<std::int32_t>(scales + 4 * T + 4 * t);
        for (int s = 0; s < S; ++s)
          for (int p = 0; p < kParts; ++p) acc[t][s][p] = VecI{} - kZero * sum;
      }
      multiply_block<C, S, N>(codes, record + 4 * first, T, acc);
      for (int s = 0; s < S; ++s) codes[s] += kBytes;
      for (int t = 0; t < N; ++t) {
        const float own = load_as<float>(scales + 4 * t);
        const float total = own * static_cast<float>(load_as<std::int32_t>(scales + 4 * T + 4 * t));
        for (int s = 0; s < S; ++s)
          for (int p = 0; p < kParts; ++p) {
            sums[t][s][p] += to_floats(acc[t][s][p]) * (steps[s][p] * own);
            if constexpr (C::kMinima) sums[t][s][p] += minima[s][p] * total;
          }
      }
    }
  }
  for (int t = 0; t < N; ++t)
    for (int s = 0; s < S; ++s)
      for (int p = 0; p < kParts; ++p)
        __builtin_memcpy(a.out + (first + t) * a.ld + s * kStrip + p * kLanes, &sums[t][s][p], sizeof(VecF));
}

// Tokens of T that pass together.
constexpr int tokens_at_once(int tokens) {
  int most = tokens < kTileTokens ? tokens : kTileTokens;
  while (tokens % most) --most;
  return most;
}

template <class C, int S, int T>
void quant_tile(const TileArgs& a) {
  constexpr int N = tokens_at_once(T);
  for (int first = 0; first < T; first += N) tile_of<C, S, T, N>(a, first);
}

template <class C, int T, int S>
constexpr QuantTile tile_if_fits() {
  if constexpr (S == 1 || (S == 2 && kTileStrips >= 2) || (S == 4 && kTileStrips >= 4 && T <= 2))
    return quant_tile<C, S, T>;
  else
    return nullptr;
}

// ---- activations --------------------------------------------------------------------------------------------------

inline void quantise_block(const float* x, i64 n, void* record, int tokens, int t) {
  float padded[kBlock] = {};
  if (n < kBlock) {
    __builtin_memcpy(padded, x, n * 4);
    x = padded;
  }
  VecU most = {};
  for (int i = 0; i < kBlock; i += kLanes) {
    const VecU magnitude = load_as<VecU>(x + i) & 0x7fffffffu;  // ordered as the numbers are, NaN above infinity
    most = magnitude > most ? magnitude : most;
  }
  const std::uint32_t top = largest_lane(most);
  float largest;
  __builtin_memcpy(&largest, &top, 4);
  const bool finite = top < 0x7f800000u;
  const bool zero = largest < 0x1p-120f;  // its inverse may be infinite
  const float inverse = finite && !zero ? 127.0f / largest : 0.0f;
  const float scale = zero ? 0.0f : largest / 127.0f;
  unsigned char* out = static_cast<unsigned char*>(record);
  VecI sums = {};
  for (int i = 0; i < kBlock; i += kLanes) {
    typedef std::int8_t Narrow __attribute__((vector_size(kLanes)));
    VecI q = {};
    if (finite) q = (VecI)(rounded(load_as<VecF>(x + i) * inverse) + 12582912.0f) - 0x4b400000;  // ties to even
    const Narrow narrow = __builtin_convertvector(q, Narrow);
    for (int j = 0; j < kLanes; j += 4) {
      std::int32_t word;
      __builtin_memcpy(&word, reinterpret_cast<const char*>(&narrow) + j, 4);
      __builtin_memcpy(out + ((i + j) / 4 * tokens + t) * 4, &word, 4);
    }
    sums += q;
  }
  const std::int32_t sum = total_of_lanes(sums);
  __builtin_memcpy(out + 32 * tokens + 4 * t, &scale, 4);
  __builtin_memcpy(out + 36 * tokens + 4 * t, &sum, 4);
}

void glu(float* gate, const float* up, i64 size, int kind) {
  with_activation(kind, [&](auto act) {
    each_vector(size, [&](i64 at, i64 n) {
      const VecF value = activation<act.value>(read(gate + at, n));
      write(gate + at, up ? value * read(up + at, n) : value, n);
    });
  });
}

void add_scaled(float* y, const float* x, float scale, i64 size) {
  each_vector(size, [&](i64 at, i64 n) { write(y + at, read(y + at, n) + scale * read(x + at, n), n); });
}

}  // namespace
}  // namespace moekit

#define MOEKIT_QUANT_SIZE(FORMAT, T)                                                       \
  {                                                                                        \
    moekit::tile_if_fits<moekit::Codes<FORMAT>, T, 1>(),                                   \
        moekit::tile_if_fits<moekit::Codes<FORMAT>, T, 2>(), moekit::tile_if_fits<moekit::Codes<FORMAT>, T, 4>() \
  }
#define MOEKIT_QUANT_FORMAT(FORMAT)                                                                                 \
  {                                                                                                                 \
    MOEKIT_QUANT_SIZE(FORMAT, 1), MOEKIT_QUANT_SIZE(FORMAT, 2), MOEKIT_QUANT_SIZE(FORMAT, 4),                       \
        MOEKIT_QUANT_SIZE(FORMAT, 8), MOEKIT_QUANT_SIZE(FORMAT, 12)                                                 \
  }
#define MOEKIT_QUANT_TILES(NAME)                                                                                    \
  const moekit::QuantTiles moekit::quant_##NAME = {                                                                 \
      moekit::kProducts,                                                                                            \
      {MOEKIT_QUANT_FORMAT(0), MOEKIT_QUANT_FORMAT(1), MOEKIT_QUANT_FORMAT(2), MOEKIT_QUANT_FORMAT(3),              \
       MOEKIT_QUANT_FORMAT(4)},                                                                                     \
      moekit::quantise_block,                                                                                       \
      moekit::glu,                                                                                                  \
      moekit::add_scaled,                                                                                           \
  };
