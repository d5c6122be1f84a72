// The table of tile kernels that every instruction set provides, and which table is in use.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moekit {

using i64 = std::int64_t;

enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };  // kF16 in the key-value cache alone

inline size_t element_size(int dtype) { return dtype == kF32 ? 4 : 2; }

// C (m×n) = A · Bᵀ. `a` points to m rows of k elements; B has n rows of k elements, `ldb` apart.
// An element of C is the same to the last bit however the matrix is cut into tiles.
using DotTile = void (*)(const void* const* a, const void* b, i64 ldb, void* c, i64 ldc, i64 m, i64 n, i64 k);

// C (m×n) = A · B for any strides of A, and rows of B and C that are `ldb`, `ldc` apart.
using GemmTile = void (*)(const void* a, i64 a_m, i64 a_k, const void* b, i64 ldb, void* c, i64 ldc, i64 m, i64 n,
                          i64 k, void* scratch);

// The inner loops of decoding (rows.h says what each computes). Tables are indexed by DType; `dtype` is what fp32
// results are rounded to.
struct RowOps {
  void (*matvec[2])(const void* weight, i64 ld, const float* x, float* out, i64 rows, i64 k);
  void (*scores[3])(const float* q_Gd, i64 heads, const void* k_Sd, i64 positions, i64 d, float* out_GS, i64 stride);
  void (*mix[3])(const float* p_GS, i64 stride, i64 heads, const void* v_Sd, i64 positions, i64 d, float* out_Gd);
  void (*store[3])(const float* x, void* out, i64 size);
  void (*load[3])(const void* x, float* out, i64 size);
  float (*exp_and_sum)(float* x, i64 size, float scale, float* max);
  void (*rms_norm)(const float* x, const float* weight, float eps, float* out, i64 size, int dtype);
  void (*rotate)(float* x, const float* cosine, const float* sine, i64 d, int dtype);
  void (*silu_times)(float* gate, const float* up, i64 size, int dtype);
  void (*add_rounded)(float* y, const float* x, i64 size, int dtype);
  void (*scale_add)(float* y, const float* x, float factor, i64 size);
};

// Tables are indexed by DType. Sums are in fp32 everywhere.
struct Tiles {
  const char* name;
  DotTile dot[2];         // C in the elements' type
  DotTile dot_to_f32[2];  // C in fp32
  GemmTile gemm[2];
  RowOps row;
};

// The largest tile that `gemm` takes (wider when it has few rows), and the 64-byte aligned scratch it needs for one.
inline constexpr i64 kGemmRows = 192, kGemmCols = 256, kGemmDepth = 256;
inline constexpr i64 kStreamRows = 8, kStreamCols = 512;
inline constexpr size_t kScratchBytes = 4 * (kGemmRows * kGemmCols + kGemmRows * kGemmDepth + kGemmCols * kGemmDepth);

extern const Tiles tiles_portable, tiles_avx2, tiles_avx512, tiles_avx512_bf16;

struct QuantTiles;  // matrix.h
extern const QuantTiles quant_portable, quant_avx2, quant_avx2_vnni, quant_avx512, quant_avx512_vnni;

// Both tables that an instruction set uses: some differ from another in one of them only.
struct Isa {
  const char* name;
  const Tiles* tiles;
  const QuantTiles* quant;
};

std::vector<std::string> available_isas();  // slowest first
const Isa& isa();                           // the one in use: the fastest unless told otherwise
inline const Tiles& tiles() { return *isa().tiles; }
void use_isa(const std::string& name);      // throws std::invalid_argument for one that is not available

}  // namespace moekit
