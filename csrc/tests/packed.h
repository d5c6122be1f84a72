// Weights in every format, and rows of activations for them, for the test program of the quantised kernels. What the
// bytes mean is written here once more, from the descriptions in src/moekit/kernels/formats.py and csrc/matrix.h.
#pragma once
#include "arrays.h"
#include "matrix.h"

namespace moekit {

using Doubles = std::vector<double>;
using Bytes = std::unique_ptr<unsigned char[]>;

inline i64 up(i64 size, i64 multiple) { return (size + multiple - 1) / multiple * multiple; }

template <class T>
void put(void* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

// ---- formats --------------------------------------------------------------------------------------------------

struct Format {
  int kind;
  i64 group;
  bool symmetric;

  bool plain() const { return kind < kInt8; }
  bool halves() const { return kind == kInt8 || kind == kInt4; }  // scales are fp16
  std::string name() const {
    static const char* const names[] = {"f32", "bf16", "int8", "int4", "nf4", "mxfp4"};
    return names[kind] + (plain() ? "" : "-g" + std::to_string(group)) + (symmetric ? "" : "-asym");
  }
};

inline constexpr Format kEveryFormat[] = {
    {kF32, 1, true},    {kBF16, 1, true},   {kInt8, 32, true},   {kInt8, 64, true},  {kInt8, 128, true},
    {kInt4, 32, true},  {kInt4, 64, true},  {kInt4, 128, true},  {kInt4, 32, false}, {kInt4, 64, false},
    {kInt4, 128, false}, {kNF4, 64, true},  {kMXFP4, 32, true},
};

inline double half_value(unsigned bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31u);
  const double size = std::ldexp((exponent ? 1024.0 : 0.0) + (bits & 1023u), std::max(exponent, 1) - 25);
  return exponent == 31 ? NAN : bits & 0x8000u ? -size : size;
}

// QLoRA's levels (arXiv 2305.14314, appendix E) to the nearest n/127, as the kernels multiply them.
inline double nf4_value(unsigned code) {
  constexpr double levels[] = {-1.0,
                               -0.6961928009986877,
                               -0.5250730514526367,
                               -0.39491748809814453,
                               -0.28444138169288635,
                               -0.18477343022823334,
                               -0.09105003625154495,
                               0.0,
                               0.07958029955625534,
                               0.16093020141124725,
                               0.24611230194568634,
                               0.33791524171829224,
                               0.44070982933044434,
                               0.5626170039176941,
                               0.7229568362236023,
                               1.0};
  return std::round(levels[code] * 127.0) / 127.0;
}

// E2M1 of OCP Microscaling Formats v1.0: a sign, two bits of exponent with bias 1, one of mantissa.
inline double e2m1_value(unsigned code) {
  const int exponent = static_cast<int>(code >> 1 & 3u);
  const double size = std::ldexp((exponent ? 1.0 : 0.0) + 0.5 * (code & 1u), std::max(exponent - 1, 0));
  return code & 8u ? -size : size;
}

// A matrix of one format in a heap block of exactly its size. Codes are random, those of padding too; the scales of
// padded rows are NaN where the format has one, and so is what lies between regions: none of it may show.
class Weight {
 public:
  Weight(const Format& format, i64 rows, i64 cols, i64 parts, std::mt19937& random, bool largest_codes = false)
      : format_(format), rows_(rows), cols_(cols), parts_(parts),
        plain_(format.plain() ? rows * cols : 0, format.plain() ? format.kind : kF32) {
    format.plain() ? fill(plain_, plain_.size(), kReal, random) : draw(random, largest_codes);
  }

  Matrix matrix() const {
    return {format_.plain() ? plain_.data() : bytes_.get(), rows_, cols_, format_.kind, static_cast<int>(format_.group),
            static_cast<int>(parts_), format_.symmetric};
  }
  const Format& format() const { return format_; }
  i64 rows() const { return rows_; }
  i64 cols() const { return cols_; }
  i64 part_rows() const { return rows_ / parts_; }

  // fp16 or E8M0 or, of nf4, a code
  void set_scale(i64 row, i64 group, unsigned bits) { set(codes_, row, group, bits); }
  void set_minimum(i64 row, i64 group, unsigned half) { set(codes_ + table_, row, group, half); }

  double operator()(i64 row, i64 col) const {
    if (format_.plain()) return plain_[row * cols_ + col];
    const unsigned char* strip = strip_of(row);
    const i64 r = row_in_strip(row), at = col / format_.group * kStrip + r;
    const unsigned char* scales = strip + codes_;
    const auto half = [&](const unsigned char* table) { return half_value(table[2 * at] | table[2 * at + 1] << 8); };
    if (format_.kind == kInt8) return half(scales) * (strip[col / 4 * 64 + 4 * r + col % 4] - 128.0);
    const unsigned byte = strip[col / 8 * 64 + 4 * r + col % 4], code = col % 8 < 4 ? byte & 15u : byte >> 4;
    if (format_.kind == kMXFP4) return std::ldexp(e2m1_value(code), scales[at] - 127);
    if (format_.kind == kNF4) {
      float pair[2];
      std::memcpy(pair, scales + table_, 8);
      return (pair[1] + static_cast<double>(pair[0]) * scales[at]) * nf4_value(code);
    }
    return format_.symmetric ? half(scales) * (code - 8.0) : half(scales) * code + half(scales + table_);
  }

  Doubles values() const {
    Doubles all(rows_ * cols_);
    for (i64 i = 0; i < rows_ * cols_; ++i) all[i] = (*this)(i / cols_, i % cols_);
    return all;
  }

