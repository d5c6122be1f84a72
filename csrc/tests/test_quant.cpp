// Products with quantised matrices on every instruction set against plain loops in double over codes that packed.h
// unpacks. Every array is a heap block of exactly its size, filled with NaN, as in test_ops.cpp. Activations are such
// that int8 holds them exactly, so that the kernels' own rounding of them is tested once, by itself.
#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "decode.h"
#include "packed.h"
#include "stream.h"

namespace {

using namespace moekit;

// ---- activations ----------------------------------------------------------------------------------------------

struct Block {  // column by column, and what stands beside it
  int q[kBlock];
  float scale;
  std::int32_t sum;

  Block(const unsigned char* record, i64 T, i64 t) {
    for (i64 i = 0; i < kBlock; ++i) q[i] = static_cast<std::int8_t>(record[i / 4 * T * 4 + t * 4 + i % 4]);
    std::memcpy(&scale, record + 32 * T + 4 * t, 4);
    std::memcpy(&sum, record + 36 * T + 4 * t, 4);
  }
  bool all_zero() const { return sum == 0 && std::count(q, q + kBlock, 0) == kBlock; }
};

Bytes quantised(const Array& x, i64 cols) {
  Bytes records(new unsigned char[row_bytes(cols)]);
  std::memset(records.get(), 0xff, row_bytes(cols));
  quantise_row(floats(x), cols, records.get());
  return records;
}

// Any numbers: within half a step, and the columns past the last zero.
void test_rounding(const std::string& what, const Array& x) {
  const Bytes records = quantised(x, x.size());
  bool close = true;
  for (i64 b = 0; b < blocks_of(x.size()); ++b) {
    const Block block(records.get() + kRecord * b, 1, 0);
    double most = 0.0;
    int sum = 0;
    for (i64 i = b * kBlock; i < std::min((b + 1) * kBlock, x.size()); ++i) most = std::max(most, std::fabs(x[i]));
    for (i64 i = 0; i < kBlock; ++i) {
      const double value = b * kBlock + i < x.size() ? x[b * kBlock + i] : 0.0;
      close &= std::fabs(block.q[i] * (most / 127.0) - value) <= (0.5 + 1e-4) * (most / 127.0);
      sum += block.q[i];
    }
    close &= std::fabs(block.scale - most / 127.0) <= 1e-7 * most && block.sum == sum;
  }
  check(close, what, "not the nearest whole numbers");
}

// By its largest element a block is zero, too small to have an inverse, infinite or NaN; its neighbours are as ever.
void test_unusual_block(const std::string& what, double largest) {
  Array x(3 * kBlock, kF32);
  for (i64 i = 0; i < x.size(); ++i) x.set(i, i / kBlock == 1 ? 0.0 : 127.0 - i);
  x.set(kBlock + 5, largest);
  const Bytes records = quantised(x, x.size());
  const Block block(records.get() + kRecord, 1, 0);
  const double scale = block.scale;
  const bool right = std::isnan(largest) ? std::isnan(scale) : scale == (std::isinf(largest) ? largest : 0.0);
  check(block.all_zero() && right, what + "a block whose largest is " + std::to_string(largest),
        "scale " + std::to_string(scale));
  for (const i64 b : {0, 2}) {
    const Block other(records.get() + kRecord * b, 1, 0);
    check(other.scale > 0.0f && !other.all_zero(), what, "a neighbour has changed");
  }
}

void test_activations() {
  std::mt19937 random(3);
  on_every_isa([&](const std::string& isa) {
    for (const i64 cols : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 300}) {
      const std::string what = isa + " quantise " + std::to_string(cols) + " columns";
      const Array x = exact_rows(12, cols, random);
      for (const i64 T : kTokens) {
        const size_t bytes = T * row_bytes(cols);
        const Bytes want = records_of(x, cols, 0, T, T), got(new unsigned char[bytes]);
        std::memset(got.get(), 0xff, bytes);
        for (i64 t = 0; t < T; ++t)
          for (i64 first = 0, block = 0; block < blocks_of(cols); ++block, first = std::min(block * kBlock, cols))
            quant_tiles().quantise(floats(x) + t * cols + first, std::min(kBlock, cols - first),
                                   got.get() + kRecord * T * block, static_cast<int>(T), static_cast<int>(t));
        check(!std::memcmp(got.get(), want.get(), bytes), what, "not the record of " + std::to_string(T) + " rows");
      }
      Array one(cols, kF32), real(cols, kF32);
      std::memcpy(one.data(), x.data(), cols * 4);
      check(!std::memcmp(quantised(one, cols).get(), records_of(x, cols, 0, 1, 1).get(), row_bytes(cols)), what,
            "not the record of a row");
      fill(real, cols, kReal, random);
      test_rounding(what, real);
    }
    Array ties(5, kF32);
    const double halves[] = {127.0, 0.5, 1.5, -2.5, -3.5};
    for (i64 i = 0; i < 5; ++i) ties.set(i, halves[i]);
    const Block block(quantised(ties, 5).get(), 1, 0);
    check(block.q[1] == 0 && block.q[2] == 2 && block.q[3] == -2 && block.q[4] == -4, isa, "ties do not go to even");
    for (const double largest : {0.0, 1e-37, 1e-44, HUGE_VAL, std::nan("")})
      test_unusual_block(isa + " quantise ", largest);
  });
}

