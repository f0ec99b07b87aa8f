// The kernels for whatever the compiler takes for granted: SSE2 on x86-64, NEON on aarch64.
#define FFLFAST_ISA baseline
#define FFLFAST_ISA_NAME "baseline"
#define FFLFAST_VECTOR_BYTES 16
#include "kernels.h"

namespace fflfast {
const Kernels* baseline_kernels() { return &baseline::kKernels; }
}  // namespace fflfast
