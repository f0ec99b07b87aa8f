// The on-chip kernels of bfloat16 logits.
#include "launch_rows.cuh"

namespace fflfast::cuda {

template void launch_rows<simt::BFloat16>(const Graph&, const Operands&, const Geometry&, void*);

}  // namespace fflfast::cuda
