// Instruction sets: which were built, which this machine runs, which is in use.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "dtype.h"

namespace m3ae {

int active_isa();                           // the index of the set in use: of M3AE_EACH_ISA (cpu/dispatch.h)
const char* isa_name(int isa);
std::vector<std::string> available_isas();  // built and supported by this machine, slowest first
std::map<std::string, std::string> unavailable_isas();  // the others, each with its reason

// Whether matrix products of this dtype are faster by the kernels of the set in use than by torch's own libraries, which
// use the best set of the machine. The one place that decides: by machine and dtype, never by size.
bool own_products(Dtype dtype);
void set_isa(const std::string& name);      // "" takes the best; throws ValueError text for one that cannot run here

}  // namespace m3ae
