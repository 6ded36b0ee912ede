// Products of amx_emulated.
#pragma once

#include "cpu/gemm_amx.h"
