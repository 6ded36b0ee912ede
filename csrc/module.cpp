// m3ae_fast._C: the CPU kernels. Tensors are read through DLPack (tensor.h); torch is never linked.
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "tensor.h"

namespace m3ae {
#define M3AE_OP(op) void bind_##op(pybind11::module_& module);
#include "ops.inc"
#undef M3AE_OP
}  // namespace m3ae

PYBIND11_MODULE(_C, module) {
  using namespace m3ae;
  module.doc() = "m3ae_fast CPU kernels";
  load_exchange_api();
  module.def("available_isas", &available_isas, "instruction sets that this build and machine have, slowest first");
  module.def("unavailable_isas", &unavailable_isas, "the other instruction sets, each with the reason");
  module.def("active_isa", [] { return isa_name(active_isa()); });
  module.def("set_isa", &set_isa, pybind11::arg("name"), "'' takes the best this machine has");
  module.def("set_products", &set_products, pybind11::arg("name"), "'' takes the fastest, 'torch' its, 'own' ours");
  module.def("products_of", [](const Tensor& like, const std::string& precision, bool intel) {
    return static_cast<int>(products_of(like.dtype(), precision, intel));
  }, pybind11::arg("like"), pybind11::arg("precision"), pybind11::arg("intel") = made_by_intel(),
     "who multiplies, and what: Products of csrc/cpu/isa.h; intel: whether the CPU is Intel's");
  module.def("num_threads", &max_threads, "threads a kernel may use: torch.set_num_threads rules it");
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
#define M3AE_OP(op) bind_##op(module);
#include "ops.inc"
#undef M3AE_OP
}
