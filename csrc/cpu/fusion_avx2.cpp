// The fusion's kernels for AVX2 with FMA; empty elsewhere.
#include "fusion_plan.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FFLFAST_ISA avx2
#define FFLFAST_VECTOR_BYTES 32
#include "fusion_kernels.h"

namespace fflfast {
const FusionKernels* avx2_fusion() { return &avx2::kFusion; }
}  // namespace fflfast
#else
namespace fflfast {
const FusionKernels* avx2_fusion() { return nullptr; }
}  // namespace fflfast
#endif
