// A distillation graph as the kernels read it: a small table passed by value, at most 4 KB with a kernel's other
// arguments. Python builds the flat form once per graph (fflfast/ops/native.py); this header is its only reader.
#pragma once

#include <cstdint>

namespace fflfast {

constexpr int kMaxLogits = 16;
constexpr int kMaxMixtures = 16;
constexpr int kMaxEdges = 240;

template <class Weight>
struct EdgeOf {
  uint8_t teacher;  // any of the M + V distributions
  uint8_t student;  // any of the M logits tensors
  uint8_t detach;
  Weight weight;
};

// Weight is the accumulation type: float64 logits are held against float64 to the last digits, so that a mean of
// three must not be rounded to float32. The float table takes 3.1 KB, the double one 6 KB.
template <class Weight>
struct GraphOf {
  int32_t num_logits;    // M
  int32_t num_mixtures;  // V
  int32_t num_edges;     // E
  Weight ce_weight[kMaxLogits];
  Weight mixture[kMaxMixtures][kMaxLogits];
  EdgeOf<Weight> edge[kMaxEdges];

  // Row statistics of the base form, `width()` numbers a row: the maximum of each distribution's logits, its
  // Σ_c exp((u − max)/T), each logits tensor's Σ_c exp(z − max), and each trainable edge's ⟨p_t, ℓ⟩. Entries that a
  // graph does not use are zero. A flat statistics tensor begins with n, the number of counted rows (at least 1).
  int num_distributions() const { return num_logits + num_mixtures; }
  int maximum_at(int d) const { return d; }
  int tempered_sum_at(int d) const { return num_distributions() + d; }
  int plain_sum_at(int i) const { return 2 * num_distributions() + i; }
  int ratio_at(int e) const { return 2 * num_distributions() + num_logits + e; }
  int width() const { return 2 * num_distributions() + num_logits + num_edges; }
};

using Edge = EdgeOf<float>;
using Graph = GraphOf<float>;

// The flat form, float64: M, V, E, then ce (M), mixtures (V·M), edges (E × teacher, student, weight, detach).
inline int64_t flat_size(const double* flat) {
  return 3 + static_cast<int64_t>(flat[0]) + static_cast<int64_t>(flat[0] * flat[1]) + 4 * static_cast<int64_t>(flat[2]);
}

// False where the graph is larger than the table.
template <class Weight>
inline bool read_graph(const double* flat, GraphOf<Weight>* graph) {
  const int m = static_cast<int>(flat[0]), v = static_cast<int>(flat[1]), e = static_cast<int>(flat[2]);
  if (m > kMaxLogits || v > kMaxMixtures || e > kMaxEdges) return false;
  *graph = GraphOf<Weight>{};
  graph->num_logits = m;
  graph->num_mixtures = v;
  graph->num_edges = e;
  flat += 3;
  for (int i = 0; i < m; ++i) graph->ce_weight[i] = static_cast<Weight>(*flat++);
  for (int k = 0; k < v; ++k)
    for (int i = 0; i < m; ++i) graph->mixture[k][i] = static_cast<Weight>(*flat++);
  for (int k = 0; k < e; ++k, flat += 4)
    graph->edge[k] = {static_cast<uint8_t>(flat[0]), static_cast<uint8_t>(flat[1]), static_cast<uint8_t>(flat[3]),
                      static_cast<Weight>(flat[2])};
  return true;
}

}  // namespace fflfast
