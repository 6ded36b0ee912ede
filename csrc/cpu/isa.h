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

// Who multiplies matrices, and what: torch's own libraries, which use the best set of the machine, or the kernels of the
// set in use: elements as they are, fp32 ones rounded to bf16, or as the sum of two bf16, which takes three products.
enum class Products : int { torch, own, bf16, two_bf16 };

// How many bf16 numbers stand for an fp32 one; 0: it is multiplied as it is.
constexpr int bf16_parts(Products products) {
  return products == Products::bf16 ? 1 : products == Products::two_bf16 ? 2 : 0;
}

// The fastest that the dtype and, for fp32, the precision allow. The one place that decides: by the set in use and the
// CPU's maker, never by size. precision: torch.backends.mkldnn.matmul.fp32_precision. intel: see made_by_intel().
Products products_of(Dtype dtype, const std::string& precision, bool intel);
bool made_by_intel();                        // this machine's CPU
void set_products(const std::string& name);  // "" takes the fastest, "torch" always its products, "own" always ours
void set_isa(const std::string& name);       // "" takes the best; throws ValueError text for one that cannot run here

}  // namespace m3ae
