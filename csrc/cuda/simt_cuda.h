// The interface of simt.h on a GPU. Include simt.h instead.
#pragma once

#include <cuda_pipeline_primitives.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fflfast::simt {

constexpr unsigned kAllLanes = 0xffffffffu;

FFLFAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FFLFAST_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
FFLFAST_DEVICE int64_t block_index() { return blockIdx.x; }
FFLFAST_DEVICE int64_t grid_size() { return gridDim.x; }

// Before sm_90 a block is a cluster by itself.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
FFLFAST_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

FFLFAST_DEVICE unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

template <int SITE>
FFLFAST_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <class T>
FFLFAST_DEVICE T* cluster_map(T* local, unsigned rank) {
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(local), "r"(rank));
  return mapped;
}
#else
FFLFAST_DEVICE unsigned cluster_rank() { return 0; }
FFLFAST_DEVICE unsigned cluster_size() { return 1; }

template <int SITE>
FFLFAST_DEVICE void sync_cluster() {
  __syncthreads();
}

template <class T>
FFLFAST_DEVICE T* cluster_map(T* local, unsigned) {
  return local;
}
#endif

template <int SITE>
FFLFAST_DEVICE void sync_block() {
  __syncthreads();
}

template <int SITE>
FFLFAST_DEVICE void sync_warp() {
  __syncwarp();
}

template <int SITE, class T>
FFLFAST_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, value, lane_mask);
}

template <int SITE, class T>
FFLFAST_DEVICE T shuffle_from(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

template <class T>
FFLFAST_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char fflfast_shared_memory[];
  return reinterpret_cast<T*>(fflfast_shared_memory);
}

FFLFAST_DEVICE float exp2_approx(float x) {
  float result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

FFLFAST_DEVICE float log2_approx(float x) {
  float result;
  asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

FFLFAST_DEVICE unsigned atomic_inc_wrap(unsigned* address, unsigned limit) { return atomicInc(address, limit); }
FFLFAST_DEVICE void fence_device() { __threadfence(); }

template <int BYTES>
FFLFAST_DEVICE void copy_async(void* shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "an asynchronous copy moves 4, 8 or 16 bytes");
  __pipeline_memcpy_async(shared, global, BYTES);
}

FFLFAST_DEVICE void copy_async_commit() { __pipeline_commit(); }

template <int SITE, int N>
FFLFAST_DEVICE void copy_async_wait() {
  __pipeline_wait_prior(N);
}

// The one machine word (2, 4, 8 or 16 bytes) that a pack moves as.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <class T, int N>
using Word = typename WordOf<sizeof(T) * N>::type;

template <class T, int N>
union PackOrWord {
  Word<T, N> word;
  Pack<T, N> pack;
  FFLFAST_DEVICE explicit PackOrWord(const Word<T, N>& word) : word(word) {}
  FFLFAST_DEVICE explicit PackOrWord(const Pack<T, N>& pack) : pack(pack) {}
};

template <class T, int N>
FFLFAST_DEVICE Pack<T, N> load_cached(const T* address) {
  return PackOrWord<T, N>(__ldg(reinterpret_cast<const Word<T, N>*>(address))).pack;
}

template <class T, int N>
FFLFAST_DEVICE Pack<T, N> load_streaming(const T* address) {
  return PackOrWord<T, N>(__ldcs(reinterpret_cast<const Word<T, N>*>(address))).pack;
}

template <class T, int N>
FFLFAST_DEVICE Pack<T, N> load_device(const T* address) {
  return PackOrWord<T, N>(__ldcg(reinterpret_cast<const Word<T, N>*>(address))).pack;
}

template <class T, int N>
FFLFAST_DEVICE void store_streaming(T* address, const Pack<T, N>& pack) {
  __stcs(reinterpret_cast<Word<T, N>*>(address), PackOrWord<T, N>(pack).word);
}

template <class To, class From>
FFLFAST_DEVICE To convert(From value) {
  if constexpr (std::is_same_v<From, Half>) {
    return static_cast<To>(__half2float(__ushort_as_half(value.bits)));
  } else if constexpr (std::is_same_v<From, BFloat16>) {
    return static_cast<To>(__bfloat162float(__ushort_as_bfloat16(value.bits)));
  } else if constexpr (std::is_same_v<To, Half>) {
    return To{__half_as_ushort(__float2half_rn(static_cast<float>(value)))};
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return To{__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)))};
  } else {
    return static_cast<To>(value);
  }
}

