// Every call into PyTorch's stable ABI that host code makes, for the CPU and the CUDA library. Header-only; build with
// -DTORCH_TARGET_VERSION=0x020a000000000000, so that one binary loads in every torch from 2.10 on. With -DUSE_CUDA it
// also knows CUDA's current stream, which lives in libtorch_cuda.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace fflfast {

using Tensor = torch::stable::Tensor;

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt64, kOther };

// Throws RuntimeError with the message made of `parts`: what was expected, what came, what to do.
template <class... Parts>
inline void require(bool condition, const Parts&... parts) {
  if (__builtin_expect(condition, 1)) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "int64", "another dtype"};
  return kNames[static_cast<int>(dtype)];
}

inline Dtype dtype_of(const Tensor& tensor) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  if (code == aoti_torch_dtype_float32()) return Dtype::kFloat32;
  if (code == aoti_torch_dtype_int64()) return Dtype::kInt64;
  if (code == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
  if (code == aoti_torch_dtype_float16()) return Dtype::kFloat16;
  return code == aoti_torch_dtype_float64() ? Dtype::kFloat64 : Dtype::kOther;
}

inline int32_t code_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return aoti_torch_dtype_float64();
    case Dtype::kBFloat16: return aoti_torch_dtype_bfloat16();
    case Dtype::kFloat16: return aoti_torch_dtype_float16();
    case Dtype::kInt64: return aoti_torch_dtype_int64();
    default: return aoti_torch_dtype_float32();
  }
}

inline int element_size(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16 ? 2 : 8;
}

// What sums, losses and scalars are kept in.
inline Dtype accumulation(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

inline void expect_dtype(const Tensor& tensor, Dtype dtype, const char* op, const char* name) {
  const Dtype got = dtype_of(tensor);
  require(got == dtype, op, ": expected ", name, " of ", name_of(dtype), ", got ", name_of(got));
}

inline const void* data(const Tensor& tensor) {
  const void* pointer = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.get(), &pointer));
  return pointer;
}

inline void* mutable_data(const Tensor& tensor) {
  void* pointer = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor.get(), &pointer));
  return pointer;
}

// A new uninitialised contiguous tensor on the device of `like`.
inline Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype, const Tensor& like) {
  int64_t strides[8], stride = 1;
  for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                  code_of(dtype), device_type, device_index, &handle));
  return Tensor(handle);
}

// The tensor in float32 or float64, itself where it is that already.
inline Tensor converted(const Tensor& tensor, Dtype dtype) {
  using torch::headeronly::ScalarType;
  return torch::stable::to(tensor, dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float);
}

// A 0-dim tensor's number: read now where it is on the CPU, else the address from which a kernel reads it.
struct Scalar {
  double value = 0.0;
  const void* device = nullptr;
};

inline Scalar read_scalar(const Tensor& tensor, Dtype dtype, const char* op, const char* name) {
  expect_dtype(tensor, dtype, op, name);
  require(tensor.numel() == 1, op, ": expected ", name, " with one element, got ", tensor.numel());
  const void* pointer = data(tensor);
  if (!tensor.is_cpu()) return {0.0, pointer};
  return {dtype == Dtype::kFloat64 ? *static_cast<const double*>(pointer)
                                   : static_cast<double>(*static_cast<const float*>(pointer)),
          nullptr};
}

// Calls body(begin, end) over parts of [0, count) of at least `grain` each, on torch's threads. `body` must not throw.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  TORCH_ERROR_CODE_CHECK(
      torch_parallel_for(0, count, grain, call, const_cast<void*>(static_cast<const void*>(&body))));
}

inline int num_threads() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return static_cast<int>(count);
}

// Makes the device of a tensor current for as long as it lives.
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

// The stream that kernels on the device of `tensor` go to; null where there is no CUDA.
inline void* current_stream([[maybe_unused]] const Tensor& tensor) {
  void* stream = nullptr;
#ifdef USE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#endif
  return stream;
}

}  // namespace fflfast
