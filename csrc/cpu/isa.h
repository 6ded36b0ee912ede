// Instruction sets: which were built, which this machine runs, which is in use.
#pragma once

#include <string>
#include <vector>

namespace m3ae {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

Isa active_isa();
const char* isa_name(Isa isa);
std::vector<std::string> available_isas();     // built and supported by this machine, slowest first
void set_isa(const std::string& name);         // "" takes the best; throws ValueError text for one that cannot run here

}  // namespace m3ae
