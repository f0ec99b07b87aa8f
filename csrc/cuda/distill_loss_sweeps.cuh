// The plain kernel: any graph of the table (up to 16 logits tensors), any number of classes, any dtype. One block a
// row; nothing of a row stays on chip but what the caches hold, so the row is swept again for each thing needed of it.
//
//   sweep 1, forwards:   m_d = max u_d, S_d = Σ exp((u_d − m_d)/T), R_i = Σ exp(z_i − m_i), online: when the maximum of
//                        a warp's part grows, its sums shrink by exp((old − new)/T)
//   sweep 2, backwards:  each edge's Σ_c q·ℓ and each ⟨p_t, ℓ⟩; Σ_c y'_c·(z_c − m) where y' is dense
//   sweep 3, forwards:   the gradients; the direction turns each time, so that a sweep begins with what the caches hold
//
// A warp takes kTile classes at a time and handles one distribution or edge after the other, which meets the tile in
// the L1 cache; sums of a warp stand in shared memory, as the graph's sizes are known at run time only.
// Bytes a row: M·C·e for each sweep (base forward 2 sweeps, backward 1 and as much written, fast form 3 and as much
// written) where the caches hold nothing of it. Launches: one.
#pragma once

#include "distill_loss_sweep_table.cuh"

namespace fflfast::cuda {

template <class T>
struct Sweep {
  using A = Wide<T>;
  static constexpr int kPerLane = 16;
  static constexpr int kTile = kPerLane * simt::kWarpSize;

  const Operands& o;
  const SweepTable<A>& g;
  const SweepLayout<A> at;
  const Scalars<A> s;
  double* totals;
  A* record;
  A* partial;  // of this warp
  A* staged;   // of this thread, at.threads apart
  int64_t row, index;

  FFLFAST_DEVICE A logit(int i, int64_t c) const {
    return simt::convert<A>(simt::load_cached<T, 1>(static_cast<const T*>(o.logits[i]) + row * o.stride[i] + c)[0]);
  }

  // u_d of class c; a mixture skips coefficients of zero, as 0 · (−inf) is NaN.
  FFLFAST_DEVICE A value(int d, int64_t c) const {
    if (d < g.num_logits) return logit(d, c);
    A u = A(0);
    for (int i = 0; i < g.num_logits; ++i) {
      const A a = g.mixture[d - g.num_logits][i];
      if (a != A(0)) u += a * logit(i, c);
    }
    return u;
  }

  FFLFAST_DEVICE A tempered(int d, int64_t c) const { return (value(d, c) - record[at.maximum(d)]) * s.tempered; }
  FFLFAST_DEVICE bool in_edge(int d) const { return g.tempered >> d & 1; }
  FFLFAST_DEVICE bool has_ce(int i) const { return g.ce_weight[i] != A(0); }
  FFLFAST_DEVICE bool dense_target() const { return o.target_kind == kSoftTarget || s.smoothing != A(0); }

  // Calls body(begin) for this warp's tiles, in the order of the sweep.
  template <class Body>
  FFLFAST_DEVICE void tiles(bool backwards, const Body& body) const {
    const int64_t count = (o.classes + kTile - 1) / kTile;
    for (int64_t k = simt::warp_index(); k < count; k += at.warps)
      body((backwards ? count - 1 - k : k) * kTile + simt::lane_index());
  }

  FFLFAST_DEVICE bool in_tile(int j, int64_t c) const { return j < kPerLane && c < o.classes; }

  // Adds one quantity's Σ over a tile to the warp's partial sum, which belongs to one lane alone.
  template <int SITE>
  FFLFAST_DEVICE void add(int place, A lane_sum) const {
    lane_sum = sum_of_warp<SITE>(lane_sum);
    if (simt::lane_index() == place % simt::kWarpSize) partial[place] += lane_sum;
  }

