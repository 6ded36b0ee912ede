// pybind11 for the host; for the device just enough to read an op's bind function, whose kernels have to be seen there.
// (nvcc reads a file once per architecture, and pybind11 was half of its time.)
#pragma once

#ifndef __CUDA_ARCH__
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#else
#include <initializer_list>

namespace pybind11 {
struct module_ {};
}  // namespace pybind11
namespace m3ae {
template <class... Args>
void bind(pybind11::module_&, const char*, void (*)(Args...), std::initializer_list<const char*>) {}
}  // namespace m3ae
#endif
