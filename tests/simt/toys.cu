// Kernels that need each of their sites, on which the emulator itself is tested (tests/test_simt.py).
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "simt.h"

namespace fflfast::simt {
namespace {

// Σ over all lanes by shared memory alone, a tree with a barrier per level.
FFLFAST_KERNEL void block_sum(const float* in, float* out) {
  float* partial = shared_memory<float>();
  const int t = thread_index();
  partial[t] = in[block_index() * block_size() + t];
  sync_block<1>();
  for (int half = block_size() / 2; half > 0; half /= 2) {
    if (t < half) partial[t] += partial[t + half];
    sync_block<2>();
  }
  out[block_index() * block_size() + t] = partial[0];
}

// Σ over a warp through the lanes, the warps' sums through shared memory that two rounds share.
FFLFAST_KERNEL void shuffle_sum(const float* in, float* out) {
  float* partial = shared_memory<float>();
  const int t = thread_index(), warps = block_size() / kWarpSize;
  for (int round = 0; round < 2; ++round) {
    float sum = in[(2 * block_index() + round) * block_size() + t];
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shuffle_xor<11>(sum, mask);
    if (lane_index() == 0) partial[warp_index()] = sum;
    sync_block<12>();
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += partial[w];
    out[(2 * block_index() + round) * block_size() + t] = shuffle_from<13>(lane_index() == 5 ? sum : -1.0f, 5);
    sync_block<14>();
  }
}

// Each warp reverses its numbers through its own part of shared memory.
FFLFAST_KERNEL void warp_reverse(const double* in, double* out) {
  double* mine = shared_memory<double>() + warp_index() * kWarpSize;
  const int64_t at = block_index() * block_size() + thread_index();
  mine[lane_index()] = in[at];
  sync_warp<21>();
  out[at] = mine[kWarpSize - 1 - lane_index()];
}

// Each block adds its sum to the memory of the cluster's block 0, which writes the total.
FFLFAST_KERNEL void cluster_sum(const float* in, float* out) {
  float* sums = shared_memory<float>();
  float sum = in[block_index() * block_size() + thread_index()];
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shuffle_xor<31>(sum, mask);
  sync_cluster<32>();
  if (thread_index() == 0) cluster_map(sums, 0)[cluster_rank()] = sum;
  sync_cluster<33>();
  float total = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) total += cluster_map(sums, 0)[rank];
  out[block_index() * block_size() + thread_index()] = total;
  sync_cluster<34>();
}

// Doubles numbers that come in stages of four a thread, one stage ahead, read by the neighbouring thread.
FFLFAST_KERNEL void pipeline(const float* in, float* out, int stages) {
  float* buffer = shared_memory<float>();
  const int t = thread_index(), next = (t + 1) % block_size(), width = 4 * block_size();
  const auto fetch = [&](int stage) {
    if (stage < stages) copy_async<16>(buffer + (stage % 2) * width + 4 * t, in + stage * width + 4 * t);
    copy_async_commit();
  };
  fetch(0);
  for (int stage = 0; stage < stages; ++stage) {
    fetch(stage + 1);
    copy_async_wait<41, 1>();
    sync_block<42>();
    Pack<float, 4> pack = load_cached<float, 4>(buffer + (stage % 2) * width + 4 * next);
    FFLFAST_UNROLL for (int i = 0; i < 4; ++i) pack[i] *= 2;
    store_streaming(out + stage * width + 4 * next, pack);
    sync_block<43>();
  }
}

// The block that finishes last adds up what all have written; the counter is back at 0 for the next launch.
FFLFAST_KERNEL void last_block_sum(const float* in, float* partial, float* out, unsigned* counter, int counts_first) {
  unsigned* ticket = shared_memory<unsigned>();
  const int t = thread_index(), warps = block_size() / kWarpSize;
  const auto limit = static_cast<unsigned>(grid_size() - 1);
  float sum = in[block_index() * block_size() + t];
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shuffle_xor<51>(sum, mask);
  if (counts_first && t == 0) *ticket = atomic_inc_wrap(counter, limit);  // wrong: the sums must be there before
  if (lane_index() == 0) partial[block_index() * warps + warp_index()] = sum;
  fence_device();
  sync_block<52>();
  if (!counts_first && t == 0) *ticket = atomic_inc_wrap(counter, limit);
  sync_block<53>();
  if (*ticket != limit || t != block_size() - 1) return;
  fence_device();
  float total = 0;
  for (int64_t i = 0; i < grid_size() * warps; ++i) total += load_device<float, 1>(partial + i)[0];
  *out = total;
}

FFLFAST_KERNEL void approximations(const float* in, float* powers, float* logarithms) {
  const int64_t at = block_index() * block_size() + thread_index();
  powers[at] = exp2_approx(in[at]);
  logarithms[at] = log2_approx(in[at]);
}

#ifdef FFLFAST_EMULATE  // what only the emulator reports
__attribute__((noinline)) float fill_large_frame() {
  volatile char large[72 * 1024];
  for (size_t i = sizeof(large); i-- > 0;) large[i] = 1;
  return static_cast<float>(large[0]);
}

FFLFAST_KERNEL void misbehaving(int how, float* out) {
  float* memory = shared_memory<float>();
  if (how == 0 && thread_index() >= 40) return;
  if (how == 1 && warp_index() == 1) sync_block<61>();
  if (how == 2 && thread_index() == 3) memory[block_size()] = 1;
  if (how == 3) store_streaming(out + 1 + 4 * thread_index(), Pack<float, 4>{});
  if (how == 4) cluster_map(memory, cluster_size());
  if (how == 5 && thread_index() == 40) out[0] = fill_large_frame();
  sync_block<62>();
}
#endif

}  // namespace

extern "C" {
#define EXPORTED __attribute__((visibility("default")))

// 0, or 1 where the launch threw; `message` (200 bytes) then says what.
EXPORTED int toy(const char* name, Launch launch, const void* in, void* out, void* partial, void* counter, int option,
                 char* message) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  const auto* floats = static_cast<const float*>(in);
  auto* results = static_cast<float*>(out);
  try {
    if (is("block_sum")) simt::launch(launch, block_sum, floats, results);
    if (is("shuffle_sum")) simt::launch(launch, shuffle_sum, floats, results);
    if (is("warp_reverse"))
      simt::launch(launch, warp_reverse, static_cast<const double*>(in), static_cast<double*>(out));
    if (is("cluster_sum")) simt::launch(launch, cluster_sum, floats, results);
    if (is("pipeline")) simt::launch(launch, pipeline, floats, results, option);
    if (is("last_block_sum"))
      simt::launch(launch, last_block_sum, floats, static_cast<float*>(partial), results,
                   static_cast<unsigned*>(counter), option);
    if (is("approximations")) simt::launch(launch, approximations, floats, results, static_cast<float*>(partial));
#ifdef FFLFAST_EMULATE
    if (is("misbehaving")) simt::launch(launch, misbehaving, option, results);
#endif
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), 199);
    return 1;
  }
  return 0;
}

#ifdef FFLFAST_EMULATE  // device functions, called from the host
EXPORTED void widen(const uint16_t* bits, float* halves, float* bfloat16s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    halves[i] = convert<float>(Half{bits[i]});
    bfloat16s[i] = convert<float>(BFloat16{bits[i]});
  }
}

EXPORTED void narrow(const float* values, uint16_t* halves, uint16_t* bfloat16s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    halves[i] = convert<Half>(values[i]).bits;
    bfloat16s[i] = convert<BFloat16>(values[i]).bits;
  }
}
#endif
}

}  // namespace fflfast::simt