  FFLFAST_DEVICE void statistics() const {
    for (int k = simt::lane_index(); k < at.dense(0); k += simt::kWarpSize)
      partial[k] = k < at.distributions ? -infinity<A>() : A(0);
    simt::sync_warp<20>();
    tiles(false, [&](int64_t begin) {
      for (int d = 0; d < at.distributions; ++d) {
        const bool plain = d < g.num_logits && has_ce(d);
        if (!plain && !in_edge(d)) continue;
        const A before = partial[at.maximum(d)];
        A maximum = before;
        for (int64_t j = 0, c = begin; in_tile(j, c); ++j, c += simt::kWarpSize) maximum = larger(maximum, value(d, c));
        for (int mask = 16; mask > 0; mask >>= 1) maximum = larger(maximum, simt::shuffle_xor<21>(maximum, mask));
        A sum = A(0), plain_sum = A(0);
        for (int64_t j = 0, c = begin; in_tile(j, c); ++j, c += simt::kWarpSize) {
          const A u = value(d, c);
          if (u == -infinity<A>()) continue;  // nothing, also where all that was seen is −inf; a NaN stays one
          if (in_edge(d)) sum += exp2_of((u - maximum) * s.tempered, s.few);
          if (plain) plain_sum += exp2_of((u - maximum) * static_cast<A>(kLog2E), s.few);
        }
        sum = sum_of_warp<22>(sum);
        if (plain) plain_sum = sum_of_warp<23>(plain_sum);
        if (simt::lane_index() == 0) {
          partial[at.maximum(d)] = maximum;
          partial[at.sum(d)] = rescaled(partial[at.sum(d)], before, maximum, s.tempered) + sum;
          if (plain)
            partial[at.plain_sum(d)] = rescaled(partial[at.plain_sum(d)], before, maximum, A(kLog2E)) + plain_sum;
        }
      }
      simt::sync_warp<24>();
    });
    simt::sync_block<25>();
    const int line = at.record();
    const A* first = partial - simt::warp_index() * line;
    for (int d = simt::thread_index(); d < at.distributions; d += at.threads) {
      A maximum = -infinity<A>();
      for (int w = 0; w < at.warps; ++w) maximum = larger(maximum, first[w * line + at.maximum(d)]);
      const bool plain = d < g.num_logits && has_ce(d);
      A sum = A(0), plain_sum = A(0);
      for (int w = 0; w < at.warps; ++w) {
        const A* own = first + w * line;
        sum += rescaled(own[at.sum(d)], own[at.maximum(d)], maximum, s.tempered);
        if (plain) plain_sum += rescaled(own[at.plain_sum(d)], own[at.maximum(d)], maximum, A(kLog2E));
      }
      // A row without a single class has no softmax.
      if (maximum == -infinity<A>()) sum = plain_sum = not_a_number<A>();
      record[at.maximum(d)] = plain || in_edge(d) ? maximum : A(0);
      record[at.sum(d)] = in_edge(d) ? sum : A(0);
      if (d < g.num_logits) record[at.plain_sum(d)] = plain ? plain_sum : A(0);
    }
    simt::sync_block<26>();
  }

  // A sum relative to the maximum `before`, relative to `after`; an empty one has no maximum.
  FFLFAST_DEVICE static A rescaled(A sum, A before, A after, A scale) {
    return sum == A(0) ? sum : sum * exp2_of((before - after) * scale, true);
  }

  // q·ℓ and p·ℓ of one edge and class.
  FFLFAST_DEVICE void log_ratio(int e, int64_t c, A* q_ratio, A* p_ratio) const {
    const int t = g.teacher[e], i = g.student[e];
    const A a = tempered(t, c), p = exp2_of(a, s.few) / record[at.sum(t)], q = p + s.eps;
    const A log_q = s.eps == A(0) ? a - log2_of(record[at.sum(t)]) : log2_of(q);
    const A ratio = (log_q - (tempered(i, c) - log2_of(record[at.sum(i)]))) * A(kLn2);
    *q_ratio = q == A(0) ? A(0) : q * ratio;
    *p_ratio = p == A(0) ? A(0) : p * ratio;
  }

  FFLFAST_DEVICE void terms() const {
    for (int k = simt::lane_index(); k < at.record(); k += simt::kWarpSize)
      if (k >= at.dense(0)) partial[k] = A(0);
    tiles(true, [&](int64_t begin) {
      for (int e = 0; e < at.edges; ++e) {
        A kl = A(0), ratio = A(0);
        for (int64_t j = 0, c = begin; in_tile(j, c); ++j, c += simt::kWarpSize) {
          A q_ratio, p_ratio;
          log_ratio(e, c, &q_ratio, &p_ratio);
          kl += q_ratio;
          ratio += p_ratio;
        }
        add<27>(at.kl(e), kl);
        if (!g.detach[e]) add<28>(at.ratio(e), ratio);
      }
      if (!dense_target() || o.target_kind == kNoTarget) return;
      A mass = A(0);
      for (int64_t j = 0, c = begin; in_tile(j, c); ++j, c += simt::kWarpSize)
        mass += o.target_kind == kSoftTarget ? soft_target(o, s, row, c) : A(0);
      add<29>(at.mass(), mass);
      for (int i = 0; i < at.logits; ++i) {
        if (!has_ce(i)) continue;
        A sum = A(0);
        for (int64_t j = 0, c = begin; in_tile(j, c); ++j, c += simt::kWarpSize) {
          const A y = o.target_kind == kSoftTarget ? soft_target(o, s, row, c) : A(1);
          if (y != A(0)) sum += y * (logit(i, c) - record[at.maximum(i)]);
        }
        add<30>(at.dense(i), sum);
      }
    });
    simt::sync_block<31>();
    const int line = at.record();
    const A* first = partial - simt::warp_index() * line;
    for (int k = at.dense(0) + simt::thread_index(); k < line; k += at.threads) {
      A sum = A(0);
      for (int w = 0; w < at.warps; ++w) sum += first[w * line + k];
      record[k] = sum;
    }
    simt::sync_block<32>();
  }

