#include "matrix.h"

#include <algorithm>

namespace moekit {
namespace {

i64 up(i64 size, i64 multiple) { return (size + multiple - 1) / multiple * multiple; }

}  // namespace

const QuantTiles& quant_tiles() { return *isa().quant; }

Strips::Strips(const Matrix& m)
    : part_rows(m.rows / m.parts), a_part(up(part_rows, kStrip) / kStrip), group_blocks(m.group / kBlock) {
  const i64 cols = up(m.cols, m.group), groups = cols / m.group;
  const bool half = m.kind == kInt8 || m.kind == kInt4;
  const i64 table = up(groups * kStrip * (half ? 2 : 1), 64);
  blocks = cols / kBlock;
  scales = static_cast<size_t>(cols * kStrip / (m.kind == kInt8 ? 1 : 2));
  extra = scales + table;
  bytes = extra + (m.kind == kNF4 ? 64 : m.symmetric ? 0 : table);
}

void quantise_row(const float* values, i64 cols, void* blocks) {
  const auto quantise = quant_tiles().quantise;
  for (i64 block = 0; block < blocks_of(cols); ++block) {
    const i64 first = std::min(block * kBlock, cols);
    quantise(values + first, std::min(kBlock, cols - first), static_cast<char*>(blocks) + block * kRecord, 1, 0);
  }
}

void multiply_strips(const Matrix& m, const unsigned char* const* strips, const unsigned char* const* next, i64 count,
                     const Tokens& tokens, float* out, i64 ld) {
  const Strips where(m);
  const QuantTile* tiles = quant_tiles().tile[format_index(m)][tokens.size];
  for (i64 done = 0; done < count;) {
    const int step = count - done >= 4 && tiles[2] ? 2 : count - done >= 2 && tiles[1] ? 1 : 0;
    tiles[step]({strips + done, next + done, tokens.records, where.blocks, where.group_blocks, where.scales,
                 where.extra, out + done * kStrip, ld});
    done += i64{1} << step;
  }
}

void multiply(const Matrix& m, i64 first, i64 rows, const Tokens& tokens, float* out, i64 ld) {
  if (!is_packed(m)) {
    constexpr i64 kAtOnce = 8;  // rows that stay in the cache while the tokens pass
    const i64 row_bytes = m.cols * static_cast<i64>(element_size(m.kind));
    for (i64 r = 0; r < rows; r += kAtOnce) {
      const char* weight = static_cast<const char*>(m.data) + (first + r) * row_bytes;
      const i64 some = std::min(kAtOnce, rows - r);
      const char* next = r + kAtOnce < rows ? weight + kAtOnce * row_bytes : weight;
      for (i64 t = 0; t < tokens.count; ++t)
        tiles().row.matvec[m.kind](weight, m.cols, tokens.values[t], out + t * ld + r, some, m.cols, next);
    }
    return;
  }
  constexpr i64 kAtOnce = 4;
  const Strips where(m);
  const unsigned char *strips[kAtOnce], *next[kAtOnce], *at = where.at(m, first);
  for (i64 left = up(rows, kStrip) / kStrip; left > 0; left -= kAtOnce, out += kAtOnce * kStrip) {
    const i64 count = std::min(left, kAtOnce);
    for (i64 s = 0; s < count; ++s, at += where.bytes) {
      strips[s] = at;
      next[s] = at + (left > kAtOnce + s ? kAtOnce * where.bytes : 0);
    }
    multiply_strips(m, strips, next, count, tokens, out, ld);
  }
}

void matvec(const Matrix& m, const Row& x, i64 first, i64 rows, float* out) {
  const Tokens tokens{0, 1, x.blocks, &x.values};
  const i64 whole = is_packed(m) ? rows / kStrip * kStrip : rows;
  if (whole) multiply(m, first, whole, tokens, out, 0);
  if (whole == rows) return;
  float last[kStrip];  // a strip is written whole
  multiply(m, first + whole, rows - whole, tokens, last, 0);
  std::copy_n(last, rows - whole, out + whole);
}

}  // namespace moekit
