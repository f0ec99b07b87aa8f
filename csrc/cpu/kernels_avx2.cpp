// The kernels for AVX2 with FMA and F16C; empty elsewhere.
#include "plan.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FFLFAST_ISA avx2
#define FFLFAST_ISA_NAME "avx2"
#define FFLFAST_VECTOR_BYTES 32
#include "kernels.h"

namespace fflfast {
const Kernels* avx2_kernels() { return &avx2::kKernels; }
}  // namespace fflfast
#else
namespace fflfast {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fflfast
#endif
