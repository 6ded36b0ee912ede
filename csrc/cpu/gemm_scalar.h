// Products of scalar.
#pragma once

#include "cpu/units.h"

namespace m3ae::M3AE_ISA {

constexpr int kTileVectors = 2;  // 16 registers
using Bf16Unit = float;          // bf16 is widened when it is packed

}  // namespace m3ae::M3AE_ISA