 private:
  void draw(std::mt19937& random, bool largest_codes) {
    const i64 groups = up(cols_, format_.group) / format_.group;
    codes_ = groups * format_.group * kStrip / (format_.kind == kInt8 ? 1 : 2);
    table_ = up(groups * kStrip * (format_.halves() ? 2 : 1), 64);
    strip_ = codes_ + table_ + (format_.kind == kNF4 ? 64 : format_.symmetric ? 0 : table_);
    const i64 strips = parts_ * up(rows_ / parts_, kStrip) / kStrip;
    bytes_.reset(new unsigned char[strips * strip_]);
    std::memset(bytes_.get(), 0xff, strips * strip_);
    for (i64 s = 0; s < strips; ++s) {
      unsigned char* strip = bytes_.get() + s * strip_;
      for (i64 i = 0; i < codes_; ++i)
        strip[i] = static_cast<unsigned char>(largest_codes ? -(random() & 1) : random());
      if (format_.kind == kNF4) {
        put(strip + codes_ + table_, std::ldexp(1.0f + static_cast<float>(random() % 1000) / 999, -9));
        put(strip + codes_ + table_ + 4, std::ldexp(1.0f + static_cast<float>(random() % 1000) / 999, -3));
      }
    }
    for (i64 r = 0; r < rows_; ++r)
      for (i64 g = 0; g < groups; ++g) draw_scale(r, g, random);
  }

  // So that weights are at most about 1 in size.
  void draw_scale(i64 row, i64 group, std::mt19937& random) {
    const auto half = [&](unsigned exponent) {
      const unsigned bits = random();
      return (bits & 0x83ffu) | (exponent + (bits >> 16 & 1u)) << 10;
    };
    if (format_.kind == kInt8) return set_scale(row, group, half(7));
    if (format_.kind == kMXFP4) return set_scale(row, group, 123 + random() % 3);
    if (format_.kind == kNF4) return set_scale(row, group, random() % 256);
    set_scale(row, group, half(11));
    if (!format_.symmetric) set_minimum(row, group, half(12));
  }

  i64 row_in_strip(i64 row) const { return row % part_rows() % kStrip; }
  unsigned char* strip_of(i64 row) const {
    const i64 strips_a_part = up(part_rows(), kStrip) / kStrip;
    return bytes_.get() + (row / part_rows() * strips_a_part + row % part_rows() / kStrip) * strip_;
  }
  void set(i64 table, i64 row, i64 group, unsigned bits) {
    const i64 at = group * kStrip + row_in_strip(row);
    unsigned char* place = strip_of(row) + table;
    format_.halves() ? put(place + 2 * at, static_cast<std::uint16_t>(bits))
                     : put(place + at, static_cast<std::uint8_t>(bits));
  }

  Format format_;
  i64 rows_, cols_, parts_;
  i64 codes_ = 0, table_ = 0, strip_ = 0;  // bytes of the codes, of a table, of a strip
  Array plain_;
  Bytes bytes_;
};

// ---- activations ----------------------------------------------------------------------------------------------

// Rows that int8 holds exactly: in every block of 32 columns whole multiples of a power of two, 127 the largest.
inline Array exact_rows(i64 rows, i64 cols, std::mt19937& random, bool largest = false) {
  Array x(rows * cols, kF32);
  for (i64 r = 0; r < rows; ++r)
    for (i64 first = 0; first < cols; first += kBlock) {
      const i64 n = std::min(kBlock, cols - first), peak = random() % n;
      const int step = -7 - static_cast<int>(random() % 3);
      for (i64 i = 0; i < n; ++i) {
        const double q = i == peak || largest ? (random() & 1 ? 127.0 : -127.0) : random() % 255 - 127.0;
        x.set(r * cols + first + i, std::ldexp(q, step));
      }
    }
  return x;
}

// Rows first to first + count of such an x in records of T.
inline Bytes records_of(const Array& x, i64 cols, i64 first, i64 count, i64 T) {
  const size_t size = 40 * static_cast<size_t>(T * up(cols, 128) / 32);
  Bytes records(new unsigned char[size]);
  std::memset(records.get(), 0, size);
  for (i64 t = 0; t < count; ++t)
    for (i64 block = 0; block * 32 < cols; ++block) {
      unsigned char* record = records.get() + 40 * T * block;
      double most = 0.0;
      const i64 n = std::min<i64>(32, cols - 32 * block), at = (first + t) * cols + 32 * block;
      for (i64 i = 0; i < n; ++i) most = std::max(most, std::fabs(x[at + i]));
      std::int32_t sum = 0;
      for (i64 i = 0; i < n; ++i) {
        const auto q = static_cast<std::int8_t>(x[at + i] * 127.0 / most);
        record[i / 4 * T * 4 + t * 4 + i % 4] = static_cast<unsigned char>(q);
        sum += q;
      }
      put(record + 32 * T + 4 * t, static_cast<float>(most / 127.0));
      put(record + 36 * T + 4 * t, sum);
    }
  return records;
}

// W · x
inline Doubles plain_product(const Doubles& weight, const double* x, i64 rows, i64 cols) {
  Doubles y(rows, 0.0);
  for (i64 r = 0; r < rows; ++r)
    for (i64 c = 0; c < cols; ++c) y[r] += weight[r * cols + c] * x[c];
  return y;
}

inline float* floats(const Array& array) { return static_cast<float*>(array.data()); }

inline Doubles row_of(const Array& x, i64 cols, i64 row) {
  Doubles values(cols);
  for (i64 c = 0; c < cols; ++c) values[c] = x[row * cols + c];
  return values;
}

template <class Body>
void on_every_isa(const Body& body) {
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    body(isa);
  }
}

void test_quant_ops();  // test_quant_ops.cpp

}  // namespace moekit
