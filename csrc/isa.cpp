#include "isa.h"

#include <atomic>
#include <stdexcept>
#include <utility>

#if defined(MOEKIT_HAS_amx_bf16) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moekit {
namespace {

#if defined(MOEKIT_HAS_amx_bf16)
// Whether the CPU has tiles of bf16, and the system lets this process use them: Linux wants to be asked, once.
bool may_use_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kAskPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> find_isas() {
  std::vector<Isa> found{{"portable", &tiles_portable, &quant_portable, panels_portable}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#if defined(MOEKIT_HAS_avx2)
  if (avx2) found.push_back({"avx2", &tiles_avx2, &quant_avx2, panels_avx2});
#if defined(MOEKIT_HAS_avx2_vnni)
  if (avx2 && __builtin_cpu_supports("avxvnni"))
    found.push_back({"avx2_vnni", &tiles_avx2, &quant_avx2_vnni, panels_avx2});
#endif
#endif
#if defined(MOEKIT_HAS_avx512)
  if (avx512) found.push_back({"avx512", &tiles_avx512, &quant_avx512, panels_avx512});
#if defined(MOEKIT_HAS_avx512_vnni)
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni) found.push_back({"avx512_vnni", &tiles_avx512, &quant_avx512_vnni, panels_avx512});
#if defined(MOEKIT_HAS_avx512_bf16)  // every CPU that has BF16 has VNNI
  if (vnni && __builtin_cpu_supports("avx512bf16")) {
    found.push_back({"avx512_bf16_pairs", &tiles_avx512_bf16, &quant_avx512_vnni, pairs_avx512_bf16});
    found.push_back({"avx512_bf16", &tiles_avx512_bf16, &quant_avx512_vnni, panels_avx512_bf16});
    // vdpbf16ps multiplies pairs: twice the rate of an fp32 FMA on AMD, half of it on Intel (160 and 300 GFLOP/s on two
    // cores of an Emerald Rapids), where widened numbers and FMA are the better way.
    if (__builtin_cpu_is("amd")) std::swap(found.back(), found[found.size() - 2]);
#if defined(MOEKIT_HAS_amx_bf16)
    if (may_use_amx()) found.push_back({"amx_bf16", &tiles_avx512_bf16, &quant_avx512_vnni, panels_amx_bf16});
#endif
  }
#endif
#endif
#endif
#endif
  return found;
}

const std::vector<Isa>& all_isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& each : all_isas()) names.emplace_back(each.name);
  return names;
}

const Isa& isa() {
  const Isa* now = chosen.load(std::memory_order_relaxed);
  return now ? *now : all_isas().back();
}

void use_isa(const std::string& name) {
  for (const Isa& each : all_isas()) {
    if (name == each.name) {
      chosen.store(&each, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument("no such instruction set here: " + name);
}

}  // namespace moekit
