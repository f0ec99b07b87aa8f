// The fusion's kernels for whatever the compiler takes for granted: SSE2 on x86-64, NEON on aarch64.
#define FFLFAST_ISA baseline
#define FFLFAST_VECTOR_BYTES 16
#include "fusion_kernels.h"

namespace fflfast {
const FusionKernels* baseline_fusion() { return &baseline::kFusion; }
}  // namespace fflfast
