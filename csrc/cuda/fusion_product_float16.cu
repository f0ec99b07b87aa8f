// The fusion's products of :Half, true:float16.
#include "fusion_product_launch.cuh"

namespace fflfast::cuda {

const ProductFunctions kFloat16Products = product_functions<simt::Half, true>();

}  // namespace fflfast::cuda
