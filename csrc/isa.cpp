#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace moekit {
namespace {

std::vector<const Tiles*> find_tiles() {
  std::vector<const Tiles*> found{&tiles_portable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#if defined(MOEKIT_HAS_avx2)
  if (avx2) found.push_back(&tiles_avx2);
#endif
#if defined(MOEKIT_HAS_avx512)
  if (avx512) found.push_back(&tiles_avx512);
#endif
#if defined(MOEKIT_HAS_avx512_bf16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&tiles_avx512_bf16);
#endif
#endif
  return found;
}

const std::vector<const Tiles*>& all_tiles() {
  static const std::vector<const Tiles*> found = find_tiles();
  return found;
}

std::atomic<const Tiles*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Tiles* each : all_tiles()) names.emplace_back(each->name);
  return names;
}

const Tiles& tiles() {
  const Tiles* now = chosen.load(std::memory_order_relaxed);
  return now ? *now : *all_tiles().back();
}

void use_isa(const std::string& name) {
  for (const Tiles* each : all_tiles()) {
    if (name == each->name) {
      chosen.store(each, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument("no such instruction set here: " + name);
}

}  // namespace moekit
