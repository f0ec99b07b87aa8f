// Results of the fusion's operators: memory for them, and the chunks' partial sums as one, always in the chunks' order.
#pragma once

#include "memory.h"

namespace fflfast {

// Work below this many numbers is not worth waking a second thread for.
constexpr int64_t kGrain = 16384;

inline int64_t grain(int64_t numbers_each) { return numbers_each >= kGrain ? 1 : kGrain / numbers_each; }

inline float* numbers(const Tensor& tensor) { return static_cast<float*>(mutable_data(tensor)); }

inline Tensor make(std::initializer_list<int64_t> sizes, const Tensor& like) {
  Tensor out = empty(sizes, Dtype::kFloat32, like);
  advise_huge_pages(out, 4 * out.numel());
  return out;
}

// Mean and M2 of all chunks by Chan's formula, M2 = Σ M2ᵢ + Σ nᵢ(meanᵢ − mean)², in float64 and in the chunks' order.
template <class CountOf>
inline Tensor combine_moments(const double* partial, int64_t chunks, int64_t columns, const CountOf& count,
                              const Tensor& like) {
  Tensor out = make({2, columns}, like);
  float* to = numbers(out);
  double total = 0;
  for (int64_t k = 0; k < chunks; ++k) total += count(k);
  parallel_for(columns, grain(chunks), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double mean = 0, m2 = 0;
      for (int64_t k = 0; k < chunks; ++k) mean += count(k) * partial[2 * k * columns + c];
      mean /= total;
      for (int64_t k = 0; k < chunks; ++k) {
        const double off = partial[2 * k * columns + c] - mean;
        m2 += partial[(2 * k + 1) * columns + c] + count(k) * off * off;
      }
      to[c] = static_cast<float>(mean);
      to[columns + c] = m2 < 0 ? 0.0f : static_cast<float>(m2);
    }
  });
  return out;
}

// to(k, c) = Σ over chunks, in their order.
template <class Write>
inline void combine_sums(const double* partial, int64_t chunks, int64_t sums, int64_t columns, const Write& to) {
  parallel_for(sums * columns, grain(chunks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double total = 0;
      for (int64_t k = 0; k < chunks; ++k) total += partial[k * sums * columns + i];
      *to(i / columns, i % columns) = static_cast<float>(total);
    }
  });
}

}  // namespace fflfast
