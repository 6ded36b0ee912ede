// The part of DLPack 1.x's ABI that is read here: how torch describes a tensor to code that does not link against it.
// Layout as in github.com/dmlc/dlpack, include/dlpack/dlpack.h (version 1.3), which torch ships as ATen/dlpack.h. A
// new major version may change it, a minor one only adds to the end.
#pragma once

#include <cstdint>

namespace m3ae::dlpack {

constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
struct Device {
  int32_t type, index;
};

enum TypeCode : uint8_t { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4 };
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

// torch.Tensor.__dlpack_c_exchange_api__. Functions return 0, or -1 with a Python exception set.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;  // the table of an earlier major version, or null
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*tensor_from_py_object_no_sync)(void* object, Tensor* out);  // borrowed: nothing to release
  int (*current_work_stream)(DeviceType type, int32_t index, void** stream);
};

}  // namespace m3ae::dlpack