  // CE of logits i, and T²·KL of an edge.
  FFLFAST_DEVICE A ce_term(int i) const {
    const A log_sum = log2_of(record[at.plain_sum(i)]) * static_cast<A>(kLn2);
    if (o.target_kind == kSoftTarget) return record[at.mass()] * log_sum - record[at.dense(i)];
    const A right = log_sum - (logit(i, index) - record[at.maximum(i)]);
    if (s.smoothing == A(0)) return right;
    const A spread = log_sum - record[at.dense(i)] / static_cast<A>(o.classes);
    return (A(1) - s.smoothing) * right + s.smoothing * spread;
  }

  FFLFAST_DEVICE A kl_term(int e) const { return s.temperature * s.temperature * record[at.kl(e)]; }

  // Adds the row to the block's totals; thread 0 alone, in the order of the terms.
  FFLFAST_DEVICE void add_row(RowState state) const {
    if (simt::thread_index() != 0) return;
    A loss = A(0);
    int term = 0;
    const auto count = [&](A value, A weight) {
      if (state == RowState::kBad) value = not_a_number<A>();
      totals[2 + term++] += static_cast<double>(value);
      if (weight != A(0)) loss += weight * value;
    };
    if (state != RowState::kIgnored) {
      totals[0] += 1.0;
      const bool good = state == RowState::kCounted;
      for (int i = 0; i < at.logits; ++i)
        if (has_ce(i)) count(good ? ce_term(i) : A(0), s.ce_weight * g.ce_weight[i]);
      for (int e = 0; e < at.edges; ++e) count(good ? kl_term(e) : A(0), s.kl_weight * g.weight[e]);
      if (!good) loss = not_a_number<A>();
    }
    totals[1] += static_cast<double>(loss);
    if (o.reduction == kPerRow) static_cast<A*>(o.loss)[row] = loss;
  }

  // The statistics of csrc/distill_graph.h.
  FFLFAST_DEVICE A* line_of_statistics(const void* base) const {
    return static_cast<A*>(const_cast<void*>(base)) + 1 + row * o.statistics_width;
  }

  FFLFAST_DEVICE void save(bool counted) const {
    A* out = line_of_statistics(o.statistics_out);
    const int sums = at.dense(0);
    for (int k = simt::thread_index(); k < o.statistics_width; k += at.threads) {
      A value = A(0);
      if (counted) value = k < sums ? record[k] : g.detach[k - sums] ? A(0) : record[at.ratio(k - sums)];
      out[k] = value;
    }
  }

  FFLFAST_DEVICE void restore() const {
    const A* in = line_of_statistics(o.statistics_in);
    const int sums = at.dense(0);
    for (int k = simt::thread_index(); k < o.statistics_width; k += at.threads) {
      record[k < sums ? k : at.ratio(k - sums)] = in[k];
    }
    // Σ y' is not among the statistics: one warp sums it again.
    if (o.target_kind == kSoftTarget && simt::warp_index() == 0) {
      A mass = A(0);
      for (int64_t c = simt::lane_index(); c < o.classes; c += simt::kWarpSize) mass += soft_target(o, s, row, c);
      mass = sum_of_warp<33>(mass);
      if (simt::lane_index() == 0) record[at.mass()] = mass;
    }
    simt::sync_block<34>();
  }

  FFLFAST_DEVICE void write(int i, int64_t c, A gradient) const {
    if (!o.gradients[i]) return;
    simt::store_streaming<T, 1>(static_cast<T*>(o.gradients[i]) + row * o.classes + c,
                                Pack<T, 1>{{simt::convert<T>(gradient)}});
  }

  FFLFAST_DEVICE void fill_gradients(A number) const {
    for (int i = 0; i < at.logits; ++i)
      for (int64_t c = simt::thread_index(); c < o.classes; c += at.threads) write(i, c, number);
  }

