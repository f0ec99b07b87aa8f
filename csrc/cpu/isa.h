// Which instruction set the kernels run with: 0 baseline, 1 AVX2, 2 AVX-512 (distill_loss.cpp chooses).
#pragma once

namespace fflfast {

int isa_level();

}  // namespace fflfast
