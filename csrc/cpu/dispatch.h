// A kernel is declared once (in <op>.h), compiled for each instruction set (namespace M3AE_ISA, in <op>_kernel.cpp) and
// called through the set in use (in <op>.cpp). One that multiplies matrices (cpu/gemm.h) is compiled for every set:
// M3AE_PRODUCT_KERNEL, M3AE_DISPATCH_PRODUCT. Any other only once for sets that have the same vectors: M3AE_KERNEL,
// M3AE_DISPATCH. CMake sees which it is by the include.
#pragma once

#include <initializer_list>

#include "cpu/isa.h"
// Made by CMake. M3AE_EACH_ISA(each, argument): each(<isa>, <vectors>, argument) of every set that is built;
// M3AE_EACH_VECTORS(each, argument): each(<isa>, argument) of those with vectors of their own.
#include "each_isa.h"

#define M3AE_DECLARE(isa, ...) namespace m3ae::isa { __VA_ARGS__; }
#define M3AE_DECLARE_PRODUCT(isa, vectors, ...) M3AE_DECLARE(isa, __VA_ARGS__)
#define M3AE_KERNEL(...) M3AE_EACH_VECTORS(M3AE_DECLARE, __VA_ARGS__)
#define M3AE_PRODUCT_KERNEL(...) M3AE_EACH_ISA(M3AE_DECLARE_PRODUCT, __VA_ARGS__)

namespace m3ae {
template <class Kernel>
Kernel* in_use(std::initializer_list<Kernel*> kernels) { return kernels.begin()[active_isa()]; }
}  // namespace m3ae

#define M3AE_ADDRESS(isa, vectors, kernel) &::m3ae::vectors::kernel,
#define M3AE_PRODUCT_ADDRESS(isa, vectors, kernel) &::m3ae::isa::kernel,
#define M3AE_DISPATCH(kernel) (::m3ae::in_use({M3AE_EACH_ISA(M3AE_ADDRESS, kernel)}))
#define M3AE_DISPATCH_PRODUCT(kernel) (::m3ae::in_use({M3AE_EACH_ISA(M3AE_PRODUCT_ADDRESS, kernel)}))