  // The gradient of one class: staged columns hold p_d, then ∂/∂u_d of the edges, then (u_d − m_d)·log2(e)/T.
  FFLFAST_DEVICE void gradient(int64_t c, A scale) const {
    const auto p = [&](int d) -> A& { return staged[d * at.threads]; };
    const auto slope = [&](int d) -> A& { return staged[(at.distributions + d) * at.threads]; };
    const auto exponent = [&](int d) -> A& { return staged[(2 * at.distributions + d) * at.threads]; };
    for (int d = 0; d < at.distributions; ++d) {
      slope(d) = A(0);
      if (!in_edge(d)) continue;
      const A a = tempered(d, c);
      p(d) = exp2_of(a, s.few) / record[at.sum(d)];
      if (g.trainable) exponent(d) = a - log2_of(record[at.sum(d)]);
    }
    const A kept = A(1) + s.eps * static_cast<A>(o.classes);
    for (int e = 0; e < at.edges; ++e) {
      const int t = g.teacher[e], i = g.student[e];
      const A weight = s.kl_weight * s.temperature * g.weight[e];
      if (weight == A(0)) continue;
      slope(i) += weight * (kept * p(i) - (p(t) + s.eps));
      if (g.detach[e]) continue;
      const A mean = record[at.ratio(e)];
      const A log_q = s.eps == A(0) ? exponent(t) : log2_of(p(t) + s.eps);
      // A student without mass where the teacher has some: the loss is +inf there and has no gradient.
      A pull = mean - mean != A(0) ? not_a_number<A>() : A(0);
      if (p(t) != A(0)) pull = p(t) * ((log_q - exponent(i)) * A(kLn2) - mean) + pull;
      slope(t) += weight * pull;
    }
    for (int i = 0; i < at.logits; ++i) {
      A sum = slope(i);
      for (int v = 0; v < g.num_mixtures; ++v)
        if (g.mixture[v][i] != A(0)) sum += g.mixture[v][i] * slope(at.logits + v);
      const A weight = s.ce_weight * g.ce_weight[i];
      if (weight != A(0)) {
        A y = o.target_kind == kSoftTarget ? soft_target(o, s, row, c) : s.smoothing / static_cast<A>(o.classes);
        if (c == index) y += A(1) - s.smoothing;
        const A mass = o.target_kind == kSoftTarget ? record[at.mass()] : A(1);
        const A r = exp2_of((logit(i, c) - record[at.maximum(i)]) * A(kLog2E), s.few) / record[at.plain_sum(i)];
        sum += weight * (mass * r - y);
      }
      write(i, c, sum * scale);
    }
  }
};

template <class T>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(256, 2)
void distill_sweeps(const FFLFAST_GRID_CONSTANT Operands o, const FFLFAST_GRID_CONSTANT SweepTable<Wide<T>> g) {
  using A = Wide<T>;
  const SweepLayout<A> at(g, o.num_terms, simt::block_size(), o.writes_gradients);
  unsigned char* shared = simt::shared_memory<unsigned char>();
  A* partials = reinterpret_cast<A*>(shared + at.partial_offset());
  Sweep<T> sweep{o, g, at, read_scalars<A>(o), reinterpret_cast<double*>(shared),
                 reinterpret_cast<A*>(shared + at.record_offset()), partials + simt::warp_index() * at.record(),
                 reinterpret_cast<A*>(shared + at.staged_offset()) + simt::thread_index(), 0, 0};
  for (int t = simt::thread_index(); t < at.columns; t += at.threads) sweep.totals[t] = 0.0;
  const A weight = weight_of_row<36, A>(o, reinterpret_cast<int64_t*>(partials));
  simt::sync_block<38>();
  for (sweep.row = simt::block_index(); sweep.row < o.rows; sweep.row += simt::grid_size()) {
    const RowState state = row_state(o, sweep.row, &sweep.index);
    const bool counted = state == RowState::kCounted;
    if (counted && o.statistics_in) sweep.restore();
    if (counted && !o.statistics_in) {
      sweep.statistics();
      sweep.terms();
    }
    if (!o.statistics_in) sweep.add_row(state);
    if (o.statistics_out) sweep.save(counted);
    if (o.writes_gradients) {
      const A scale = weight * grad_of_row<A>(o, sweep.row);
      if (counted)
        sweep.tiles(false, [&](int64_t begin) {
          for (int64_t j = 0, c = begin; sweep.in_tile(j, c); ++j, c += simt::kWarpSize) sweep.gradient(c, scale);
        });
      else
        sweep.fill_gradients(state == RowState::kBad ? not_a_number<A>() : A(0));
    }
    simt::sync_block<39>();  // the next row overwrites the record
  }
  if (o.statistics_in) return;
  finish<40, A>(o, sweep.totals, simt::block_index(), simt::grid_size(),
                reinterpret_cast<int*>(shared + 8 * at.columns));
}

}  // namespace fflfast::cuda
