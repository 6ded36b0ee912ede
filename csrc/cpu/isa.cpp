#include "cpu/isa.h"

#include <cstdlib>

#include "check.h"
#include "cpu/dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace m3ae {
namespace {

// Why this machine cannot run a set; null where it can.
#ifdef __x86_64__
const char* no_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? nullptr : "this CPU has no AVX2";
}
const char* no_avx512() {
  if (const char* reason = no_avx2()) return reason;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? nullptr
             : "this CPU has no AVX-512";
}
const char* no_avx512_bf16() {
  if (const char* reason = no_avx512()) return reason;
  return __builtin_cpu_supports("avx512bf16") ? nullptr : "this CPU has no AVX512_BF16";
}
const char* no_amx() {
  if (const char* reason = no_avx512_bf16()) return reason;
  static const char* const reason = []() -> const char* {  // once: a virtual machine traps on CPUID
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;  // leaf 7: bit 22 AMX-BF16, bit 24 AMX-TILE
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    if (!(edx >> 22 & 1) || !(edx >> 24 & 1)) return "this CPU has no AMX for bf16";
#ifdef __linux__
    // Linux grants the tiles' state to a process that asks: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? nullptr : "Linux did not permit AMX to this process";
#else
    return "AMX is used on Linux alone";
#endif
  }();
  return reason;
}
#else
const char* no_avx2() { return "this CPU is no x86-64"; }
const char* no_avx512() { return no_avx2(); }
const char* no_avx512_bf16() { return no_avx2(); }
const char* no_amx() { return no_avx2(); }
#endif

struct InstructionSet {
  const char* name;
  const char* (*refusal)();
};
constexpr InstructionSet kKnown[] = {
#define M3AE_INSTRUCTION_SET(name, vectors, reason, flags) {#name, []() -> const char* { return reason; }},
#include "cpu/isas.inc"
#undef M3AE_INSTRUCTION_SET
};
#define M3AE_NAME(isa, vectors, unused) #isa,
constexpr const char* kBuilt[] = {M3AE_EACH_ISA(M3AE_NAME, )};
#undef M3AE_NAME
constexpr int kBuiltCount = sizeof(kBuilt) / sizeof(*kBuilt);

int active = 0;
std::string asked_products;  // M3AE_FAST_PRODUCTS

int built(const std::string& name) {
  for (int isa = 0; isa < kBuiltCount; ++isa)
    if (name == kBuilt[isa]) return isa;
  return -1;
}

// Empty where it can run.
std::string refusal(const InstructionSet& set) {
  const char* reason = set.refusal();
  return reason ? reason : built(set.name) < 0 ? "this build left it out" : "";
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

int active_isa() { return active; }
const char* isa_name(int isa) { return kBuilt[isa]; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kKnown)
    if (refusal(set).empty()) names.emplace_back(set.name);
  return names;
}

std::map<std::string, std::string> unavailable_isas() {
  std::map<std::string, std::string> reasons;
  for (const InstructionSet& set : kKnown)
    if (std::string reason = refusal(set); !reason.empty()) reasons[set.name] = reason;
  return reasons;
}

bool made_by_intel() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Products products_of(Dtype dtype, const std::string& precision, bool intel) {
  const std::string isa = isa_name(active);
  const bool tiles = isa == "amx" || isa == "amx_emulated", pairs = tiles || isa == "avx512_bf16";
  const bool fp32 = dtype == Dtype::f32, to_bf16 = fp32 && precision == "bf16", to_tf32 = fp32 && precision == "tf32";
  Products ours = Products::own;
  if (to_bf16 && pairs) ours = Products::bf16;
  if (to_tf32 && tiles) ours = Products::two_bf16;  // by pairs, three products take longer than one of fp32
  if (!asked_products.empty()) return asked_products == "torch" ? Products::torch : ours;
  if (dtype == Dtype::f64 || isa == "scalar") return Products::torch;
  if ((dtype == Dtype::bf16 || to_bf16) && !tiles && !no_amx()) return Products::torch;
  // On Intel's CPUs torch multiplies by MKL, whose fp32 products were 1.09 to 1.25 times as fast (Sapphire Rapids).
  return fp32 && ours == Products::own && intel ? Products::torch : ours;
}

void set_products(const std::string& name) {
  if (!name.empty() && name != "torch" && name != "own")
    value_error("M3AE_FAST_PRODUCTS must be torch or own, got '", name, "'");
  asked_products = name;
}

void set_isa(const std::string& name) {
  for (const InstructionSet& set : kKnown) {
    if (!name.empty() && name != set.name) continue;
    const std::string reason = refusal(set);
    if (reason.empty()) active = built(set.name);  // without a name the last one stays: the best
    else if (!name.empty())
      value_error("M3AE_FAST_ISA must name an instruction set that this build and machine have (",
                  joined(available_isas()), "), got '", name, "': ", reason);
    if (!name.empty()) return;
  }
  if (!name.empty())
    value_error("M3AE_FAST_ISA must be one of ", joined({kBuilt, kBuilt + kBuiltCount}), ", got '", name, "'");
}

}  // namespace m3ae
