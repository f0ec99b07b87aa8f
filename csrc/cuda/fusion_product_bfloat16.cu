// The fusion's products of :BFloat16, true:bfloat16.
#include "fusion_product_launch.cuh"

namespace fflfast::cuda {

const ProductFunctions kBFloat16Products = product_functions<simt::BFloat16, true>();

}  // namespace fflfast::cuda
