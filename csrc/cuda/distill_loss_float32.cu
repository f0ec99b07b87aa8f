// The on-chip kernels of float32 logits.
#include "launch_rows.cuh"

namespace fflfast::cuda {

template void launch_rows<float>(const Graph&, const Operands&, const Geometry&, void*);

}  // namespace fflfast::cuda
