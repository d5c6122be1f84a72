// Threads come from the OpenMP runtime that PyTorch loaded.
#pragma once
#include <atomic>
#include <cstdint>

namespace moekit {

// body(i) for every i < n, handed out one by one; tasks must not share outputs, so the order never matters.
template <class Body>
void parallel_for(std::int64_t n, [[maybe_unused]] int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 1)
#endif
  {
    std::int64_t i;
    while ((i = next.fetch_add(1, std::memory_order_relaxed)) < n) body(i);
  }
}

}  // namespace moekit
