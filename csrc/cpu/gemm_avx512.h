// Products of avx512.
#pragma once

#include "cpu/units.h"

namespace m3ae::M3AE_ISA {

constexpr int kTileVectors = 4;  // 32 registers
using Bf16Unit = float;          // bf16 is widened when it is packed

}  // namespace m3ae::M3AE_ISA
