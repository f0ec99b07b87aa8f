// Tiles: one image's (or strip's) pixels of one block of channels, a vector a pixel, with a frame of zeros, in the
// first- or second-level cache. Included by the kernel files only (see vec.h).
//
// However a feature map lies in memory, the depthwise convolution sees the same tile: nine products a pixel from
// neighbouring vectors, no shuffle and no test for the border.
#pragma once

#include "fusion_plan.h"
#include "vec.h"

namespace fflfast {
namespace FFLFAST_ISA {

constexpr int kLanes = Vec<float>::kWidth;

// ---- a square of kLanes × kLanes numbers -------------------------------------------------------------------------

#if defined(__AVX512F__)
FFLFAST_INLINE void transpose(FloatReg (&r)[kLanes]) {
  FloatReg t[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // r[4g + q] now holds column 4l + q of rows 4g … 4g + 3 in its quarter l.
#pragma GCC unroll 16
  for (int q = 0; q < 4; ++q) {
    t[q] = _mm512_shuffle_f32x4(r[q], r[4 + q], 0x88);
    t[4 + q] = _mm512_shuffle_f32x4(r[8 + q], r[12 + q], 0x88);
    t[8 + q] = _mm512_shuffle_f32x4(r[q], r[4 + q], 0xdd);
    t[12 + q] = _mm512_shuffle_f32x4(r[8 + q], r[12 + q], 0xdd);
  }
#pragma GCC unroll 16
  for (int q = 0; q < 4; ++q) {
    r[q] = _mm512_shuffle_f32x4(t[q], t[4 + q], 0x88);
    r[8 + q] = _mm512_shuffle_f32x4(t[q], t[4 + q], 0xdd);
    r[4 + q] = _mm512_shuffle_f32x4(t[8 + q], t[12 + q], 0x88);
    r[12 + q] = _mm512_shuffle_f32x4(t[8 + q], t[12 + q], 0xdd);
  }
}
#elif defined(__AVX2__)
FFLFAST_INLINE void transpose(FloatReg (&r)[kLanes]) {
  FloatReg t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int q = 0; q < 4; ++q) {
    t[q] = _mm256_permute2f128_ps(r[q], r[4 + q], 0x20);
    t[4 + q] = _mm256_permute2f128_ps(r[q], r[4 + q], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#else
FFLFAST_INLINE void transpose(FloatReg (&r)[kLanes]) {
  const IntReg low{0, 4, 1, 5}, high{2, 6, 3, 7};
  const FloatReg a = __builtin_shuffle(r[0], r[1], low), b = __builtin_shuffle(r[0], r[1], high);
  const FloatReg c = __builtin_shuffle(r[2], r[3], low), d = __builtin_shuffle(r[2], r[3], high);
  r[0] = __builtin_shuffle(a, c, IntReg{0, 1, 4, 5});
  r[1] = __builtin_shuffle(a, c, IntReg{2, 3, 6, 7});
  r[2] = __builtin_shuffle(b, d, IntReg{0, 1, 4, 5});
  r[3] = __builtin_shuffle(b, d, IntReg{2, 3, 6, 7});
}
#endif

// Calls body(first pixel, count) for pieces of at most kLanes of n pixels; the last one moves back to be whole where
// it can, so that some pixels come twice.
template <class Body>
FFLFAST_INLINE void for_each_square(int64_t n, const Body& body) {
  for (int64_t p = 0; p < n; p += kLanes) {
    if (p + kLanes <= n)
      body(p, kLanes);
    else if (n >= kLanes)
      body(n - kLanes, kLanes);
    else
      body(p, static_cast<int>(n));
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// Rows [first, first + rows) of an image, one column of zeros on either side.
struct Tile {
  float* data;
  int64_t first, rows, width;

  int64_t pitch() const { return (width + 2) * kLanes; }
  float* at(int64_t row, int64_t column) const { return data + (row - first) * pitch() + (column + 1) * kLanes; }
  static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2) * kLanes; }
};

FFLFAST_INLINE void clear_row(const Tile& tile, int64_t row) {
  for (int64_t j = -1; j <= tile.width; ++j) store(tile.at(row, j), FloatReg{});
}

// Zeros in the frame: the rows that the image of `height` rows does not have, and the two outer columns.
FFLFAST_INLINE void clear_frame(const Tile& tile, int64_t height) {
  for (int64_t i = tile.first; i < tile.first + tile.rows; ++i) {
    if (i < 0 || i >= height) {
      clear_row(tile, i);
    } else {
      store(tile.at(i, -1), FloatReg{});
      store(tile.at(i, tile.width), FloatReg{});
    }
  }
}

// Walks over the pixels from one on, row after row.
struct Cursor {
  float* p;
  int64_t left, width;  // pixels left in the row
  Cursor(const Tile& tile, int64_t row, int64_t column)
      : p(tile.at(row, column)), left(tile.width - column), width(tile.width) {}
  FFLFAST_INLINE float* next() {
    float* const now = p;
    p += kLanes;
    if (--left == 0) {
      p += 2 * kLanes;
      left = width;
    }
    return now;
  }
};

// `run` adjacent pixels of a block whose channels lie apart, into the tile from (row, 0) on.
inline void load_run(const Tile& tile, int64_t row, const float* x, int64_t stride, int lanes, int64_t run) {
  for_each_square(run, [&](int64_t p, int count) {
    FloatReg r[kLanes];
    for (int c = 0; c < kLanes; ++c) {
      const float* from = x + c * stride + p;
      r[c] = c >= lanes ? FloatReg{} : count == kLanes ? load(from) : load_tail(from, count, 0.0f);
    }
    transpose(r);
    Cursor to(tile, row + p / tile.width, p % tile.width);
    for (int q = 0; q < count; ++q) store(to.next(), r[q]);
  });
}

// The whole tile, frame included, of one block of an image that begins at x.
inline void load_tile(const Tile& tile, const float* x, const Strides& s, int lanes, int64_t height) {
  clear_frame(tile, height);
  const int64_t first = tile.first > 0 ? tile.first : 0;
  const int64_t last = tile.first + tile.rows < height ? tile.first + tile.rows : height;
  if (s.access == Access::kPixels && s.row == tile.width)
    return load_run(tile, first, x + first * s.row, s.channel, lanes, (last - first) * tile.width);
  for (int64_t i = first; i < last; ++i) {
    const float* row = x + i * s.row;
    if (s.access == Access::kPixels) {
      load_run(tile, i, row, s.channel, lanes, tile.width);
    } else if (s.access == Access::kChannels && lanes == kLanes) {
      for (int64_t j = 0; j < tile.width; ++j) store(tile.at(i, j), load(row + j * s.column));
    } else if (s.access == Access::kChannels) {
      for (int64_t j = 0; j < tile.width; ++j) store(tile.at(i, j), load_tail(row + j * s.column, lanes, 0.0f));
    } else {
      for (int64_t j = 0; j < tile.width; ++j)
        for (int c = 0; c < kLanes; ++c) tile.at(i, j)[c] = c < lanes ? row[j * s.column + c * s.channel] : 0.0f;
    }
  }
}

// Rows [first, first + rows) of a block from `block` (a vector a pixel, no frame) into an image that begins at x.
inline void store_block(const float* block, float* x, const Strides& s, int lanes, int64_t first, int64_t rows,
                        int64_t width) {
  if (s.access == Access::kPixels) {
    const bool whole = s.row == width;
    for (int64_t i = 0; i < (whole ? 1 : rows); ++i) {
      float* row = x + (first + i) * s.row;
      const float* from = block + i * width * kLanes;
      for_each_square(whole ? rows * width : width, [&](int64_t p, int count) {
        FloatReg r[kLanes];
        for (int q = 0; q < kLanes; ++q) r[q] = q < count ? load(from + (p + q) * kLanes) : FloatReg{};
        transpose(r);
        for (int c = 0; c < lanes; ++c) {
          if (count == kLanes)
            store(row + c * s.channel + p, r[c]);
          else
            store_tail(row + c * s.channel + p, r[c], count);
        }
      });
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) {
      const float* from = block + (i * width + j) * kLanes;
      float* to = x + (first + i) * s.row + j * s.column;
      if (s.access == Access::kAny)
        for (int c = 0; c < lanes; ++c) to[c * s.channel] = from[c];
      else if (lanes == kLanes)
        store(to, load(from));
      else
        store_tail(to, load(from), lanes);
    }
}

// ---- the convolution -----------------------------------------------------------------------------------------------

struct Taps {
  FloatReg w[9];
};

// Kernel element t of a block's channels; in reverse order for the transposed convolution.
FFLFAST_INLINE Taps load_taps(const FusionPlan& plan, int64_t channel, bool reverse) {
  Taps taps;
  for (int t = 0; t < 9; ++t) taps.w[t] = load(plan.taps + (reverse ? 8 - t : t) * plan.spaced + channel);
  return taps;
}

template <int N, class Body>
FFLFAST_INLINE void convolve_pixels(const Taps& taps, const float* x, int64_t pitch, int64_t column, const Body& body) {
  FloatReg h[N];
  x += column * kLanes;
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) h[n] = taps.w[0] * load(x + n * kLanes);
#pragma GCC unroll 8
  for (int t = 1; t < 9; ++t) {
    const float* from = x + t / 3 * pitch + t % 3 * kLanes;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) h[n] = fma(taps.w[t], load(from + n * kLanes), h[n]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) body(column + n, h[n]);
}

// body(column, h) for each pixel of a row, left to right: one expression in every pass, so that signs agree.
template <class Body>
FFLFAST_INLINE void convolve_row(const Taps& taps, const Tile& tile, int64_t row, const Body& body) {
  const float* x = tile.at(row - 1, -1);
  const int64_t pitch = tile.pitch();
  int64_t j = 0;
  for (; j + 4 <= tile.width; j += 4) convolve_pixels<4>(taps, x, pitch, j, body);
  if (tile.width - j == 3) convolve_pixels<3>(taps, x, pitch, j, body);
  if (tile.width - j == 2) convolve_pixels<2>(taps, x, pitch, j, body);
  if (tile.width - j == 1) convolve_pixels<1>(taps, x, pitch, j, body);
}

}  // namespace FFLFAST_ISA
}  // namespace fflfast
