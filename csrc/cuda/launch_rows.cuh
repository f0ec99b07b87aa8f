// The launch of the on-chip kernel: one file (distill_loss_<dtype>.cu) compiles it for one dtype.
#pragma once

#include "distill_launch.h"
#include "distill_loss_rows.cuh"

#include <stdexcept>

namespace fflfast::cuda {

template <int M, int V>
PairTable<M, V> pair_table(const Graph& graph) {
  PairTable<M, V> table{};
  for (int i = 0; i < M; ++i) table.ce_weight[i] = graph.ce_weight[i];
  for (int v = 0; v < graph.num_mixtures; ++v)
    for (int i = 0; i < M; ++i) {
      table.mixture[v][i] = graph.mixture[v][i];
      if (graph.mixture[v][i] != 0.0f) table.mixed |= 1u << (v * M + i);
    }
  table.distributions = graph.num_distributions();
  int term = 0;
  for (int i = 0; i < M; ++i) {
    if (graph.ce_weight[i] == 0.0f) continue;
    table.plain |= 1u << i;
    table.teacher[term] = kNoTeacher;
    table.student[term] = static_cast<uint8_t>(i);
    table.term_weight[term++] = graph.ce_weight[i];
  }
  for (int e = 0; e < graph.num_edges; ++e) {
    const auto& edge = graph.edge[e];
    const uint32_t bit = 1u << (edge.teacher * M + edge.student);
    table.weight[edge.teacher][edge.student] = edge.weight;
    table.pairs |= bit;
    if (edge.weight != 0.0f) table.live |= bit;
    table.tempered |= 1u << edge.teacher | 1u << edge.student;
    table.teacher[term] = edge.teacher;
    table.student[term] = edge.student;
    table.term_weight[term++] = edge.weight;
  }
  return table;
}

template <class T, int M, int V>
void launch_rows_of(const Graph& graph, const Operands& o, const Geometry& g, void* stream) {
  simt::launch({g.grid, g.block, g.cluster, g.shared, stream}, distill_rows<T, M, V>, o, pair_table<M, V>(graph),
               g.lanes);
}

template <class T>
void launch_rows(const Graph& graph, const Operands& o, const Geometry& geometry, void* stream) {
  switch (graph.num_logits * 10 + held_mixtures(graph.num_logits, graph.num_mixtures)) {
    case 10: return launch_rows_of<T, 1, 0>(graph, o, geometry, stream);
    case 21: return launch_rows_of<T, 2, 1>(graph, o, geometry, stream);
    case 22: return launch_rows_of<T, 2, 2>(graph, o, geometry, stream);
    case 31: return launch_rows_of<T, 3, 1>(graph, o, geometry, stream);
    case 33: return launch_rows_of<T, 3, 3>(graph, o, geometry, stream);
    case 41: return launch_rows_of<T, 4, 1>(graph, o, geometry, stream);
    case 44: return launch_rows_of<T, 4, 4>(graph, o, geometry, stream);
    default: throw std::runtime_error("fflfast: no on-chip kernel was compiled for this graph; this is a bug");
  }
}

}  // namespace fflfast::cuda
