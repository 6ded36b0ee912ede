#include "cpu/isa.h"

#include <cstdlib>

#include "check.h"

namespace m3ae {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

bool machine_runs(Isa isa) {
#ifdef M3AE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::scalar;  // the others are not built
#endif
}

Isa best_isa() {
  for (Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2})
    if (machine_runs(isa)) return isa;
  return Isa::scalar;
}

Isa active = Isa::scalar;

}  // namespace

Isa active_isa() { return active; }
const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (machine_runs(isa)) names.emplace_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  if (name.empty()) {
    active = best_isa();
    return;
  }
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (name != isa_name(isa)) continue;
    if (!machine_runs(isa)) {
      std::string here;
      for (const auto& each : available_isas()) here += (here.empty() ? "" : ", ") + each;
      value_error("M3AE_FAST_ISA must name an instruction set that this build and machine have (", here, "), got '",
                  name, "'");
    }
    active = isa;
    return;
  }
  value_error("M3AE_FAST_ISA must be one of scalar, avx2, avx512, avx512_bf16, got '", name, "'");
}

}  // namespace m3ae
