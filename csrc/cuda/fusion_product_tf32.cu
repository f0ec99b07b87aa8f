// The fusion's products of float32 on the tensor cores, rounded to tf32.
#include "fusion_product_launch.cuh"

namespace fflfast::cuda {

const ProductFunctions kTf32Products = product_functions<float, true>();

}  // namespace fflfast::cuda