void test_rows_of_floats() {
  std::mt19937 random(4);
  for (const i64 n : {1, 3, 4, 7, 8, 9, 16, 17, 31, 33, 64}) {
    Array gate(n, kF32), up(n, kF32), y(n, kF32);
    for (Array* each : {&gate, &up, &y}) fill(*each, n, kReal, random);
    for (i64 i = 0; i < n; ++i) gate.set(i, 12.0 * gate[i]);
    on_every_isa([&](const std::string& isa) {
      for (const bool gated : {true, false})
        for (const int kind : {kSilu, kGelu, kGeluTanh, kRelu}) {
          Array got(n, kF32);
          Doubles want(n);
          std::memcpy(got.data(), gate.data(), n * 4);
          for (i64 i = 0; i < n; ++i) want[i] = plain_activation(gate[i], kind) * (gated ? up[i] : 1.0);
          quant_tiles().glu(floats(got), gated ? floats(up) : nullptr, n, kind);
          compare(got, want, kF32, kSumLimit[kF32], isa + " glu " + std::to_string(kind) + " of " + std::to_string(n));
        }
      Array got(n, kF32);
      Doubles want(n);
      std::memcpy(got.data(), y.data(), n * 4);
      for (i64 i = 0; i < n; ++i) want[i] = y[i] - 0.75 * up[i];
      quant_tiles().add_scaled(floats(got), floats(up), -0.75f, n);
      compare(got, want, kF32, kSumLimit[kF32], isa + " add_scaled of " + std::to_string(n));
    });
  }
}

// ---- one matrix -----------------------------------------------------------------------------------------------

// What a matrix times 12 rows is, with room around it for whole strips.
struct Products {
  const Weight& weight;
  const Array& x;
  Doubles want;  // rows × weight.rows()

  Products(const Weight& w, const Array& rows) : weight(w), x(rows) {
    const Doubles values = w.values();
    for (i64 t = 0; t < kMostTokens; ++t) {
      const Doubles y = plain_product(values, row_of(x, w.cols(), t).data(), w.rows(), w.cols());
      want.insert(want.end(), y.begin(), y.end());
    }
  }
  Doubles of(i64 row, i64 first, i64 rows) const {
    const auto at = want.begin() + row * weight.rows() + first;
    return Doubles(at, at + rows);
  }
};

