// Matrix products of float32 by PyTorch's own mm, cut into blocks by their shape alone, a block a thread: a BLAS that
// divides one product among its threads gives other bits for each number of them.
#pragma once

#include <atomic>
#include <exception>

#include "../shim.h"

namespace fflfast {

struct Matrix {
  float* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix block(int64_t row, int64_t count, int64_t column, int64_t columns_) const {
    return {data + row * row_stride + column * column_stride, count, columns_, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  int64_t numel() const { return rows * columns; }
};

inline Matrix rows_of(float* data, int64_t rows, int64_t columns) { return {data, rows, columns, columns, 1}; }

inline Tensor view_of(const Matrix& m) {
  const int64_t sizes[2] = {m.rows, m.columns}, strides[2] = {m.row_stride, m.column_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(m.data, 2, sizes, strides, 0, code_of(Dtype::kFloat32),
                                                            aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
  StableIValue stack[3] = {torch::stable::detail::from(view_of(a)), torch::stable::detail::from(view_of(b)),
                           torch::stable::detail::from(view_of(out))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that came back
}

// Calls task(k) for k in [0, count), each on one thread, and there a BLAS leaves its own threads alone: it does so
// inside a parallel region, which even a single task must have. Throws what a task threw.
template <class Task>
inline void run_tasks(int64_t count, const Task& task) {
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
  parallel_for(count > 1 ? count : 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < (end < count ? end : count); ++k) {
      try {
        task(k);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    }
  });
  if (failed) std::rethrow_exception(failure);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low || high < low ? low : value < high ? value : high;
}

// The largest power of two of pieces of at least `least`, at most `most`: such counts divide well among threads.
inline int64_t pieces(int64_t size, int64_t least, int64_t most) {
  int64_t count = 1;
  while (2 * count <= most && size >= 2 * count * least) count *= 2;
  return count;
}

// How a product of (rows, inner)·(inner, columns) is cut.
struct Cut {
  int64_t rows, columns, inner;  // pieces each way
};

// Blocks of at least 8 million operations, some 100 µs, at most 64 of them, and of 384 rows and columns: each block
// copies its part of both factors, which smaller ones would feel. Where one side is short, its copies cost little.
inline Cut cut_product(int64_t rows, int64_t inner, int64_t columns) {
  constexpr int64_t kOperations = 8'000'000, kTasks = 64, kBlock = 384, kShort = 128;
  const double operations = 2.0 * static_cast<double>(rows) * static_cast<double>(inner) * static_cast<double>(columns);
  const int64_t tasks = operations >= kTasks * kOperations ? kTasks : static_cast<int64_t>(operations) / kOperations;
  Cut cut{};
  cut.rows = pieces(rows, columns <= kShort ? kShort : kBlock, tasks);
  cut.columns = pieces(columns, rows < kBlock ? kShort : kBlock, tasks / cut.rows);
  cut.inner = pieces(inner, kBlock, tasks / (cut.rows * cut.columns));
  return cut;
}

// out = a·b.
inline void product(const Matrix& a, const Matrix& b, const Matrix& out) {
  const Cut cut = cut_product(out.rows, a.columns, out.columns);
  const int64_t rows = ceil_div(out.rows, cut.rows), columns = ceil_div(out.columns, cut.columns);
  run_tasks(cut.rows * cut.columns, [&](int64_t task) {
    const int64_t row = task % cut.rows * rows, column = task / cut.rows * columns;
    const int64_t m = clamp(out.rows - row, 0, rows), n = clamp(out.columns - column, 0, columns);
    if (m == 0 || n == 0) return;
    multiply(a.block(row, m, 0, a.columns), b.block(0, b.rows, column, n), out.block(row, m, column, n));
  });
}

// out = Σ of the parts, `size` numbers each, or += where `add`; in their order.
inline void add_parts(const float* part, int64_t count, int64_t size, bool add, float* out) {
  parallel_for(size, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float total = add ? out[i] : 0.0f;
      for (int64_t k = 0; k < count; ++k) total += part[k * size + i];
      out[i] = total;
    }
  });
}

// out = a·b, or += where `add`, for a long sum over few rows and columns: it is cut too, its parts added in order.
inline void long_product(const Matrix& a, const Matrix& b, const Matrix& out, bool add) {
  constexpr int64_t kPartNumbers = int64_t{1} << 20;
  Cut cut = cut_product(out.rows, a.columns, out.columns);
  while (cut.inner > 1 && cut.inner * out.numel() > kPartNumbers) cut.inner /= 2;
  const int64_t rows = ceil_div(out.rows, cut.rows), columns = ceil_div(out.columns, cut.columns);
  const int64_t inner = ceil_div(a.columns, cut.inner);
  const int64_t parts = ceil_div(a.columns, inner);
  const bool direct = parts == 1 && !add;
  const std::unique_ptr<float[]> memory(direct ? nullptr : new float[parts * out.numel()]);
  run_tasks(cut.rows * cut.columns * parts, [&](int64_t task) {
    const int64_t part = task % parts, block = task / parts;
    const int64_t row = block % cut.rows * rows, column = block / cut.rows * columns, first = part * inner;
    const int64_t m = clamp(out.rows - row, 0, rows), n = clamp(out.columns - column, 0, columns);
    const int64_t k = clamp(a.columns - first, 0, inner);
    if (m == 0 || n == 0) return;
    const Matrix to = direct ? out : rows_of(memory.get() + part * out.numel(), out.rows, out.columns);
    multiply(a.block(row, m, first, k), b.block(first, k, column, n), to.block(row, m, column, n));
  });
  if (direct) return;
  add_parts(memory.get(), parts, out.numel(), add, out.data);
}

}  // namespace fflfast
