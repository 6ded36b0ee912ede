// Products of avx2.
#pragma once

#include "cpu/gemm_scalar.h"
