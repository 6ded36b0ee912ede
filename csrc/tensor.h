// A torch tensor as a binding sees it: a view that owns nothing, with the checks that all bindings share.
#pragma once

#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>

#include "check.h"
#include "dlpack.h"
#include "dtype.h"

namespace m3ae {

constexpr int64_t kAny = -1;  // a size that is not prescribed

// Accumulators, and what is computed in them, are fp32, but fp64 beside fp64.
constexpr Dtype accumulator(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// None is a view without sizes. Sizes and strides in elements; they are torch's own, and live as long as the call.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(const dlpack::Tensor& view) : view_(view), given_(true) {}

  explicit operator bool() const { return given_; }
  int64_t size(int dimension) const { return dimension < view_.rank ? view_.sizes[dimension] : 0; }
  int64_t stride(int dimension) const { return dimension < view_.rank ? view_.strides[dimension] : 0; }
  dlpack::Device device() const { return view_.device; }

  // Of a floating-point tensor or of uint8 pixels; of anything else fp32, which the checks refuse.
  Dtype dtype() const {
    for (Dtype each : {Dtype::f64, Dtype::f16, Dtype::bf16, Dtype::u8})
      if (is(each)) return each;
    return Dtype::f32;
  }

  // The checks: each returns the address of the first element, null for None where that is allowed ("optional") and
  // for a tensor without elements. What is wrong becomes a ValueError that names the argument.
  void* dense(const char* name, std::initializer_list<int64_t> sizes, Dtype expected) const {
    check_dtype(name, expected);
    return contiguous(name, sizes);
  }
  void* dense(const char* name, std::initializer_list<int64_t> sizes) const { return dense(name, sizes, dtype()); }
  template <class... Dtypes>
  void* optional(const char* name, std::initializer_list<int64_t> sizes, Dtypes... expected) const {
    return given_ ? dense(name, sizes, expected...) : nullptr;
  }
  // Rows of any strides whose last dimension is contiguous.
  void* strided(const char* name, std::initializer_list<int64_t> sizes, Dtype expected) const {
    check_dtype(name, expected);
    check(name, sizes);
    M3AE_CHECK(stride(view_.rank - 1) == 1 || size(view_.rank - 1) <= 1 || elements() == 0, name,
               " must have a contiguous last dimension, got strides ", text(view_.strides));
    return view_.data;
  }
  template <class Integer>
  Integer* integers(const char* name, std::initializer_list<int64_t> sizes) const {
    M3AE_CHECK(!given_ || (view_.dtype.code == dlpack::kInt && view_.dtype.bits == 8 * sizeof(Integer)), name,
               " must be of dtype int", 8 * sizeof(Integer), ", got ", type_text());
    return static_cast<Integer*>(contiguous(name, sizes));
  }
  bool is_int64() const { return view_.dtype.code == dlpack::kInt && view_.dtype.bits == 64; }
  int32_t* int32s(const char* name, std::initializer_list<int64_t> sizes) const {
    return integers<int32_t>(name, sizes);
  }
  int32_t* optional_int32s(const char* name, std::initializer_list<int64_t> sizes) const {
    return given_ ? int32s(name, sizes) : nullptr;
  }
  // Any strides.
  void* any(const char* name, std::initializer_list<int64_t> sizes) const {
    check_dtype(name, dtype());
    check(name, sizes);
    return view_.data;
  }

 private:
#ifdef __CUDACC__
  static constexpr int32_t kDevice = dlpack::kCuda;
#else
  static constexpr int32_t kDevice = dlpack::kCpu;  // the emulator's too
#endif

  int64_t elements() const {
    int64_t count = 1;
    for (int d = 0; d < view_.rank; ++d) count *= view_.sizes[d];
    return count;
  }
  std::string text(const int64_t* numbers) const {
    std::string out = "(";
    for (int d = 0; d < view_.rank; ++d) out += (d ? ", " : "") + std::to_string(numbers[d]);
    return out + (view_.rank == 1 ? ",)" : ")");
  }
  std::string type_text() const {
    const auto [code, bits, lanes] = view_.dtype;
    const char* names[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    return (code < 7 ? names[code] : "type ") + std::to_string(bits);
  }
  bool is(Dtype dtype) const {
    const uint8_t code = dtype == Dtype::u8 ? dlpack::kUint : dtype == Dtype::bf16 ? dlpack::kBfloat : dlpack::kFloat;
    return view_.dtype.code == code && view_.dtype.bits == 8 * size_of(dtype);
  }
  void check_dtype(const char* name, Dtype expected) const {
    const char* names[] = {"float32", "bfloat16", "float64", "uint8", "float16"};
    M3AE_CHECK(!given_ || is(expected), name, " must be of dtype ", names[static_cast<int>(expected)], ", got ",
               type_text());
  }
  void* contiguous(const char* name, std::initializer_list<int64_t> sizes) const {
    check(name, sizes);
    for (int64_t dense = 1, d = view_.rank - 1; d >= 0; dense *= view_.sizes[d--])
      if (view_.sizes[d] != 1 && view_.strides[d] != dense && elements() != 0)
        value_error(name, " must be contiguous, got strides ", text(view_.strides));
    return view_.data;
  }
  void check(const char* name, std::initializer_list<int64_t> sizes) const {
    M3AE_CHECK(given_, name, " must be a tensor, got None");
    bool matches = view_.rank == static_cast<int>(sizes.size());
    for (int d = 0; matches && d < view_.rank; ++d)
      matches = sizes.begin()[d] == kAny || sizes.begin()[d] == view_.sizes[d];
    if (!matches) {
      std::string expected;
      for (int64_t size : sizes)
        expected += (expected.empty() ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
      value_error(name, " must have shape (", expected, sizes.size() == 1 ? ",)" : ")", ", got ", text(view_.sizes));
    }
    M3AE_CHECK(view_.device.type == kDevice, name, " must be on ",
               kDevice == dlpack::kCpu ? "the CPU" : "a CUDA device", ", got DLPack device type ", view_.device.type);
    M3AE_CHECK(view_.data != nullptr || elements() == 0, name, " must have memory, got a tensor without any");
  }

  dlpack::Tensor view_{};
  bool given_ = false;
};

// How many sequences cu has offsets for, which may be none; [B + 1].
inline int64_t sequences_of(const char* name, const Tensor& cu) {
  M3AE_CHECK(cu.size(0) > 0, name, " must have at least one entry (B + 1 cumulative offsets), got none");
  return cu.size(0) - 1;
}

// cu splits the first cu[sequences] of `rows` rows among sequences. Returns the longest.
inline int64_t check_offsets(const char* name, const int32_t* cu, int64_t sequences, int64_t rows) {
  int64_t longest = 0, before = 0;
  for (int64_t n = 0; n <= sequences; before = cu[n++]) {
    M3AE_CHECK(n == 0 ? cu[0] == 0 : cu[n] >= before && cu[n] <= rows, name, " must ascend from 0 to at most ", rows,
               " rows, got ", name, "[", n, "] = ", cu[n], " after ", before);
    if (cu[n] - before > longest) longest = cu[n] - before;
  }
  return longest;
}

inline const dlpack::ExchangeApi* exchange_api = nullptr;  // set once, when the module is imported

}  // namespace m3ae

#ifndef __CUDA_ARCH__
#include <pybind11/pybind11.h>

namespace m3ae {

inline void load_exchange_api() {
  const auto capsule = pybind11::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
  const void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!table) throw pybind11::error_already_set();
  exchange_api = static_cast<const dlpack::ExchangeApi*>(table);
  while (exchange_api && exchange_api->version.major != dlpack::kMajorVersion) exchange_api = exchange_api->previous;
  if (!exchange_api) throw pybind11::import_error("this torch has no DLPack 1.x exchange table: torch >= 2.10 has one");
}

}  // namespace m3ae

template <>
struct pybind11::detail::type_caster<m3ae::Tensor> {
  PYBIND11_TYPE_CASTER(m3ae::Tensor, const_name("Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    m3ae::dlpack::Tensor view;
    if (m3ae::exchange_api->tensor_from_py_object_no_sync(source.ptr(), &view) != 0) {
      error_already_set error;
      if (isinstance(source, module_::import("torch").attr("Tensor"))) throw error;
      return false;  // pybind11 raises TypeError
    }
    view.data = static_cast<char*>(view.data) + view.byte_offset;
    value = m3ae::Tensor(view);
    return true;
  }
};

namespace m3ae {

// A function of Python: arguments by keyword alone, each by its name here; without Python's lock.
template <class... Args>
void bind(pybind11::module_& module, const char* name, void (*function)(Args...),
          std::initializer_list<const char*> names) {
  M3AE_CHECK(names.size() == sizeof...(Args), name, " must have ", sizeof...(Args), " names, got ", names.size());
  const auto define = [&](auto... each) {
    module.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>(), pybind11::kw_only(), each...);
  };
  auto next = [at = names.begin()](const auto*) mutable { return pybind11::arg(*at++); };
  std::apply(define, std::tuple{next(static_cast<std::remove_reference_t<Args>*>(nullptr))...});
}

}  // namespace m3ae
#endif
