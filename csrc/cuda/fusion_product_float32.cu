// The fusion's products of float32 in plain fma.
#include "fusion_product_launch.cuh"

namespace fflfast::cuda {

const ProductFunctions kFloat32Products = product_functions<float, false>();

}  // namespace fflfast::cuda
