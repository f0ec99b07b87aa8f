// A row of logits on chip: where its chunks lie, how they come and go. A row lies in chunks of 16 bytes cut at 16-byte
// addresses of global memory; what its first and last chunk hold beyond the row is −inf, which adds nothing to any sum,
// so that loops over classes need no bounds. A thread touches no chunk but its own, so the row needs no barrier.
#pragma once

#include "distill_loss_group.cuh"

namespace fflfast::cuda {

// A graph as a dense table, so that a thread's arrays are indexed by constants and stay in registers.
template <int M, int V>
struct PairTable {
  static constexpr int kDistributions = M + V;
  float mixture[V > 0 ? V : 1][M];
  float weight[kDistributions][M];  // of the edge d → i
  float ce_weight[M];
  uint32_t pairs, live;             // bit d·M + i: there is an edge d → i; its weight is not 0
  uint32_t tempered;                // bit d: distribution d is in an edge
  uint32_t plain;                   // bit i: logits i have a CE term
  uint32_t mixed;                   // bit v·M + i: mixture v holds logits i
  int32_t distributions;
  // The terms in order: a CE of `student` where `teacher` is kNoTeacher, else a T²·KL.
  uint8_t teacher[M + kDistributions * M], student[M + kDistributions * M];
  float term_weight[M + kDistributions * M];
};
constexpr uint8_t kNoTeacher = 255;

// A bit mask of the graph as a loop's body should see it: not as a register for each bit, worked out before the loop.
FFLFAST_DEVICE uint32_t kept_whole(uint32_t mask) {
  asm volatile("" : "+r"(mask));
  return mask;
}

template <class T, int M, int V>
struct RowChunks {
  static constexpr int D = M + V;
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr int kStep = D > 3 ? 2 : 4;  // classes that a thread works on at a time, as registers allow
  using Chunk = Pack<T, kChunk>;
  using Step = Pack<T, kStep>;

  const Operands& o;
  const PairTable<M, V>& g;
  Group group;
  Chunk* chunks;  // of this thread, group.lanes apart
  int slots;
  int64_t row;
  int index;      // the row's class, −1 for none
  int count;      // chunks of the row, 0 where it is not loaded
  int phase;      // classes that the first chunk lacks at its start

