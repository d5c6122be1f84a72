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

// body(i, the task this thread does next or -1): what follows is known early enough to be prefetched.
template <class Body>
void parallel_ahead(std::int64_t n, [[maybe_unused]] int threads, const Body& body) {
  std::atomic<std::int64_t> claimed{0};
  const auto claim = [&] {
    const std::int64_t i = claimed.fetch_add(1, std::memory_order_relaxed);
    return i < n ? i : -1;
  };
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 1)
#endif
  {
    std::int64_t next;
    for (std::int64_t now = claim(); now >= 0; now = next) body(now, next = claim());
  }
}

}  // namespace moekit
