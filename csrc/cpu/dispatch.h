// A kernel is declared once (M3AE_KERNEL, in <op>.h), compiled once per instruction set (M3AE_ISA, in
// <op>_kernel.cpp) and called through the one in use (M3AE_DISPATCH, in <op>.cpp).
#pragma once

#include "cpu/isa.h"

#ifdef M3AE_X86
#define M3AE_KERNEL(declaration)              \
  namespace m3ae::scalar { declaration; }     \
  namespace m3ae::avx2 { declaration; }       \
  namespace m3ae::avx512 { declaration; }     \
  namespace m3ae::avx512_bf16 { declaration; }
#define M3AE_DISPATCH(kernel)                                                 \
  (::m3ae::active_isa() == ::m3ae::Isa::avx512_bf16 ? ::m3ae::avx512_bf16::kernel \
   : ::m3ae::active_isa() == ::m3ae::Isa::avx512    ? ::m3ae::avx512::kernel      \
   : ::m3ae::active_isa() == ::m3ae::Isa::avx2      ? ::m3ae::avx2::kernel        \
                                                    : ::m3ae::scalar::kernel)
#else
#define M3AE_KERNEL(declaration) namespace m3ae::scalar { declaration; }
#define M3AE_DISPATCH(kernel) (::m3ae::scalar::kernel)
#endif
