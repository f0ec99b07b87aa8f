// The kernel of rows that stay on chip: up to 4 logits tensors, detached teachers, target_eps 0. A group of threads
// (2 … 32 lanes, a block, or a cluster of blocks) copies its row into shared memory once, and finds there
//
//   m_d = max_c u_d,   S_d = Σ_c e_d with e_d = exp((u_d − m_d)/T),   R_i = Σ_c r_i with r_i = exp(z_i − m_i),
//   KL_(t→s) = Σ_c e_t ((u_t − m_t) − (u_s − m_s))/T / S_t − log S_t + log S_s,   CE_i = log R_i − (z_iy − m_i),
//   ∂L/∂z_i = [μ ce_i (r_i/R_i − y) + λT Σ_d w_(d→i) (e_i/S_i − e_d/S_d)]/n
//
// Only the maxima and the sums go between threads (distill_loss_group.cuh); the row itself does not.
// Exponents are in base 2, (u − m) · log2(e)/T.
// Bytes a row: M·C·e read; in the fast form and in the backward pass M·C·e written. Launches: one.
#pragma once

#include "distill_loss_chunks.cuh"

namespace fflfast::cuda {

template <class T, int M, int V>
struct RowOnChip : RowChunks<T, M, V> {
  using Base = RowChunks<T, M, V>;
  using Base::D, Base::kStep, Base::kChunk, Base::o, Base::g, Base::group, Base::row, Base::index;
  using Base::chunk, Base::each_chunk, Base::each_step, Base::exists, Base::has, Base::inside, Base::pair, Base::place;
  using Base::soft, Base::step, Base::values, Base::write;
  using typename Base::Step;

  static constexpr int kSums = D + M + D * M;
  // What is known of a row, in shared memory for the terms: maxima, S, R (as in the statistics), each pair's
  // Σ e_t·(difference of exponents), Σ y'(z_i − m_i), Σ y', and z_iy.
  static constexpr int kKl = 2 * D + M, kDense = kKl + D * M, kRight = kDense + M + 1, kRecord = kRight + M;

  const Scalars<float> s;
  float maximum[D], sum[D], plain_sum[M], kl[D * M], dense[M + 1];

  // e[d] = exp((u_d − m_d)/T) and its exponent a[d] in base 2, of the distributions that are in an edge.
  FFLFAST_DEVICE void tempered(const float (&u)[D][kStep], float (&a)[D][kStep], float (&e)[D][kStep]) const {
    const uint32_t in_edge = kept_whole(g.tempered);
    FFLFAST_UNROLL
    for (int d = 0; d < D; ++d) {
      if (!has(in_edge, d)) continue;
      FFLFAST_UNROLL
      for (int q = 0; q < kStep; ++q) a[d][q] = (u[d][q] - maximum[d]) * s.tempered;
      powers(a[d], e[d]);
    }
  }

  FFLFAST_DEVICE void powers(const float (&a)[kStep], float (&e)[kStep]) const {
    if (o.classes <= kFewClasses) {
      FFLFAST_UNROLL
      for (int q = 0; q < kStep; ++q) e[q] = exp2_series(a[q]);
    } else {
      FFLFAST_UNROLL
      for (int q = 0; q < kStep; ++q) e[q] = simt::exp2_approx(a[q]);
    }
  }

  // r = exp(z_i − m_i).
  FFLFAST_DEVICE void plain(const float (&u)[kStep], int i, float (&r)[kStep]) const {
    float a[kStep];
    FFLFAST_UNROLL
    for (int q = 0; q < kStep; ++q) a[q] = (u[q] - maximum[i]) * static_cast<float>(kLog2E);
    powers(a, r);
  }

  FFLFAST_DEVICE void find_maxima() {
    FFLFAST_UNROLL
    for (int d = 0; d < D; ++d) maximum[d] = -infinity<float>();
    each_step([&](int, const float (&u)[D][kStep]) {
      FFLFAST_UNROLL
      for (int d = 0; d < D; ++d) {
        if (!exists(d)) continue;
        FFLFAST_UNROLL
        for (int q = 0; q < kStep; ++q) maximum[d] = larger(maximum[d], u[d][q]);
      }
    });
    group.template reduce<61, Maximum>(maximum, ~uint64_t{0});
  }

