// The launches of the plain kernel, of the count of rows and of the scaling of gradients, and the plan of the on-chip
// kernel.
#include "distill_loss_group.cuh"
#include "distill_loss_sweeps.cuh"

#include "count_rows.cuh"
#include "distill_launch.h"
#include "launch_policy.h"
#include "scale_gradients.cuh"

namespace fflfast::cuda {

namespace {

// False where the graph has more edges than a kernel's arguments have room for.
template <class A>
bool sweep_table(const double* flat, SweepTable<A>* table) {
  GraphOf<A> graph;
  if (!read_graph(flat, &graph) || graph.num_edges > kSweepEdges<A>) return false;
  *table = {};
  table->num_logits = graph.num_logits;
  table->num_mixtures = graph.num_mixtures;
  table->num_edges = graph.num_edges;
  for (int i = 0; i < graph.num_logits; ++i) table->ce_weight[i] = graph.ce_weight[i];
  for (int v = 0; v < graph.num_mixtures; ++v)
    for (int i = 0; i < graph.num_logits; ++i) table->mixture[v][i] = graph.mixture[v][i];
  for (int e = 0; e < graph.num_edges; ++e) {
    table->weight[e] = graph.edge[e].weight;
    table->teacher[e] = graph.edge[e].teacher;
    table->student[e] = graph.edge[e].student;
    table->detach[e] = graph.edge[e].detach;
    table->trainable |= !graph.edge[e].detach;
    table->tempered |= 1u << graph.edge[e].teacher | 1u << graph.edge[e].student;
  }
  return true;
}

}  // namespace

bool plan_rows(const Graph& graph, const Operands& o, int element_size, const simt::DeviceProperties& device,
               Geometry* geometry) {
  const int m = graph.num_logits, v = held_mixtures(m, graph.num_mixtures), d = m + v;
  if (v < 0 || o.target_eps != 0.0) return false;
  uint32_t pairs = 0;
  for (int e = 0; e < graph.num_edges; ++e) {
    const auto& edge = graph.edge[e];
    const uint32_t bit = 1u << (edge.teacher * m + edge.student);
    if (!edge.detach || edge.teacher == edge.student || (pairs & bit)) return false;
    pairs |= bit;
  }
  const int numbers = d + m + d * m, record = numbers + d + 2 * m + 1;  // as RowOnChip has them
  const auto bytes = [&](int lanes, int block, int cluster) {
    return RowsLayout(lanes, block, cluster, 2 + o.num_terms, record, numbers, m, o.classes, element_size).bytes();
  };
  return rows_geometry(o.rows, o.classes, element_size, device, bytes, geometry);
}

template <class T>
bool plan_sweeps(const double* flat, const Operands& o, const simt::DeviceProperties& device, Geometry* geometry) {
  using A = Wide<T>;
  SweepTable<A> table;
  if (!sweep_table(flat, &table)) return false;
  const auto bytes = [&](int block) { return SweepLayout<A>(table, o.num_terms, block, o.writes_gradients).bytes(); };
  return sweeps_geometry(o.rows, o.classes, device, bytes, geometry);
}

template <class T>
void launch_sweeps(const double* flat, const Operands& o, const Geometry& g, void* stream) {
  SweepTable<Wide<T>> table;
  sweep_table(flat, &table);
  simt::launch({g.grid, g.block, g.cluster, g.shared, stream}, distill_sweeps<T>, o, table);
}

void launch_count(const Operands& o, int64_t grid, int64_t* count, void* stream) {
  constexpr int kBlock = 256;
  simt::launch({grid, kBlock, 1, sizeof(int64_t) * (kBlock / simt::kWarpSize + 1), stream}, count_rows, o, count);
}

template <class T>
void launch_scale(const Number& grad_loss, void* const* gradients, const int64_t* sizes, int count,
                  const simt::DeviceProperties& device, void* stream) {
  Scaling scaling{};
  scaling.grad_loss = grad_loss;
  int64_t elements = 0;
  for (int i = 0; i < count; ++i) {
    scaling.gradients[i] = gradients[i];
    scaling.sizes[i] = sizes[i];
    elements = sizes[i] > elements ? sizes[i] : elements;
  }
  const Geometry g = scale_geometry(elements, sizeof(T), device);
  simt::launch({g.grid, g.block, g.cluster, g.shared, stream}, scale_gradients<T>, scaling);
}

#define FFLFAST_INSTANTIATE(T)                                                                                  \
  template bool plan_sweeps<T>(const double*, const Operands&, const simt::DeviceProperties&, Geometry*);        \
  template void launch_sweeps<T>(const double*, const Operands&, const Geometry&, void*);                        \
  template void launch_scale<T>(const Number&, void* const*, const int64_t*, int, const simt::DeviceProperties&, \
                                void*);
FFLFAST_INSTANTIATE(float)
FFLFAST_INSTANTIATE(double)
FFLFAST_INSTANTIATE(simt::BFloat16)
FFLFAST_INSTANTIATE(simt::Half)

}  // namespace fflfast::cuda
