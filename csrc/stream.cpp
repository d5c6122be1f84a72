#include "stream.h"

#include <atomic>
#include <cstring>

#include "parallel.h"

namespace moekit {
namespace {

constexpr std::int64_t kStreams = 8, kLine = 64, kAhead = 2048;
using Line = std::uint64_t __attribute__((vector_size(kLine)));

std::uint64_t sum(const char* data, std::int64_t bytes) {
  const std::int64_t stream = bytes / kStreams;
  Line totals[kStreams] = {};
  for (std::int64_t at = 0; at < stream; at += kLine) {
    for (std::int64_t s = 0; s < kStreams; ++s) {
      const char* place = data + s * stream + at;
      __builtin_prefetch(place + kAhead, 0, 2);  // in L2, as the kernels do; past the end it is a hint about nothing
      Line line;
      std::memcpy(&line, place, kLine);
      totals[s] += line;
    }
  }
  std::uint64_t total = 0;
  for (const Line& each : totals)
    for (int i = 0; i < kLine / 8; ++i) total += each[i];
  return total;
}

}  // namespace

std::uint64_t read_memory(const void* data, std::int64_t bytes, int threads) {
  std::atomic<std::uint64_t> total{0};
  const std::int64_t share = bytes / threads;
  parallel_for(threads, threads, [&](std::int64_t i) {
    total.fetch_add(sum(static_cast<const char*>(data) + i * share, share), std::memory_order_relaxed);
  });
  return total;
}

}  // namespace moekit
