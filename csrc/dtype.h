// Element types of tensors that Python hands over by address. The codes are those of m3ae_fast/_backends.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace m3ae {

enum class Dtype : int { f32 = 0, bf16 = 1, f64 = 2, u8 = 3, f16 = 4 };  // f16: on GPUs alone

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : dtype == Dtype::u8 ? 1 : 2;
}

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <class T>
M3AE_HOST_DEVICE const T* as(const void* address) { return static_cast<const T*>(address); }
template <class T>
M3AE_HOST_DEVICE T* as(void* address) { return static_cast<T*>(address); }

// An address from Python (tensor.data_ptr(), 0 for None).
using Address = std::uintptr_t;
inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }
inline const int32_t* int32s(Address address) { return reinterpret_cast<const int32_t*>(address); }

}  // namespace m3ae
