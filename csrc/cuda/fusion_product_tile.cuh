// The matrix product of one block: an M × N tile of sums over K, in float32, a slice of kSlice of K at a time from
// shared memory. The product of 16-bit numbers and of tf32 goes to the tensor cores, that of float32 is plain fma.
//
// An operand's slice lies in shared memory as it lies in global memory: either K goes along its lines ("along": a line
// is a row of A or a column of B) or the tile's side does ("across": a line is one place in K). A line's pitch is 16
// bytes (4-byte numbers across: 32) more than a multiple of 128, so that what a warp reads at once falls into different
// banks.
#pragma once

#include "fusion_product_slices.cuh"

namespace fflfast::cuda {

// kWarpsM × kWarpsN warps, each of which has kM/kWarpsM × kN/kWarpsN of the tile.
template <int M, int N, int WARPS_M, int WARPS_N>
struct TileShape {
  static constexpr int kM = M, kN = N, kWarpsM = WARPS_M, kWarpsN = WARPS_N;
  static constexpr int kThreads = WARPS_M * WARPS_N * simt::kWarpSize;
};
using LargeTile = TileShape<kLargeSide, kLargeSide, 4, 2>;
using SmallTile = TileShape<kSmallSide, kSmallSide, 2, 2>;

enum class Lines { kAlong, kAcross };

// Elements from one line of a slice to the next, and bytes of a slice; `side` is the tile's M or N.
template <class T, Lines LINES>
constexpr int slice_pitch(int side) {
  return LINES == Lines::kAlong ? kSlice<T> + 16 / static_cast<int>(sizeof(T)) : side + 8;
}

template <class T, Lines LINES>
constexpr size_t slice_bytes(int side) {
  return sizeof(T) * slice_pitch<T, LINES>(side) * (LINES == Lines::kAlong ? side : kSlice<T>);
}

// Blocks that should live on a multiprocessor side by side, so that one forms numbers while another multiplies. Plain
// fma does both in the same units, and wants more registers.
template <bool TENSOR_CORES, class Shape>
constexpr int kBlocksBeside = (TENSOR_CORES ? 512 : 256) / Shape::kThreads;

// The tile's floats in shared memory, for what comes after the product.
template <class Shape>
constexpr int kStagedPitch = Shape::kN + 8;
template <class Shape>
constexpr size_t kStagedBytes = sizeof(float) * Shape::kM * kStagedPitch<Shape>;

// Some of a thread's sums can wait in shared memory while the thread forms numbers and wants the registers.
constexpr int kParkWidth = 4;
template <class Shape>
constexpr size_t park_bytes(int count) {
  return sizeof(float) * count * Shape::kThreads;
}

// The COUNT first of the numbers that at(k) names, to `shared` or back; a thread's packs stand a block's width apart.
template <int COUNT, class At>
FFLFAST_DEVICE void park_sums(float* shared, const At& at) {
  auto* const own = reinterpret_cast<Pack<float, kParkWidth>*>(shared) + simt::thread_index();
  FFLFAST_UNROLL
  for (int k = 0; k < COUNT; k += kParkWidth)
    own[k / kParkWidth * simt::block_size()] = {{at(k), at(k + 1), at(k + 2), at(k + 3)}};
}

template <int COUNT, class At>
FFLFAST_DEVICE void unpark_sums(const float* shared, const At& at) {
  const auto* const own = reinterpret_cast<const Pack<float, kParkWidth>*>(shared) + simt::thread_index();
  FFLFAST_UNROLL
  for (int k = 0; k < COUNT; k += kParkWidth) {
    const auto held = own[k / kParkWidth * simt::block_size()];
    FFLFAST_UNROLL
    for (int i = 0; i < kParkWidth; ++i) at(k + i) = held[i];
  }
}

template <class T, bool TENSOR_CORES, class Shape, Lines A, Lines B>
struct TileProduct;

// Tensor cores: a warp's part in pieces of 16 × 8, of which each lane holds four numbers.
template <class T, class Shape, Lines A, Lines B>
struct TileProduct<T, true, Shape, A, B> {
  static constexpr int kM = Shape::kM / Shape::kWarpsM / 16, kN = Shape::kN / Shape::kWarpsN / 8;
  static constexpr int kDepth = 32 / sizeof(T);  // of K at a time
  static constexpr int kPitchA = slice_pitch<T, A>(Shape::kM), kPitchB = slice_pitch<T, B>(Shape::kN);
  static_assert(kN % 2 == 0, "columns are loaded in pieces of 16");

  float sum[kM][kN][4];

