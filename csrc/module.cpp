// m3ae_fast._C: the CPU kernels. Tensors are read through DLPack (tensor.h); torch is never linked.
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/sum_rows.h"
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
  module.def("own_products", [](int dtype) { return own_products(Dtype(dtype)); }, pybind11::arg("dtype"),
             "whether products of this dtype are made here, not by torch: csrc/cpu/isa.h");
  module.def("num_threads", &max_threads, "threads a kernel may use: torch.set_num_threads rules it");
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.def(
      "sum_rows",
      [](Address rows, int rows_dtype, Address index, int64_t count, int32_t first, int64_t groups, int64_t width,
         Address out, int out_dtype) {
        sum_rows(pointer(rows), Dtype(rows_dtype), int32s(index), count, first, groups, width, pointer(out),
                 Dtype(out_dtype));
      },
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "out[g] = the sum of the rows whose index is first + g");
#define M3AE_OP(op) bind_##op(module);
#include "ops.inc"
#undef M3AE_OP
}
