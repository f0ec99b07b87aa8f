// The kernels for AVX-512 (F, DQ, BW, VL); empty elsewhere.
#include "plan.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// GCC 12 takes the undefined operand inside its own intrinsics for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define FFLFAST_ISA avx512
#define FFLFAST_ISA_NAME "avx512"
#define FFLFAST_VECTOR_BYTES 64
#include "kernels.h"

namespace fflfast {
const Kernels* avx512_kernels() { return &avx512::kKernels; }
}  // namespace fflfast
#else
namespace fflfast {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fflfast
#endif