  FFLFAST_DEVICE void clear() {
    FFLFAST_UNROLL
    for (int i = 0; i < kM; ++i)
      FFLFAST_UNROLL
      for (int j = 0; j < kN; ++j)
        FFLFAST_UNROLL
        for (int k = 0; k < 4; ++k) sum[i][j][k] = 0.0f;
  }

  template <int COUNT>
  FFLFAST_DEVICE void park(float* shared) {
    park_sums<COUNT>(shared, [this](int k) -> float& { return sum[k / 4 / kN][k / 4 % kN][k % 4]; });
  }
  template <int COUNT>
  FFLFAST_DEVICE void unpark(const float* shared) {
    unpark_sums<COUNT>(shared, [this](int k) -> float& { return sum[k / 4 / kN][k / 4 % kN][k % 4]; });
  }

  FFLFAST_DEVICE static int first_row() { return simt::warp_index() / Shape::kWarpsN * (16 * kM); }
  FFLFAST_DEVICE static int first_column() { return simt::warp_index() % Shape::kWarpsN * (8 * kN); }

  // Fragments of 16 rows of A from `row`, and of 16 columns of B from `column`, at `depth` of the slice. Matrix
  // l / 8 of load_matrices is the one whose row lane l names.
  template <int SITE>
  FFLFAST_DEVICE static void load_a(const T* a, int row, int depth, uint32_t (&out)[4]) {
    const int lane = simt::lane_index();
    if constexpr (sizeof(T) == 4) {
      FFLFAST_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int m = row + lane / 4 + 8 * (k % 2), d = depth + lane % 4 + 4 * (k / 2);
        out[k] = simt::round_to_tf32(a[A == Lines::kAlong ? m * kPitchA + d : d * kPitchA + m]);
      }
    } else if constexpr (A == Lines::kAlong) {
      simt::load_matrices<SITE, false>(out, a + (row + lane % 16) * kPitchA + depth + lane / 16 * 8);
    } else {
      simt::load_matrices<SITE, true>(out, a + (depth + lane % 8 + lane / 16 * 8) * kPitchA + row + lane / 8 % 2 * 8);
    }
  }

  template <int SITE>
  FFLFAST_DEVICE static void load_b(const T* b, int column, int depth, uint32_t (&out)[2][2]) {
    const int lane = simt::lane_index();
    if constexpr (sizeof(T) == 4) {
      FFLFAST_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int n = column + lane / 4 + 8 * (k / 2), d = depth + lane % 4 + 4 * (k % 2);
        out[k / 2][k % 2] = simt::round_to_tf32(b[B == Lines::kAlong ? n * kPitchB + d : d * kPitchB + n]);
      }
    } else {
      uint32_t held[4];
      if constexpr (B == Lines::kAlong)
        simt::load_matrices<SITE, false>(
            held, b + (column + lane % 8 + lane / 16 * 8) * kPitchB + depth + lane / 8 % 2 * 8);
      else
        simt::load_matrices<SITE, true>(held, b + (depth + lane % 16) * kPitchB + column + lane / 16 * 8);
      FFLFAST_UNROLL
      for (int k = 0; k < 4; ++k) out[k / 2][k % 2] = held[k];
    }
  }

  // Adds a slice. Sites SITE … SITE + 2.
  template <int SITE>
  FFLFAST_DEVICE void add(const T* a, const T* b) {
    FFLFAST_ROLLED
    for (int depth = 0; depth < kSlice<T>; depth += kDepth) {
      uint32_t rows[kM][4];
      FFLFAST_UNROLL
      for (int i = 0; i < kM; ++i) load_a<SITE>(a, first_row() + 16 * i, depth, rows[i]);
      FFLFAST_UNROLL
      for (int j = 0; j < kN; j += 2) {
        uint32_t columns[2][2];
        load_b<SITE + 1>(b, first_column() + 8 * j, depth, columns);
        FFLFAST_UNROLL
        for (int i = 0; i < kM; ++i) {
          simt::multiply_add<SITE + 2, T>(sum[i][j], rows[i], columns[0]);
          simt::multiply_add<SITE + 2, T>(sum[i][j + 1], rows[i], columns[1]);
        }
      }
    }
  }

  // Writes the tile to staged[row · kStagedPitch + column]; `round` is what becomes of a number before.
  template <class Round>
  FFLFAST_DEVICE void stage(float* staged, const Round& round) const {
    const int row = first_row() + simt::lane_index() / 4, column = first_column() + simt::lane_index() % 4 * 2;
    FFLFAST_UNROLL
    for (int i = 0; i < kM; ++i)
      FFLFAST_UNROLL
      for (int j = 0; j < kN; ++j)
        FFLFAST_UNROLL
        for (int half = 0; half < 2; ++half) {
          float* const to = staged + (row + 16 * i + 8 * half) * kStagedPitch<Shape> + column + 8 * j;
          *reinterpret_cast<Pack<float, 2>*>(to) = {{round(sum[i][j][2 * half]), round(sum[i][j][2 * half + 1])}};
        }
  }
};