  FFLFAST_DEVICE void find_sums() {
    float v[kSums];
    FFLFAST_UNROLL
    for (int n = 0; n < kSums; ++n) v[n] = 0.0f;
    each_step([&](int, const float (&u)[D][kStep]) {
      float a[D][kStep], e[D][kStep];
      tempered(u, a, e);
      const uint32_t in_edge = kept_whole(g.tempered), pairs = kept_whole(g.pairs), ce = kept_whole(g.plain);
      FFLFAST_UNROLL
      for (int d = 0; d < D; ++d) {
        if (!has(in_edge, d)) continue;
        FFLFAST_UNROLL
        for (int q = 0; q < kStep; ++q) v[d] += e[d][q];
        FFLFAST_UNROLL
        for (int i = 0; i < M; ++i) {
          if (i == d || !has(pairs, pair(d, i))) continue;
          FFLFAST_UNROLL
          for (int q = 0; q < kStep; ++q)
            v[D + M + pair(d, i)] += e[d][q] == 0.0f ? 0.0f : e[d][q] * (a[d][q] - a[i][q]);
        }
      }
      FFLFAST_UNROLL
      for (int i = 0; i < M; ++i) {
        if (!has(ce, i)) continue;
        float r[kStep];
        plain(u[i], i, r);
        FFLFAST_UNROLL
        for (int q = 0; q < kStep; ++q) v[D + i] += r[q];
      }
    });
    group.template reduce<65, Sum>(v, g.tempered | g.plain << D | static_cast<uint64_t>(g.pairs) << (D + M));
    FFLFAST_UNROLL
    for (int d = 0; d < D; ++d) sum[d] = v[d];
    FFLFAST_UNROLL
    for (int i = 0; i < M; ++i) plain_sum[i] = v[D + i];
    FFLFAST_UNROLL
    for (int n = 0; n < D * M; ++n) kl[n] = v[D + M + n];
  }

  // Σ_c y'_c (z_i − m_i) of each logits tensor, then Σ_c y'_c, of a soft target; y' = 1 for label smoothing.
  FFLFAST_DEVICE void find_dense() {
    FFLFAST_UNROLL
    for (int n = 0; n <= M; ++n) dense[n] = 0.0f;
    each_step([&](int c, const float (&u)[D][kStep]) {
      FFLFAST_UNROLL
      for (int q = 0; q < kStep; ++q) {
        if (!inside(c + q)) continue;
        const float y = soft() ? soft_target(o, s, row, c + q) : 1.0f;
        if (y == 0.0f) continue;
        dense[M] += y;
        FFLFAST_UNROLL
        for (int i = 0; i < M; ++i)
          if (has(g.plain, i)) dense[i] += y * (u[i][q] - maximum[i]);
      }
    });
    group.template reduce<69, Sum>(dense, ~uint64_t{0});
  }

  // All of the record but z_iy, which came with the row.
  FFLFAST_DEVICE void record_row(float* record) const {
    FFLFAST_UNROLL
    for (int d = 0; d < D; ++d) {
      record[d] = has(g.tempered | g.plain, d) ? maximum[d] : 0.0f;
      record[D + d] = sum[d];
    }
    FFLFAST_UNROLL
    for (int n = 0; n < D * M; ++n) record[kKl + n] = kl[n];
    FFLFAST_UNROLL
    for (int i = 0; i < M; ++i) {
      record[2 * D + i] = plain_sum[i];
      record[kDense + i] = dense[i];
    }
    record[kDense + M] = dense[M];
  }

  FFLFAST_DEVICE float term(const float* record, int t) const {
    const int i = g.student[t], d = g.teacher[t];
    if (d != kNoTeacher) {
      const float own = record[D + d];
      const float bits = record[kKl + pair(d, i)] / own - log2_of(own) + log2_of(record[D + i]);
      return s.temperature * s.temperature * (bits * static_cast<float>(kLn2));
    }
    const float log_sum = log2_of(record[2 * D + i]) * static_cast<float>(kLn2);
    if (soft()) return record[kDense + M] * log_sum - record[kDense + i];
    const float ce = log_sum - (record[kRight + i] - record[i]);
    if (s.smoothing == 0.0f) return ce;
    return (1.0f - s.smoothing) * ce + s.smoothing * (log_sum - record[kDense + i] / static_cast<float>(o.classes));
  }

  // Adds the row to the totals (rows counted, loss, terms) of the group: its first lanes, a term each. The whole warp
  // takes part; `leading`: this thread's group has a row here and this is the row's first warp.
  FFLFAST_DEVICE void add_row(const float* record, RowState state, bool leading, double* totals) const {
    const int lanes = group.lanes < simt::kWarpSize ? group.lanes : simt::kWarpSize;
    const float other = state == RowState::kBad ? not_a_number<float>() : 0.0f;
    float loss = 0.0f;
    if (leading) {
      FFLFAST_ROLLED
      for (int t = group.lane; t < o.num_terms; t += lanes) {
        const float value = state == RowState::kCounted ? term(record, t) : other;
        const float weight = (g.teacher[t] == kNoTeacher ? s.ce_weight : s.kl_weight) * g.term_weight[t];
        totals[2 + t] += static_cast<double>(value);
        if (weight != 0.0f) loss += weight * value;
      }
    }
    for (int mask = lanes / 2; mask > 0; mask >>= 1) loss += simt::shuffle_xor<75>(loss, mask);
    if (!leading || group.lane != 0) return;
    loss += other;
    totals[0] += state == RowState::kIgnored ? 0.0 : 1.0;
    totals[1] += static_cast<double>(loss);
    if (o.reduction == kPerRow) static_cast<float*>(o.loss)[row] = loss;
  }