  FFLFAST_DEVICE static bool has(uint32_t mask, int bit) { return mask >> bit & 1; }
  FFLFAST_DEVICE static int pair(int teacher, int student) { return teacher * M + student; }
  FFLFAST_DEVICE bool exists(int d) const { return d < M || d < g.distributions; }
  FFLFAST_DEVICE bool soft() const { return o.target_kind == kSoftTarget; }
  FFLFAST_DEVICE Chunk& chunk(int i, int slot) const { return chunks[(i * slots + slot) * group.lanes]; }
  FFLFAST_DEVICE Step& step(int i, int slot, int first) const {
    return *reinterpret_cast<Step*>(chunk(i, slot).value + first);
  }
  FFLFAST_DEVICE const T* logits(int i) const { return static_cast<const T*>(o.logits[i]) + row * o.stride[i]; }
  FFLFAST_DEVICE static int offset_in_chunk(const T* address) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T));
  }

  // Calls body(slot, first class) for this thread's chunks of the row.
  template <class Body>
  FFLFAST_DEVICE void each_chunk(const Body& body) const {
    int slot = 0;
    FFLFAST_ROLLED
    for (int k = group.thread(); k < count; k += group.threads()) body(slot++, k * kChunk - phase);
  }

  FFLFAST_DEVICE bool inside(int c) const { return c >= 0 && c < o.classes; }
  FFLFAST_DEVICE bool whole(int c) const { return c >= 0 && c + kChunk <= o.classes; }

  // Copies the row on chip, and the logits of its class to `right` unless that is null. Tensors whose rows begin at
  // different places between 16-byte addresses go by element.
  FFLFAST_DEVICE void load(float* right) {
    phase = offset_in_chunk(logits(0));
    bool together = true;
    FFLFAST_UNROLL
    for (int i = 1; i < M; ++i) together &= offset_in_chunk(logits(i)) == phase;
    if (!together) phase = 0;
    count = (static_cast<int>(o.classes) + phase + kChunk - 1) / kChunk;
    each_chunk([&](int slot, int c) {
      if (together && whole(c)) {
        FFLFAST_UNROLL
        for (int i = 0; i < M; ++i) simt::copy_async<16>(&chunk(i, slot), logits(i) + c);
        return;
      }
      FFLFAST_ROLLED
      for (int j = 0; j < kChunk; ++j) {
        FFLFAST_UNROLL
        for (int i = 0; i < M; ++i)
          chunk(i, slot)[j] = inside(c + j) ? simt::load_cached<T, 1>(logits(i) + c + j)[0]
                                            : simt::convert<T>(-infinity<float>());
      }
    });
    simt::copy_async_commit();
    if (right && index >= 0) {
      FFLFAST_UNROLL
      for (int i = 0; i < M; ++i) right[i] = simt::convert<float>(simt::load_cached<T, 1>(logits(i) + index)[0]);
    }
    simt::copy_async_wait<60, 0>();
  }

  // u_d of kStep classes. A mixture skips coefficients of zero, as 0 · (−inf) is NaN.
  FFLFAST_DEVICE void values(int slot, int first, float (&u)[D][kStep]) const {
    FFLFAST_UNROLL
    for (int i = 0; i < M; ++i) {
      const Step raw = step(i, slot, first);
      FFLFAST_UNROLL
      for (int q = 0; q < kStep; ++q) u[i][q] = simt::convert<float>(raw[q]);
    }
    const uint32_t mixed = kept_whole(g.mixed);
    FFLFAST_UNROLL
    for (int v = 0; v < V; ++v) {
      FFLFAST_UNROLL
      for (int q = 0; q < kStep; ++q) u[M + v][q] = 0.0f;
      FFLFAST_UNROLL
      for (int i = 0; i < M; ++i) {
        if (!has(mixed, v * M + i)) continue;
        FFLFAST_UNROLL
        for (int q = 0; q < kStep; ++q) u[M + v][q] += g.mixture[v][i] * u[i][q];
      }
    }
  }

  // Where in its chunk a thread works at each turn. Lanes 8 apart, whose chunks lie in the same banks of shared memory,
  // work at different places.
  FFLFAST_DEVICE static int place(int turn) { return (turn + simt::lane_index() / 8 * kStep) % kChunk; }

  // Calls body(class, u) for each kStep classes of this thread.
  template <class Body>
  FFLFAST_DEVICE void each_step(const Body& body) const {
    each_chunk([&](int slot, int c) {
      FFLFAST_ROLLED
      for (int turn = 0; turn < kChunk; turn += kStep) {
        const int first = place(turn);
        float u[D][kStep];
        values(slot, first, u);
        body(c + first, u);
      }
    });
  }

  // Writes a chunk of ∂L/∂z_i that lies on chip to class c: as one access where its place in memory allows.
  FFLFAST_DEVICE void write(const Chunk& gradient, int i, int c) const {
    if (!o.gradients[i]) return;
    T* out = static_cast<T*>(o.gradients[i]) + row * o.classes + c;
    if (whole(c) && offset_in_chunk(out) == 0) {
      simt::store_streaming<T, kChunk>(out, gradient);
      return;
    }
    FFLFAST_ROLLED
    for (int j = 0; j < kChunk; ++j)
      if (inside(c + j)) out[j] = gradient[j];
  }

  // A row of one number, where no logits were loaded.
  FFLFAST_DEVICE void fill_gradients(float number) {
    FFLFAST_UNROLL
    for (int j = 0; j < kChunk; ++j) chunk(0, 0)[j] = simt::convert<T>(number);
    FFLFAST_ROLLED
    for (int i = 0; i < M; ++i) {
      phase = offset_in_chunk(static_cast<T*>(o.gradients[i]) + row * o.classes);
      count = (static_cast<int>(o.classes) + phase + kChunk - 1) / kChunk;
      each_chunk([&](int, int c) { write(chunk(0, 0), i, c); });
    }
  }
};

}  // namespace fflfast::cuda
