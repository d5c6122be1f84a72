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
  void (*matvec[2])(const void* weight, i64 ld, const float* x, float* out, i64 rows, i64 k, const void* then);
  void (*scores[3])(const float* q_Gd, i64 heads, const void* k_Sd, i64 positions, i64 d, float* out_GS, i64 stride);
  void (*mix[3])(const float* p_GS, i64 stride, i64 heads, const void* v_Sd, i64 positions, i64 d, float* out_Gd);
  void (*store[3])(const float* x, void* out, i64 size);
  void (*load[3])(const void* x, float* out, i64 size);
  float (*exp_and_sum)(float* x, i64 size, float scale, float* max);
  void (*rms_norm)(const float* x, const float* weight, float eps, float* out, i64 size, int dtype);
  void (*rotate)(float* x, const float* cosine, const float* sine, i64 d, int dtype);
  void (*add_rounded)(float* y, const float* x, i64 size, int dtype);
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

enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// What the inner rows of an expert's MLP are: `inner` numbers, of act(gate) · up with `gated`, else of act(up).
struct Inner {
  i64 inner;
  bool gated;
  int activation;
  i64 width() const { return gated ? 2 * inner : inner; }
};

// Products over packed panels (panels.h), and what follows each one while its result is in cache (panel_rows.h).
// "Elements" are of the layer's type; "rows" are the operands of products, `step` numbers of `row_bytes` a word, and
// begin at a word; c is rows × `columns` in fp32.
inline constexpr i64 kRowStep = 16;

struct Panels {
  i64 columns, step, row_bytes;
  void (*pack_columns)(const void* first, const void* second, i64 ldb, i64 cols, i64 k, void* panel);
  // These two fill as many panels as there are columns for.
  void (*pack_elements)(const void* b, i64 ldb, i64 first, i64 cols, i64 k, void* panels);
  void (*pack_rows)(const void* b, i64 ldb, i64 first, i64 cols, i64 k, void* panels);
  // c = A · panel, or += it. A row of A is `ld` words from the next. Memory must go on to a multiple of kRowStep rows
  // in A and in c: what is read there adds to nothing else, what is written there means nothing.
  void (*multiply)(const void* a, i64 ld, const void* panel, i64 rows, i64 words, float* c, bool add);
  // n numbers of `dtype` to a row.
  void (*to_row)(const void* from, int dtype, i64 n, void* row);
  // m × (words of k): columns first to first + m of k rows, each as a row of words, `words_ld` apart.
  void (*turn)(const void* rows, i64 ld, i64 first, i64 m, i64 k, void* words, i64 words_ld);
  // Bias, activation: c, whose panels lie `tile` numbers apart, to `hidden` rows and, unless null, to pre-activations
  // in elements.
  void (*activate)(const float* c, i64 tile, i64 rows, i64 first, i64 cols, const void* bias_G, void* pre,
                   void* hidden, i64 hidden_ld, const Inner& inner);
  // c is the gradient of the hidden rows before their weights: grad_pre = its share with them, weighted_hidden, and
  // grad_weight += Σ c · hidden; each may be null.
  void (*activate_backward)(const float* c, i64 tile, i64 rows, i64 first, i64 cols, const void* pre,
                            const float* weights, void* grad_pre, i64 grad_ld, void* weighted_hidden, i64 hidden_ld,
                            float* grad_weight, i64 grad_weight_ld, const Inner& inner);
  // acc[place[r] - from] += weights[r] · (c[r] + bias); weights and bias may be null.
  void (*add_to_tokens)(const float* c, i64 rows, const i64* place, i64 from, const float* weights, const void* bias,
                        i64 cols, float* acc);
  // Columns of c, whose panels lie `tile` numbers apart.
  void (*store)(const float* c, i64 tile, i64 rows, i64 cols, void* out, i64 ld, int dtype);
  // out[j] = Σ_r weights[r] · row r [j] in elements; weights may be null.
  void (*sum_rows)(const void* rows, i64 ld, i64 n, const float* weights, i64 first, i64 cols, void* out);
  // Σ_j row[j] · element[j]
  float (*dot)(const void* row, const void* elements, i64 n);
  // Before a thread's first product, and after its last and what it stored: what is stored must be seen by others.
  void (*begin)();
  void (*end)();
};

extern const Panels panels_portable[2], panels_avx2[2], panels_avx512[2], panels_avx512_bf16[2];  // by DType
extern const Panels pairs_avx512_bf16[2], panels_amx_bf16[2];  // bf16 by pairs, where others widen it

struct QuantTiles;  // matrix.h
extern const QuantTiles quant_portable, quant_avx2, quant_avx2_vnni, quant_avx512, quant_avx512_vnni;

// The tables that an instruction set uses: some differ from another in one of them only.
struct Isa {
  const char* name;
  const Tiles* tiles;
  const QuantTiles* quant;
  const Panels* panels;  // by DType
};

std::vector<std::string> available_isas();  // slowest first
const Isa& isa();                           // the one in use: the fastest unless told otherwise
inline const Tiles& tiles() { return *isa().tiles; }
inline const Panels& panels(int dtype) { return isa().panels[dtype]; }
void use_isa(const std::string& name);      // throws std::invalid_argument for one that is not available

}  // namespace moekit