// Rows first to first + rows times x's row `t`, by matvec: whole, and in cuts.
Array test_matvec(const Products& p, i64 t, i64 first, i64 rows, const std::string& what) {
  const i64 cols = p.weight.cols();
  const Bytes blocks = records_of(p.x, cols, t, 1, 1);
  Array row(cols, kF32), whole(rows, kF32), cut(rows, kF32);
  std::memcpy(row.data(), floats(p.x) + t * cols, cols * 4);
  const Row x{p.weight.format().plain() ? floats(row) : nullptr, p.weight.format().plain() ? nullptr : blocks.get()};
  matvec(p.weight.matrix(), x, first, rows, floats(whole));
  compare(whole, p.of(t, first, rows), kF32, kSumLimit[kF32], what + "matvec");
  for (i64 done = 0, n = kStrip; done < rows; done += n, n = n == kStrip ? 2 * kStrip : kStrip)
    matvec(p.weight.matrix(), x, first + done, std::min(n, rows - done), floats(cut) + done);
  check(cut.same_bits(whole), what + "matvec", "cutting the matrix changes the bits");
  return whole;
}

// Row 0, rounded by the kernels themselves, and on threads.
void test_linear_row(const Products& p, const std::string& what) {
  const Weight& w = p.weight;
  Array row(w.cols(), kF32), one(w.rows(), kF32), two(w.rows(), kF32);
  std::memcpy(row.data(), p.x.data(), w.cols() * 4);
  linear_row({w.matrix(), {}}, row.data(), one.data(), kF32, 1);
  linear_row({w.matrix(), {}}, row.data(), two.data(), kF32, 2);
  compare(one, p.of(0, 0, w.rows()), kF32, kSumLimit[kF32], what + "linear_row");
  check(two.same_bits(one), what + "linear_row", "two threads change the bits");
}

// The same for rows 0 to count at once.
void test_multiply(const Products& p, i64 count, i64 first, const std::vector<Array>& alone, const std::string& what) {
  const Weight& w = p.weight;
  const i64 rows = w.part_rows(), cols = w.cols(), ld = up(rows, kStrip) + 3;
  const int size = token_size(count);
  const Bytes records = records_of(p.x, cols, 0, count, kTokens[size]);
  std::vector<const float*> values;
  for (i64 t = 0; t < count; ++t) values.push_back(floats(p.x) + t * cols);
  values.shrink_to_fit();
  Array out((kTokens[size] - 1) * ld + up(rows, kStrip), kF32);
  multiply(w.matrix(), first, rows, {size, count, records.get(), values.data()}, floats(out), ld);
  for (i64 t = 0; t < count; ++t)
    check(!std::memcmp(floats(out) + t * ld, alone[t].data(), rows * 4), what + "multiply",
          "row " + std::to_string(t) + " of " + std::to_string(count) + " is not what it is alone");
  for (i64 t = 1; t < kTokens[size]; ++t)
    for (i64 i = 1; i <= 3; ++i) check(std::isnan(out[t * ld - i]), what + "multiply", "writes past its strips");
  if (w.format().plain()) return;
  const Strips where(w.matrix());
  std::vector<const unsigned char*> strips, next;  // from the last to the first, the last once more
  for (i64 r = (rows - 1) / kStrip * kStrip; r >= 0; r -= kStrip) strips.push_back(where.at(w.matrix(), first + r));
  strips.push_back(strips[0]);
  next.assign(strips.rbegin(), strips.rend());
  const i64 strip_count = static_cast<i64>(strips.size()), turned_ld = strip_count * kStrip;
  Array turned(kTokens[size] * turned_ld, kF32);
  multiply_strips(w.matrix(), strips.data(), next.data(), strip_count, {size, count, records.get(), nullptr},
                  floats(turned), turned_ld);
  for (i64 t = 0; t < count; ++t)
    for (i64 s = 0; s < strip_count; ++s) {
      const i64 from = s < strip_count - 1 ? (strip_count - 2 - s) * kStrip : (strip_count - 2) * kStrip;
      check(!std::memcmp(floats(turned) + t * turned_ld + s * kStrip, floats(alone[t]) + from,
                         std::min(kStrip, rows - from) * 4),
            what + "multiply_strips", "strip " + std::to_string(s) + " is not what it is in its place");
    }
}

