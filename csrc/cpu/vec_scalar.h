// Vec of scalar: one lane.
#pragma once

#include "cpu/lane.h"

namespace m3ae::M3AE_ISA {

using VecF32 = Lane<float>;

}  // namespace m3ae::M3AE_ISA
