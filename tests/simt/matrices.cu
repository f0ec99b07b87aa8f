// Kernels of one warp around the matrix intrinsics, on which their host bodies are tested (tests/test_simt_mma.py).
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "simt.h"

namespace fflfast::simt {
namespace {

struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};

// c += a·b once for each set of fragments, 32 of them a set.
template <class T>
FFLFAST_KERNEL void products(const Fragments* in, float* out, int count) {
  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int n = 0; n < count; ++n) {
    const Fragments& own = in[n * kWarpSize + lane_index()];
    FFLFAST_UNROLL for (int k = 0; k < 4; ++k) c[k] += own.c[k];
    multiply_add<1, T>(c, own.a, own.b);
  }
  FFLFAST_UNROLL for (int k = 0; k < 4; ++k) out[lane_index() * 4 + k] = c[k];
}

// Four matrices whose rows stand one after the other, `pitch` bytes apart in shared memory; a lane names another row
// than it has written.
template <bool TRANSPOSED>
FFLFAST_KERNEL void matrices(const unsigned char* in, uint32_t* out, int pitch) {
  unsigned char* rows = shared_memory<unsigned char>();
  const int written = kWarpSize - 1 - lane_index();
  for (int byte = 0; byte < 16; ++byte) rows[written * pitch + byte] = in[written * 16 + byte];
  sync_warp<2>();
  uint32_t held[4];
  load_matrices<3, TRANSPOSED>(held, rows + lane_index() * pitch);
  FFLFAST_UNROLL for (int k = 0; k < 4; ++k) out[lane_index() * 4 + k] = held[k];
}

FFLFAST_KERNEL void rounded(const float* in, uint32_t* out) {
  const int64_t at = block_index() * block_size() + thread_index();
  out[at] = round_to_tf32(in[at]);
}

}  // namespace

extern "C" {
#define EXPORTED __attribute__((visibility("default")))

// 0, or 1 where the launch threw; `option`: the number of products, or the pitch of a row.
EXPORTED int matrix_kernel(const char* name, const void* in, void* out, int64_t blocks, int option) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  const Launch launch{blocks, kWarpSize, 1, 4096, nullptr};
  const auto* fragments = static_cast<const Fragments*>(in);
  const auto* bytes = static_cast<const unsigned char*>(in);
  auto* words = static_cast<uint32_t*>(out);
  try {
    if (is("bfloat16")) simt::launch(launch, products<BFloat16>, fragments, static_cast<float*>(out), option);
    if (is("float16")) simt::launch(launch, products<Half>, fragments, static_cast<float*>(out), option);
    if (is("tf32")) simt::launch(launch, products<float>, fragments, static_cast<float*>(out), option);
    if (is("matrices")) simt::launch(launch, matrices<false>, bytes, words, option);
    if (is("transposed")) simt::launch(launch, matrices<true>, bytes, words, option);
    if (is("rounded")) simt::launch(launch, rounded, static_cast<const float*>(in), words);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
}

}  // namespace fflfast::simt
