// The library that the CUDA sources register their operators in: fflfast_cuda, or fflfast_emulated of their emulation,
// which takes CPU tensors.
#pragma once

#ifdef FFLFAST_EMULATE
#define FFLFAST_LIBRARY fflfast_emulated
#define FFLFAST_DISPATCH_KEY CPU
#else
#define FFLFAST_LIBRARY fflfast_cuda
#define FFLFAST_DISPATCH_KEY CUDA
#endif

// The macros of the registration paste their arguments, which must be expanded before. One source file of a library
// DEFINEs it, the others EXTEND it.
#define FFLFAST_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define FFLFAST_EXTEND(library, m) STABLE_TORCH_LIBRARY_FRAGMENT(library, m)
#define FFLFAST_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