  // The statistics of csrc/distill_graph.h; ⟨p_t, ℓ⟩ is of no use here, and what was not computed is zero.
  FFLFAST_DEVICE void save(const float* record, bool counted) const {
    float* out = static_cast<float*>(o.statistics_out) + 1 + row * o.statistics_width;
    const int lanes = group.lanes < simt::kWarpSize ? group.lanes : simt::kWarpSize;
    FFLFAST_ROLLED
    for (int k = group.lane; k < o.statistics_width; k += lanes) {
      int at = k;  // in the record, which has room for D distributions
      if (at >= g.distributions) at += D - g.distributions;
      if (at >= D + g.distributions) at += D - g.distributions;
      out[k] = counted && at < kKl ? record[at] : 0.0f;
    }
  }

  FFLFAST_DEVICE void restore() {
    const float* in = static_cast<const float*>(o.statistics_in) + 1 + row * o.statistics_width;
    FFLFAST_UNROLL
    for (int d = 0; d < D; ++d) {
      maximum[d] = exists(d) ? in[d] : 0.0f;
      sum[d] = exists(d) ? in[g.distributions + d] : 0.0f;
    }
    FFLFAST_UNROLL
    for (int i = 0; i < M; ++i) plain_sum[i] = in[2 * g.distributions + i];
  }

  FFLFAST_DEVICE void write_gradients(float scale) const {
    const float kl_scale = s.kl_weight * s.temperature * scale, ce_scale = s.ce_weight * scale;
    const uint32_t live = s.kl_weight == 0.0f ? 0 : g.live, plain_live = s.ce_weight == 0.0f ? 0 : g.plain;
    float inverse[D], own[M], taught[D][M], plain_scale[M];
    FFLFAST_UNROLL
    for (int d = 0; d < D; ++d) inverse[d] = 1.0f / sum[d];
    FFLFAST_UNROLL
    for (int i = 0; i < M; ++i) {
      own[i] = 0.0f;
      FFLFAST_UNROLL
      for (int d = 0; d < D; ++d) {
        taught[d][i] = kl_scale * g.weight[d][i] * inverse[d];
        own[i] += g.weight[d][i];
      }
      own[i] *= kl_scale * inverse[i];
      plain_scale[i] = ce_scale * g.ce_weight[i] * (soft() ? dense[M] : 1.0f) / plain_sum[i];
    }
    each_chunk([&](int slot, int c) {
      FFLFAST_ROLLED
      for (int turn = 0; turn < kChunk; turn += kStep) {
        const int first = place(turn);
        float u[D][kStep], a[D][kStep], e[D][kStep];
        values(slot, first, u);
        tempered(u, a, e);
        const uint32_t teaches = kept_whole(live), ce = kept_whole(plain_live);
        FFLFAST_UNROLL
        for (int i = 0; i < M; ++i) {
          float slope[kStep];
          FFLFAST_UNROLL
          for (int q = 0; q < kStep; ++q) slope[q] = 0.0f;
          bool taught_by_any = false;
          FFLFAST_UNROLL
          for (int d = 0; d < D; ++d) {
            if (i == d || !has(teaches, pair(d, i))) continue;
            taught_by_any = true;
            FFLFAST_UNROLL
            for (int q = 0; q < kStep; ++q) slope[q] -= taught[d][i] * e[d][q];
          }
          if (taught_by_any) {
            FFLFAST_UNROLL
            for (int q = 0; q < kStep; ++q) slope[q] += own[i] * e[i][q];
          }
          if (has(ce, i)) add_ce(i, c + first, plain_scale[i], ce_scale, u[i], slope);
          // The logits of these classes are not wanted any more: their gradients take their place, so that the whole
          // chunk leaves as one access.
          Step out;
          FFLFAST_UNROLL
          for (int q = 0; q < kStep; ++q) out[q] = simt::convert<T>(slope[q]);
          step(i, slot, first) = out;
        }
      }
      FFLFAST_ROLLED
      for (int i = 0; i < M; ++i) write(chunk(i, slot), i, c);
    });
  }