// Plain fma: a thread has kM rows × kN columns; neighbours in memory are neighbours of its own where lines go across,
// and of the next thread where they go along.
template <class Shape, Lines A, Lines B>
struct TileProduct<float, false, Shape, A, B> {
  static constexpr int kBeside = 16, kAbove = Shape::kThreads / kBeside;
  static constexpr int kM = Shape::kM / kAbove, kN = Shape::kN / kBeside;
  static constexpr int kPitchA = slice_pitch<float, A>(Shape::kM), kPitchB = slice_pitch<float, B>(Shape::kN);
  static constexpr int kWidth = 4;

  float sum[kM][kN];

  FFLFAST_DEVICE void clear() {
    FFLFAST_UNROLL
    for (int i = 0; i < kM; ++i)
      FFLFAST_UNROLL
      for (int j = 0; j < kN; ++j) sum[i][j] = 0.0f;
  }

  template <int COUNT>
  FFLFAST_DEVICE void park(float* shared) {
    park_sums<COUNT>(shared, [this](int k) -> float& { return sum[k / kN][k % kN]; });
  }
  template <int COUNT>
  FFLFAST_DEVICE void unpark(const float* shared) {
    unpark_sums<COUNT>(shared, [this](int k) -> float& { return sum[k / kN][k % kN]; });
  }

  FFLFAST_DEVICE static int row(int i) {
    const int at = simt::thread_index() / kBeside;
    return A == Lines::kAlong ? at + kAbove * i : kWidth * (at + i / kWidth * kAbove) + i % kWidth;
  }
  FFLFAST_DEVICE static int column(int j) {
    const int at = simt::thread_index() % kBeside;
    return B == Lines::kAlong ? at + kBeside * j : kWidth * (at + j / kWidth * kBeside) + j % kWidth;
  }

  FFLFAST_DEVICE static Pack<float, kWidth> pack(const float* from) {
    return *reinterpret_cast<const Pack<float, kWidth>*>(from);
  }

  // kWidth numbers of K of each of the thread's rows or columns.
  template <Lines LINES, int PITCH, int COUNT, class Place>
  FFLFAST_DEVICE static void load(const float* slice, int depth, const Place& place, float (&out)[COUNT][kWidth]) {
    if constexpr (LINES == Lines::kAlong) {
      FFLFAST_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        const auto held = pack(slice + place(i) * PITCH + depth);
        FFLFAST_UNROLL
        for (int d = 0; d < kWidth; ++d) out[i][d] = held[d];
      }
    } else {
      FFLFAST_UNROLL
      for (int d = 0; d < kWidth; ++d)
        FFLFAST_UNROLL
        for (int i = 0; i < COUNT; i += kWidth) {
          const auto held = pack(slice + (depth + d) * PITCH + place(i));
          FFLFAST_UNROLL
          for (int k = 0; k < kWidth; ++k) out[i + k][d] = held[k];
        }
    }
  }

  template <int SITE>
  FFLFAST_DEVICE void add(const float* a, const float* b) {
    constexpr int kPart = kWidth;  // rows and columns at a time, for the sake of registers
    FFLFAST_ROLLED
    for (int depth = 0; depth < kSlice<float>; depth += kWidth) {
      FFLFAST_UNROLL
      for (int n = 0; n < kN; n += kPart) {
        float columns[kPart][kWidth];
        load<B, kPitchB, kPart>(b, depth, [n](int j) { return column(n + j); }, columns);
        FFLFAST_UNROLL
        for (int m = 0; m < kM; m += kPart) {
          float rows[kPart][kWidth];
          load<A, kPitchA, kPart>(a, depth, [m](int i) { return row(m + i); }, rows);
          FFLFAST_UNROLL
          for (int d = 0; d < kWidth; ++d)
            FFLFAST_UNROLL
            for (int i = 0; i < kPart; ++i)
              FFLFAST_UNROLL
              for (int j = 0; j < kPart; ++j) sum[m + i][n + j] = ::fmaf(rows[i][d], columns[j][d], sum[m + i][n + j]);
        }
      }
    }
  }

  template <class Round>
  FFLFAST_DEVICE void stage(float* staged, const Round& round) const {
    FFLFAST_UNROLL
    for (int i = 0; i < kM; ++i)
      FFLFAST_UNROLL
      for (int j = 0; j < kN; ++j) staged[row(i) * kStagedPitch<Shape> + column(j)] = round(sum[i][j]);
  }
};

}  // namespace fflfast::cuda
