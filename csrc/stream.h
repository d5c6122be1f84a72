// How fast memory can be read: the bound that the decode kernels are held against.
#pragma once
#include <cstdint>

namespace moekit {

// The sum of the 64-bit words of `bytes` (a multiple of 64 · streams · threads), read by each thread in several
// places at once with prefetches, as the kernels read their strips: one stream a core does not fill the memory bus.
std::uint64_t read_memory(const void* data, std::int64_t bytes, int threads);

}  // namespace moekit
