#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace rmcore::cpu {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16};

// An environment variable that names nothing known, or more than the machine has, leaves the best in place.
Isa initial_isa() {
  const char* wanted = std::getenv("RMCORE_CPU_ISA");
  const Isa best = detect_isa();
  if (wanted != nullptr) {
    for (const Isa isa : kAll) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa <= best) return isa;
    }
  }
  return best;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (vnni) return Isa::avx512_vnni;
  if (avx512) return Isa::avx512;
#if defined(RMCORE_EMULATE_AVX512)
  if (avx2) return Isa::avx512_bf16;
#endif
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa active_isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  const Isa best = detect_isa();
  if (std::strcmp(name, "auto") == 0) {
    current().store(best);
    return true;
  }
  for (const Isa isa : kAll) {
    if (std::strcmp(name, isa_name(isa)) == 0 && isa <= best) {
      current().store(isa);
      return true;
    }
  }
  return false;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::scalar:
      break;
  }
  return "scalar";
}

}  // namespace rmcore::cpu
