#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace moekit {
namespace {

constexpr i64 kFew = 32;               // so many are kept in order while all pass; more are sorted
constexpr i64 kScoresATask = 1 << 14;  // about 20 µs

bool before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

void sorted(const float* scores, i64 n, i64 k, i64* ids) {
  std::vector<i64> all(n);
  std::iota(all.begin(), all.end(), i64{0});
  std::partial_sort(all.begin(), all.begin() + k, all.end(), [&](i64 a, i64 b) {
    return before(scores[a], scores[b]) || (!before(scores[b], scores[a]) && a < b);
  });
  std::copy_n(all.begin(), k, ids);
}

}  // namespace

void top_k(const float* scores, i64 n, i64 k, i64* ids) {
  if (k > kFew) return sorted(scores, n, k, ids);
  i64 kept = 0;
  for (i64 i = 0; i < n; ++i) {  // numbers ascend, so one that equals those before it goes behind them
    if (kept == k && (!k || !before(scores[i], scores[ids[k - 1]]))) continue;
    i64 at = kept < k ? kept++ : k - 1;
    for (; at && before(scores[i], scores[ids[at - 1]]); --at) ids[at] = ids[at - 1];
    ids[at] = i;
  }
}

void top_k(const float* scores_TE, i64* ids_TK, i64 tokens, i64 experts, i64 k, int threads) {
  const i64 share = std::max<i64>(1, kScoresATask / std::max<i64>(experts, 1));
  parallel_for((tokens + share - 1) / share, threads, [&](i64 i) {
    for (i64 t = i * share; t < std::min(tokens, (i + 1) * share); ++t)
      top_k(scores_TE + t * experts, experts, k, ids_TK + t * k);
  });
}

}  // namespace moekit