void test_matrix(const Weight& weight, const Array& x) {
  const Products p(weight, x);
  on_every_isa([&](const std::string& isa) {
    for (i64 first = 0; first < weight.rows(); first += weight.part_rows()) {
      const std::string what = isa + " " + weight.format().name() + " " + std::to_string(weight.rows()) + "x" +
                               std::to_string(weight.cols()) + " from " + std::to_string(first) + " ";
      if (weight.rows() == weight.part_rows()) test_linear_row(p, what);
      std::vector<Array> alone;
      for (i64 t = 0; t < kMostTokens; ++t) alone.push_back(test_matvec(p, t, first, weight.part_rows(), what));
      for (i64 count = 1; count <= kMostTokens; ++count) test_multiply(p, count, first, alone, what);
    }
  });
}

void test_matrices() {
  const i64 sizes[][3] = {
      // rows, cols, parts
      {1, 1, 1}, {15, 17, 1}, {16, 32, 1}, {17, 128, 1}, {33, 130, 1}, {34, 70, 2}, {66, 31, 2}, {130, 300, 1},
  };
  std::mt19937 random(5);
  for (const Format& format : kEveryFormat) {
    for (const auto& [rows, cols, parts] : sizes)
      test_matrix(Weight(format, rows, cols, parts, random), exact_rows(kMostTokens, cols, random));
    // The largest products that bytes have: their sums must not saturate.
    test_matrix(Weight(format, 32, 160, 1, random, true), exact_rows(kMostTokens, 160, random, true));
  }
}

// The number a table holds for a row, times 127 and whatever the code makes of it, to three roundings.
void test_table(const Weight& weight, const std::vector<unsigned>& bits, const std::string& what) {
  Array x(1, kF32);
  x.set(0, std::ldexp(127.0, -12));  // so that nothing overflows or vanishes
  const Bytes blocks = records_of(x, 1, 0, 1, 1);
  on_every_isa([&](const std::string& isa) {
    Array out(weight.rows(), kF32);
    matvec(weight.matrix(), {nullptr, blocks.get()}, 0, weight.rows(), floats(out));
    i64 r = 0;
    while (r < out.size() && std::fabs(out[r] - weight(r, 0) * x[0]) <= 3e-7 * std::fabs(weight(r, 0) * x[0])) ++r;
    check(r == out.size(), isa + " " + weight.format().name() + what,
          r < out.size() ? std::to_string(bits[r]) + " gives " + std::to_string(out[r]) : "");
  });
}

// Every finite fp16 as a scale and as a minimum, every exponent and every nf4 code; some are subnormal.
void test_every_scale() {
  std::mt19937 random(6);
  for (const Format& format : kEveryFormat) {
    if (format.plain()) continue;
    std::vector<unsigned> all;
    for (unsigned bits = 0; bits < (format.halves() ? 0x10000u : format.kind == kMXFP4 ? 255u : 256u); ++bits)
      if (!format.halves() || std::isfinite(half_value(bits))) all.push_back(bits);
    const i64 rows = static_cast<i64>(all.size());
    Weight weight(format, rows, 1, 1, random);
    const auto set_all = [&](bool minima) {
      for (i64 r = 0; r < rows; ++r) {
        weight.set_scale(r, 0, minima ? 0 : all[r]);
        if (!format.symmetric) weight.set_minimum(r, 0, minima ? all[r] : 0);
      }
    };
    set_all(false);
    test_table(weight, all, " scale ");
    if (format.symmetric) continue;
    set_all(true);
    test_table(weight, all, " minimum ");
  }
}

// ---- how memory is read ------------------------------------------------------------------------------------------

void test_read_memory() {
  std::mt19937_64 random(9);
  for (const int threads : {1, 2})
    for (const i64 lines : {0, 1, 5, 40}) {
      std::vector<std::uint64_t> words(threads * 64 * lines);
      std::uint64_t sum = 0;
      for (std::uint64_t& word : words) sum += word = random();
      words.shrink_to_fit();
      const i64 bytes = static_cast<i64>(words.size() * 8);
      check(read_memory(words.data(), bytes, threads) == sum, "read_memory", "another sum");
    }
}

}  // namespace

int main() {
  test_activations();
  test_rows_of_floats();
  test_matrices();
  test_every_scale();
  test_quant_ops();
  test_read_memory();
  for (const std::string& isa : available_isas()) std::printf("%s ", isa.c_str());
  std::printf("\n%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
