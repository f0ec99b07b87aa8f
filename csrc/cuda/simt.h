// Everything in a kernel that is not plain C++: one interface with two bodies, so that the same kernels run on a GPU
// (nvcc, sm_80 and later) and in the test suite on a host without one (macro FFLFAST_EMULATE, plain C++).
//
// A kernel is a `void` function template marked FFLFAST_KERNEL; it takes its arguments by value (4 KB at most, large
// structs as `const FFLFAST_GRID_CONSTANT T`), has no static shared memory and no early return before a barrier or a
// warp intrinsic: all threads of a block reach each barrier, all 32 lanes of a warp each warp intrinsic.
// SITE is a number of the call's own within its library: the tests skip one site at a time and must see a wrong result.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FFLFAST_EMULATE
#define FFLFAST_KERNEL static
#define FFLFAST_DEVICE inline
#define FFLFAST_HOST_DEVICE inline
#define FFLFAST_GRID_CONSTANT
#define FFLFAST_LAUNCH_BOUNDS(...)
#define FFLFAST_UNROLL
#define FFLFAST_UNROLL_BY(n)
#define FFLFAST_ROLLED
#else
#ifndef __CUDACC__
#error "csrc/cuda needs nvcc, or FFLFAST_EMULATE to run on the host; compile CPU code without this header"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FFLFAST_KERNEL static __global__
#define FFLFAST_DEVICE __device__ __forceinline__
#define FFLFAST_HOST_DEVICE __host__ __device__ __forceinline__
#define FFLFAST_GRID_CONSTANT __grid_constant__
#define FFLFAST_LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define FFLFAST_PRAGMA(text) _Pragma(#text)
#define FFLFAST_UNROLL _Pragma("unroll")
#define FFLFAST_UNROLL_BY(n) FFLFAST_PRAGMA(unroll n)
#define FFLFAST_ROLLED _Pragma("unroll 1")  // where unrolling would only make code
#endif

namespace fflfast::simt {

constexpr int kWarpSize = 32;

// Where a thread stands: its index in the block, the block's in the (one-dimensional) grid and in its cluster.
FFLFAST_DEVICE int thread_index();
FFLFAST_DEVICE int block_size();
FFLFAST_DEVICE int64_t block_index();
FFLFAST_DEVICE int64_t grid_size();
FFLFAST_DEVICE unsigned cluster_rank();
FFLFAST_DEVICE unsigned cluster_size();
FFLFAST_DEVICE int lane_index() { return static_cast<int>(static_cast<unsigned>(thread_index()) % kWarpSize); }
FFLFAST_DEVICE int warp_index() { return static_cast<int>(static_cast<unsigned>(thread_index()) / kWarpSize); }

// Barriers; what threads wrote to shared (sync_cluster: also distributed shared) memory before one is seen after it.
template <int SITE>
FFLFAST_DEVICE void sync_block();
template <int SITE>
FFLFAST_DEVICE void sync_warp();
template <int SITE>
FFLFAST_DEVICE void sync_cluster();

// The value of lane (own lane ^ lane_mask), or of `lane` (taken modulo 32). T: a 4- or 8-byte number.
template <int SITE, class T>
FFLFAST_DEVICE T shuffle_xor(T value, int lane_mask);
template <int SITE, class T>
FFLFAST_DEVICE T shuffle_from(T value, int lane);

// The block's dynamic shared memory (Launch::shared bytes, 128-byte aligned, not initialised), and the same place in
// the shared memory of the cluster's block `rank`. A block's memory exists from its first to its last instruction:
// a cluster synchronises before it first reaches into another block and after the last time.
template <class T>
FFLFAST_DEVICE T* shared_memory();
template <class T>
FFLFAST_DEVICE T* cluster_map(T* local, unsigned rank);

// One instruction each: 2^x to a relative error of 2^-22, log2 x to 2^-22 of the larger of its value and 1.
FFLFAST_DEVICE float exp2_approx(float x);
FFLFAST_DEVICE float log2_approx(float x);

// *address = (*address >= limit) ? 0 : *address + 1; returns the old value.
FFLFAST_DEVICE unsigned atomic_inc_wrap(unsigned* address, unsigned limit);
FFLFAST_DEVICE void fence_device();

// Copies of 4, 8 or 16 bytes from global to shared memory that arrive at the wait: it returns when all but the thread's
// N latest committed groups are there; other threads see them after a barrier.
template <int BYTES>
FFLFAST_DEVICE void copy_async(void* shared, const void* global);
FFLFAST_DEVICE void copy_async_commit();
template <int SITE, int N>
FFLFAST_DEVICE void copy_async_wait();

// N values that move as one access of 2 to 16 bytes, aligned to its size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16 && (sizeof(T) * N & (sizeof(T) * N - 1)) == 0, "an access is 2, 4, 8 or 16 bytes");
  T value[N];
  FFLFAST_HOST_DEVICE T& operator[](int i) { return value[i]; }
  FFLFAST_HOST_DEVICE const T& operator[](int i) const { return value[i]; }
};

