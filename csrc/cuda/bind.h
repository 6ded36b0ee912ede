// pybind11 for the host; for the device just enough to read an op's bind function, whose kernels have to be seen there.
// (nvcc reads a file once per architecture, and pybind11 was half of its time.)
#pragma once

#ifndef __CUDA_ARCH__
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#else
namespace pybind11 {
struct module_ {
  template <class... Args>
  void def(Args&&...) {}
};
struct arg {
  explicit arg(const char*) {}
};
struct kw_only {};
struct gil_scoped_release {};
template <class>
struct call_guard {};
}  // namespace pybind11
#endif
