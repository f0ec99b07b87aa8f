// The on-chip kernels of float16 logits.
#include "launch_rows.cuh"

namespace fflfast::cuda {

template void launch_rows<simt::Half>(const Graph&, const Operands&, const Geometry&, void*);

}  // namespace fflfast::cuda