  // Adds μ ce_i (Σy'·softmax(z_i) − y')/n of kStep classes from c.
  FFLFAST_DEVICE void add_ce(int i, int c, float plain_scale, float ce_scale, const float (&u)[kStep],
                             float (&slope)[kStep]) const {
    float r[kStep];
    plain(u, i, r);
    FFLFAST_UNROLL
    for (int q = 0; q < kStep; ++q) slope[q] += plain_scale * r[q];
    const float weight = ce_scale * g.ce_weight[i];
    if (soft() || s.smoothing != 0.0f) {
      FFLFAST_UNROLL
      for (int q = 0; q < kStep; ++q)
        if (inside(c + q))
          slope[q] -= weight * (soft() ? soft_target(o, s, row, c + q) : s.smoothing / static_cast<float>(o.classes));
    }
    if (index >= c && index < c + kStep) {
      FFLFAST_UNROLL
      for (int q = 0; q < kStep; ++q)
        if (index == c + q) slope[q] -= weight * (1.0f - s.smoothing);
    }
  }
};

template <class T, int M, int V>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(256, M + V > 4 ? 1 : 2)
void distill_rows(const FFLFAST_GRID_CONSTANT Operands o, const FFLFAST_GRID_CONSTANT PairTable<M, V> g, int lanes) {
  using Row = RowOnChip<T, M, V>;
  const RowsLayout at(lanes, simt::block_size(), static_cast<int>(simt::cluster_size()), 2 + o.num_terms, Row::kRecord,
                      Row::kSums, M, o.classes, sizeof(T));
  unsigned char* shared = simt::shared_memory<unsigned char>();
  const int index = simt::thread_index() / lanes, lane = simt::thread_index() % lanes;
  Group group{lanes, lane, simt::cluster_rank(), simt::cluster_size(), at.warps,
              reinterpret_cast<float*>(shared + at.exchange_offset()), at.numbers};
  auto* const chunks = reinterpret_cast<typename Row::Chunk*>(shared + at.rows_offset());
  Row r{{o, g, group, chunks + index * M * at.slots * lanes + lane, at.slots, 0, -1, 0, 0},
        read_scalars<float>(o), {}, {}, {}, {}, {}};
  double* totals = reinterpret_cast<double*>(shared) + index * at.columns;
  // Two of them, in turn: when one is written again, the barrier of the row between has seen all who read it.
  float* const records = reinterpret_cast<float*>(shared + at.record_offset()) + 2 * index * Row::kRecord;
  int turn = 0;
  for (int t = lane; t < at.columns; t += lanes) totals[t] = 0.0;
  const float weight = weight_of_row<76, float>(o, reinterpret_cast<int64_t*>(shared + at.counts_offset()));
  const bool forward = !o.statistics_in, dense = r.soft() || (forward && r.s.smoothing != 0.0f && o.target);
  const int step = static_cast<int>(simt::grid_size() / r.group.ranks) * at.groups;
  FFLFAST_ROLLED
  for (r.row = simt::block_index() / r.group.ranks * at.groups + index; r.row - index < o.rows; r.row += step) {
    const bool in_batch = r.row < o.rows;
    int64_t target = -1;
    const RowState state = in_batch ? row_state(o, r.row, &target) : RowState::kIgnored;
    const bool counted = in_batch && state == RowState::kCounted;
    r.index = static_cast<int>(target);
    r.count = 0;
    const bool leading = in_batch && forward && r.group.rank == 0 && lane < simt::kWarpSize;
    float* const record = records + turn * Row::kRecord;
    turn ^= 1;
    if (counted) r.load(leading && lane == 0 ? record + Row::kRight : nullptr);
    if (forward) {
      r.find_maxima();
      r.find_sums();
    } else if (counted) {
      r.restore();
    }
    if (dense) r.find_dense();
    if (forward && r.group.rank == 0) {
      if (leading && lane == 0) r.record_row(record);
      simt::sync_warp<78>();
      r.add_row(record, state, leading, totals);
      if (leading && o.statistics_out) r.save(record, counted);
    }
    if (o.writes_gradients && counted) r.write_gradients(weight * grad_of_row<float>(o, r.row));
    if (o.writes_gradients && in_batch && !counted)
      r.fill_gradients(state == RowState::kBad ? not_a_number<float>() : 0.0f);
  }
  if (r.group.ranks > 1) simt::sync_cluster<79>();  // no block ends while another may read its memory
  if (!forward || r.group.rank != 0) return;
  simt::sync_block<80>();
  totals = reinterpret_cast<double*>(shared);
  for (int t = simt::thread_index(); t < at.columns; t += simt::block_size())
    for (int k = 1; k < at.groups; ++k) totals[t] += totals[k * at.columns + t];
  finish<81, float>(o, totals, simt::block_index() / r.group.ranks, simt::grid_size() / r.group.ranks,
                    reinterpret_cast<int*>(shared + at.flag_offset()));
}

}  // namespace fflfast::cuda
