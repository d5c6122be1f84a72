// The product of panels.h on AMX: a tile register holds 16 rows of 16 words, which is how panels lie in memory already.
#include "panel_rows.h"

namespace moekit {
namespace {

constexpr i64 kTile = kRowStep;  // rows of a tile register, and words of each row
constexpr i64 kPass = 256;  // words of A's rows that pass at a time: 32 rows of them stay in L1

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
  TileShapes() {
    for (int tile = 0; tile < 8; ++tile) row_bytes[tile] = kTile * 4, rows[tile] = kTile;
  }
};

// GCC's intrinsics do not say that they read memory: what was written before must be there before they do.
inline void written() { __asm__ volatile("" ::: "memory"); }

// 16 rows of A as tiles: `step` bytes from a tile to the next in depth, `stride` bytes from row to row.
struct Operand {
  const char* data;
  i64 step, stride;
};

// The rows themselves if they fill tiles, else copies that end with zeros.
Operand operand(const char* a, i64 stride, i64 words, char* copy) {
  const i64 whole = words / kTile;
  if (words == whole * kTile) return {a, kTile * 4, stride};
  for (i64 r = 0; r < kTile; ++r, a += stride) {
    char* to = copy + r * kTile * 4;
    for (i64 s = 0; s < whole; ++s, to += kTile * kTile * 4)
      _mm512_store_si512(to, _mm512_loadu_si512(a + s * kTile * 4));
    _mm512_store_si512(to, _mm512_maskz_loadu_epi32((1u << words % kTile) - 1, a + whole * kTile * 4));
  }
  return {copy, kTile * kTile * 4, kTile * 4};
}

constexpr i64 kAcross = kPanel * 4;  // bytes from row to row of a panel, and of c

// Two blocks of 16 rows by 32 columns, `b` and `last` as in multiply_tiles.
void two_rows(const Operand (&a)[2], const char* b, const char* last, i64 steps, float* c, bool add) {
  char* const out = reinterpret_cast<char*>(c);
  constexpr i64 kDown = kTile * kAcross, kRight = kTile * 4;
  if (add) {
    _tile_loadd(0, out, kAcross);
    _tile_loadd(1, out + kRight, kAcross);
    _tile_loadd(2, out + kDown, kAcross);
    _tile_loadd(3, out + kDown + kRight, kAcross);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (i64 s = 0; s < steps; ++s) {
    const char* const right = s + 1 < steps ? b + s * kDown : last;
    _tile_loadd(6, right, kAcross);
    _tile_loadd(4, a[0].data + s * a[0].step, a[0].stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a[1].data + s * a[1].step, a[1].stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, right + kRight, kAcross);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kAcross);
  _tile_stored(1, out + kRight, kAcross);
  _tile_stored(2, out + kDown, kAcross);
  _tile_stored(3, out + kDown + kRight, kAcross);
}

// One block of 16 rows by 32 columns.
void one_row(const Operand& a, const char* b, const char* last, i64 steps, float* c, bool add) {
  char* const out = reinterpret_cast<char*>(c);
  constexpr i64 kDown = kTile * kAcross, kRight = kTile * 4;
  if (add) {
    _tile_loadd(0, out, kAcross);
    _tile_loadd(1, out + kRight, kAcross);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (i64 s = 0; s < steps; ++s) {
    const char* const right = s + 1 < steps ? b + s * kDown : last;
    _tile_loadd(4, a.data + s * a.step, a.stride);
    _tile_loadd(6, right, kAcross);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kRight, kAcross);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, out, kAcross);
  _tile_stored(1, out + kRight, kAcross);
}

void begin_tiles() {
  const TileShapes shapes;
  written();
  _tile_loadconfig(&shapes);
}

void end_tiles() {
  _tile_release();
  end_stream();
}

void multiply_tiles(const void* a, i64 ld, const void* panel, i64 rows, i64 words, float* c, bool add) {
  alignas(64) char copies[2][kTile * kPass * 4], end[kTile * kAcross];
  i64 at = 0;
  do {
    const i64 depth = words - at < kPass ? words - at : kPass, steps = (depth + kTile - 1) / kTile;
    const char* const b = static_cast<const char*>(panel) + at * kAcross;
    const char* last = b + (steps - 1) * kTile * kAcross;  // the last tiles in depth
    if (depth % kTile) {
      __builtin_memset(end, 0, sizeof end);
      __builtin_memcpy(end, last, depth % kTile * kAcross);
      last = end;
    }
    for (i64 r = 0; r < rows; r += 2 * kTile) {
      const bool both = rows - r > kTile;
      const char* const row = static_cast<const char*>(a) + (r * ld + at) * 4;
      const Operand first = operand(row, ld * 4, depth, copies[0]);
      const Operand second = both ? operand(row + kTile * ld * 4, ld * 4, depth, copies[1]) : Operand{};
      written();
      for (i64 col = 0; col < kPanel; col += 2 * kTile) {
        float* const out = c + r * kPanel + col;
        if (both)
          two_rows({first, second}, b + col * 4, last + col * 4, steps, out, add || at > 0);
        else
          one_row(first, b + col * 4, last + col * 4, steps, out, add || at > 0);
      }
    }
    at += depth;
  } while (at < words);
}

}  // namespace
}  // namespace moekit

const moekit::Panels moekit::panels_amx_bf16[2] = {
    moekit::panel_table<float, float>(), moekit::panel_table<moekit::BF16, std::uint32_t>(
                                             moekit::multiply_tiles, moekit::begin_tiles, moekit::end_tiles)};
