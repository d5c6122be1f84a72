// Matrices in every format (src/moekit/kernels/formats.py says what their bytes mean) times rows of fp32.
//
// One query row, which is what decoding multiplies:
//
//   std::vector<std::byte> blocks(row_bytes(cols));       // or any memory, aligned to 8
//   quantise_row(x, cols, blocks.data());                 // once, then shared by every matrix
//   matvec(matrix, {x, blocks.data()}, first, rows, y);   // y[0 .. rows) = rows first .. first + rows of W · x
//
// All of it may be called from any thread; nothing allocates and nothing opens a parallel region. Cut a matrix among
// threads at multiples of kStrip within a part; 64 rows at a time read memory fastest. Results do not depend on the
// cut, nor on how many rows are multiplied together.
#pragma once
#include <cstddef>

#include "isa.h"

namespace moekit {

// Plain matrices are row-major and their kind is their DType; the others are packed in strips.
enum Kind : int { kInt8 = 2, kInt4 = 3, kNF4 = 4, kMXFP4 = 5 };

struct Matrix {
  const void* data;
  i64 rows, cols;   // as the user sees them, unpadded
  int kind;         // a DType or a Kind
  int group;        // columns that share a scale
  int parts;        // gate and up are two: each is padded to strips by itself
  bool symmetric;
};

inline constexpr i64 kStrip = 16;  // rows that are packed together
inline constexpr i64 kBlock = 32;  // columns of an activation row that share a scale

inline bool is_packed(const Matrix& m) { return m.kind >= kInt8; }

// Activations are multiplied in int8: blocks of 32 columns of T rows, in records of 40·T bytes,
//   int8 q[8][T][4], float scale[T], int32 sum[T]    with scale = max|x| / 127, q = round(x / scale), sum = Σ q.
// A block with NaN or infinity has the scale NaN or infinity and q = 0, so that what it touches becomes NaN.
inline constexpr size_t kRecord = 40;

// Blocks of a row: enough for every group size, the rest zero.
inline i64 blocks_of(i64 cols) { return (cols + 127) / 128 * 4; }
inline size_t row_bytes(i64 cols) { return kRecord * static_cast<size_t>(blocks_of(cols)); }

struct Row {
  const float* values;  // read by plain matrices
  const void* blocks;   // read by packed ones
};

void quantise_row(const float* values, i64 cols, void* blocks);

// `first` is the first row of a strip (any row of a plain matrix), and the rows lie in one part.
void matvec(const Matrix& m, const Row& x, i64 first, i64 rows, float* out);

// Where things are in a packed matrix.
struct Strips {
  i64 part_rows, a_part;     // rows and strips of a part
  i64 blocks, group_blocks;  // blocks of a row, blocks that share a scale
  size_t scales, extra;      // offsets in a strip: scales, and minima (asymmetric) or steps (nf4)
  size_t bytes;              // of a strip

  explicit Strips(const Matrix& m);
  // The strip that begins with this row.
  const unsigned char* at(const Matrix& m, i64 row) const {
    const i64 strip = row / part_rows * a_part + row % part_rows / kStrip;
    return static_cast<const unsigned char*>(m.data) + static_cast<size_t>(strip) * bytes;
  }
};

// Rows of activations multiplied together, and what the tiles take: kTokens[i] rows at most.
inline constexpr int kTokens[] = {1, 2, 4, 8, 12};
inline constexpr int kMostTokens = 12, kTokenSizes = 5;
inline constexpr int token_size(i64 rows) {  // the index of the smallest that fits
  int i = 0;
  while (i + 1 < kTokenSizes && kTokens[i] < rows) ++i;
  return i;
}

// Strips × T rows. `next` are strips to prefetch from near the end of these; out[t · ld + 16 s + r].
struct TileArgs {
  const unsigned char* const* strips;
  const unsigned char* const* next;
  const void* records;
  i64 blocks, group_blocks;
  size_t scales, extra;
  float* out;
  i64 ld;
};
using QuantTile = void (*)(const TileArgs&);

inline constexpr int kFormats = 5;  // int8, int4, nf4, mxfp4, int4 asymmetric
inline int format_index(const Matrix& m) { return m.kind == kInt4 && !m.symmetric ? 4 : m.kind - kInt8; }

// What every instruction set provides.
struct QuantTiles {
  const char* products;  // how whole numbers are multiplied, for people
  QuantTile tile[kFormats][kTokenSizes][3];  // of 1, 2, 4 strips; null where there is no such tile
  // 32 columns (fewer: the rest are zeros) of row t of the T of a record
  void (*quantise)(const float* x, i64 n, void* record, int tokens, int t);
  void (*glu)(float* gate, const float* up, i64 n, int activation);  // gate ← act(gate) · up; up may be null
  void (*add_scaled)(float* y, const float* x, float scale, i64 n);  // y += scale · x
};

const QuantTiles& quant_tiles();  // those of the instruction set in use

// A few rows of activations: as records of kTokens[size] rows for packed matrices, as fp32 for plain ones.
struct Tokens {
  int size;
  i64 count;  // rows that exist
  const void* records;
  const float* const* values;
};

// out[t · ld + 16 s + r] for any strips of one matrix; `next` are as many, to prefetch from near the end.
void multiply_strips(const Matrix& m, const unsigned char* const* strips, const unsigned char* const* next, i64 count,
                     const Tokens& tokens, float* out, i64 ld);

// out[t · ld + i] for `rows` rows from `first` on, as in matvec; `out` has room for whole strips.
void multiply(const Matrix& m, i64 first, i64 rows, const Tokens& tokens, float* out, i64 ld);

}  // namespace moekit