// Global memory. cached: read-only during the launch, wanted again soon. streaming: read-only, or never read again in
// this launch; leaves the caches first. device: what other blocks may have written in this launch (past the L1 cache).
template <class T, int N>
FFLFAST_DEVICE Pack<T, N> load_cached(const T* address);
template <class T, int N>
FFLFAST_DEVICE Pack<T, N> load_streaming(const T* address);
template <class T, int N>
FFLFAST_DEVICE Pack<T, N> load_device(const T* address);
template <class T, int N>
FFLFAST_DEVICE void store_streaming(T* address, const Pack<T, N>& pack);

// Half and BFloat16 are storage: numbers are float or double. Rounds to nearest, ties to even; a NaN stays a NaN.
struct alignas(2) Half {
  uint16_t bits;
};
struct alignas(2) BFloat16 {
  uint16_t bits;
};
template <class To, class From>
FFLFAST_DEVICE To convert(From value);

// c += a·b for a whole warp: a is 16 × K, b K × 8, c 16 × 8 in float32. T: BFloat16 or Half, K = 16 with two numbers a
// word, the lower half first; float, K = 8, of which the tensor cores see the tf32 part (round it before). What a lane
// holds, with g = lane / 4, t = lane % 4, and k(t) = {2t, 2t + 1} for 16 bits, t for tf32:
//   a[0] row g, a[1] row g + 8, columns k(t);  a[2], a[3] the same rows, columns k(t) + K/2
//   b[0] rows k(t), b[1] rows k(t) + K/2, column g;  c[0], c[1] row g, c[2], c[3] row g + 8, columns 2t and 2t + 1
template <int SITE, class T>
FFLFAST_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Four matrices of 8 × 8 16-bit numbers from shared memory. Lane l names row l % 8 of matrix l / 8, 16 bytes, aligned;
// out[j] holds of matrix j row g, columns 2t and 2t + 1, or where TRANSPOSED column g, rows 2t and 2t + 1.
template <int SITE, bool TRANSPOSED>
FFLFAST_DEVICE void load_matrices(uint32_t (&out)[4], const void* row);

// The bits of the nearest tf32 number (10 bits of fraction), ties away from zero.
FFLFAST_DEVICE uint32_t round_to_tf32(float value);

// A launch on `stream` (a cudaStream_t). shared: dynamic shared memory in bytes; cluster: blocks a cluster, 1 for none.
struct Launch {
  int64_t grid = 1;
  int block = 1;
  int cluster = 1;
  size_t shared = 0;
  void* stream = nullptr;
};

// Throws std::runtime_error where the launch is refused.
template <class... Parameters, class... Arguments>
void launch(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments);

struct DeviceProperties {
  int sm_count;
  int capability;           // 80, 90, 100 …
  size_t shared_per_block;  // most dynamic shared memory a block can have
};
const DeviceProperties& device_properties(int device);

void* current_stream(int device);
bool is_capturing(void* stream);

}  // namespace fflfast::simt

#ifdef FFLFAST_EMULATE
#include "simt_host.h"  // tests/simt
#else
#include "simt_cuda.h"
#endif