template <int SITE, class T>
FFLFAST_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define FFLFAST_MULTIPLY_ADD(shape_and_types)                                                                \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, BFloat16>) {
    FFLFAST_MULTIPLY_ADD("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, Half>) {
    FFLFAST_MULTIPLY_ADD("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, float>, "the tensor cores take bfloat16, float16 and tf32 here");
    FFLFAST_MULTIPLY_ADD("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef FFLFAST_MULTIPLY_ADD
}

template <int SITE, bool TRANSPOSED>
FFLFAST_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define FFLFAST_LOAD_MATRICES(transposed)                                                                    \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 {%0, %1, %2, %3}, [%4];"              \
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])                                      \
               : "r"(address)                                                                                \
               : "memory")
  if constexpr (TRANSPOSED) {
    FFLFAST_LOAD_MATRICES(".trans");
  } else {
    FFLFAST_LOAD_MATRICES("");
  }
#undef FFLFAST_LOAD_MATRICES
}

FFLFAST_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // an error that no launch here caused must not be reported to the next one
  throw std::runtime_error(std::string("fflfast: CUDA could not ") + what + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Fills in a launch's configuration; `attribute` holds the cluster size, and must live as long as the configuration.
inline cudaLaunchConfig_t configure(const Launch& launch, const void* kernel, cudaLaunchAttribute* attribute) {
  constexpr size_t kSharedWithoutOptIn = 48 * 1024;
  constexpr int kPortableCluster = 8;
  if (launch.shared > kSharedWithoutOptIn)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared)),
          ("give a kernel " + std::to_string(launch.shared) + " bytes of shared memory").c_str());
  if (launch.cluster > kPortableCluster)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          ("allow clusters of " + std::to_string(launch.cluster) + " blocks").c_str());
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.grid));
  config.blockDim = dim3(static_cast<unsigned>(launch.block));
  config.dynamicSmemBytes = launch.shared;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = static_cast<unsigned>(launch.cluster);
  attribute->val.clusterDim.y = 1;
  attribute->val.clusterDim.z = 1;
  config.attrs = attribute;
  config.numAttrs = launch.cluster > 1 ? 1 : 0;
  return config;
}

template <class... Parameters, class... Arguments>
void launch(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((size_t{0} + ... + sizeof(Parameters)) <= 4096, "a kernel takes at most 4 KB of arguments");
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configure(launch, reinterpret_cast<const void*>(kernel), &attribute);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess)
    check(error, ("launch a kernel of " + std::to_string(launch.grid) + " blocks of " + std::to_string(launch.block) +
                  " threads in clusters of " + std::to_string(launch.cluster) + " with " +
                  std::to_string(launch.shared) + " bytes of shared memory")
                     .c_str());
}

inline const DeviceProperties& device_properties(int device) {
  constexpr int kMaxDevices = 256;
  static std::once_flag known[kMaxDevices];
  static DeviceProperties properties[kMaxDevices];
  if (device < 0 || device >= kMaxDevices)
    throw std::runtime_error("fflfast: expected a CUDA device below " + std::to_string(kMaxDevices) + ", got " +
                             std::to_string(device));
  std::call_once(known[device], [device] {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "read a device's properties");
      return value;
    };
    const int major = attribute(cudaDevAttrComputeCapabilityMajor);
    properties[device] = {attribute(cudaDevAttrMultiProcessorCount),
                          10 * major + attribute(cudaDevAttrComputeCapabilityMinor),
                          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
  });
  return properties[device];
}

inline void* current_stream(int device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error("fflfast: torch has no current stream for CUDA device " + std::to_string(device));
  return stream;
}

inline bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "ask whether a stream is being captured");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace fflfast::simt
