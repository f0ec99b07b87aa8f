// The fusion's kernels for AVX-512 (F, DQ, BW, VL); empty elsewhere.
#include "fusion_plan.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// GCC 12 takes the undefined operand inside its own intrinsics for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define FFLFAST_ISA avx512
#define FFLFAST_VECTOR_BYTES 64
#include "fusion_kernels.h"

namespace fflfast {
const FusionKernels* avx512_fusion() { return &avx512::kFusion; }
}  // namespace fflfast
#else
namespace fflfast {
const FusionKernels* avx512_fusion() { return nullptr; }
}  // namespace fflfast
#endif
