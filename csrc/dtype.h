// Element types of tensors.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace m3ae {

enum class Dtype : int { f32, bf16, f64, u8, f16 };  // f16: on GPUs alone

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

}  // namespace m3ae
