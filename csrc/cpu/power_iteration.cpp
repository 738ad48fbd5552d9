// power_iteration: the largest singular value of W by power iteration on WᵀW.
//
//   repeat:  y = W v    σ = ‖y‖    w = Wᵀ y    v ← w / ‖w‖  (v stays where w = 0)
//
//   in   W (m, n) float32, fp16 or bf16, rows contiguous; v (n) float32, any non-zero length (normalised first)
//   out  v (n), σ: of the v each step starts from, so never above the true norm
//
// Bytes: one read of W per iteration (m n e), not two: y of a few rows is finished while they are in the cache, and
// y_i W_i is added to w at once. FLOP: 4 m n per iteration.
//
// Rows are cut into at most kParts parts, whatever the number of threads; each part sums its own w, and parts are added
// in order, so the result depends on W, v and the instruction set alone.
#include <cmath>

#include "kernels.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int64_t kParts = 64;
constexpr int kTogether = 4;      // rows that share one pass over v and one over w
constexpr int64_t kSlice = 2048;  // columns of w that one task of the reduction takes

template <class W>
inline Vec load_weights(const typename W::Store* p) {
  if constexpr (Same<W, F32>::value) {
    return load(p);
  } else if constexpr (Same<W, F16>::value) {
    return load_f16(p);
  } else {
    return load_bf16(p);
  }
}

template <class W>
inline float weight_at(const typename W::Store* p) {
  if constexpr (Same<W, F32>::value) {
    return *p;
  } else if constexpr (Same<W, F16>::value) {
    return f16_to_float(*p);
  } else {
    return bf16_to_float(*p);
  }
}

// kTogether rows from `w` on; where fewer are left, the first again in place of the missing.
template <class W>
struct RowBlock {
  const typename W::Store* row[kTogether];
  int64_t next;  // from a row to the one that takes its place in the next block

  RowBlock(const typename W::Store* w, int64_t stride, int rows) : next(kTogether * stride) {
    for (int r = 0; r < kTogether; ++r) row[r] = w + (r < rows ? r : 0) * stride;
  }
};

// Asks for `count` elements of rows first, first + 1 of the next block. Each of the two passes asks for half of it, so
// that memory never rests.
template <class W>
inline void ask_for_next(const RowBlock<W>& block, int first, int64_t i, int count) {
  for (int r = first; r < first + kTogether / 2; ++r) {
    for (int j = 0; j < count; j += 64 / static_cast<int>(sizeof(typename W::Store))) {
      __builtin_prefetch(block.row[r] + block.next + i + j, 0, 2);
    }
  }
}

// y_r = W_r v
template <class W>
void dot_rows(const RowBlock<W>& block, const float* v, int64_t n, float* y) {
  Vec total[kTogether][2];
  for (int r = 0; r < kTogether; ++r) total[r][0] = total[r][1] = zero();
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    ask_for_next(block, 0, i, 2 * kWidth);
    const Vec v0 = load(v + i), v1 = load(v + i + kWidth);
    RMCORE_UNROLL
    for (int r = 0; r < kTogether; ++r) {
      total[r][0] = fma(load_weights<W>(block.row[r] + i), v0, total[r][0]);
      total[r][1] = fma(load_weights<W>(block.row[r] + i + kWidth), v1, total[r][1]);
    }
  }
  for (int r = 0; r < kTogether; ++r) {
    y[r] = sum(add(total[r][0], total[r][1]));
    for (int64_t j = i; j < n; ++j) y[r] += weight_at<W>(block.row[r] + j) * v[j];
  }
}

// sums += Σ_r y_r W_r
template <class W>
void add_rows(const RowBlock<W>& block, const float* y, float* sums, int64_t n) {
  Vec factor[kTogether];
  for (int r = 0; r < kTogether; ++r) factor[r] = splat(y[r]);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    ask_for_next(block, kTogether / 2, i, kWidth);
    Vec total = load(sums + i);
    RMCORE_UNROLL
    for (int r = 0; r < kTogether; ++r) total = fma(load_weights<W>(block.row[r] + i), factor[r], total);
    store(sums + i, total);
  }
  for (; i < n; ++i) {
    for (int r = 0; r < kTogether; ++r) sums[i] += weight_at<W>(block.row[r] + i) * y[r];
  }
}

template <class W>
size_t iterate(const typename W::Store* weight, int64_t m, int64_t n, int64_t row_stride, int iterations, float* vector,
               float* sigma, int threads, void* memory) {
  const int64_t part_rows = round_up(ceil_div(m, kParts), kTogether), parts = ceil_div(m, part_rows);
  const int64_t stride = round_up(n, kPanel), slices = ceil_div(n, kSlice);
  Workspace workspace(memory);
  auto* sums = workspace.take<float>(parts * stride);
  auto* next = workspace.take<float>(stride);
  auto* squares = workspace.take<double>(parts);         // of y
  auto* slice_squares = workspace.take<double>(slices);  // of w
  if (workspace.counting()) return workspace.used();

  double norm = 0.0;
  for (int64_t i = 0; i < n; ++i) norm += static_cast<double>(vector[i]) * vector[i];
  norm = std::sqrt(norm);
  for (int64_t i = 0; i < n; ++i) vector[i] = static_cast<float>(vector[i] / norm);

  parallel(threads, [&](Team& team) {
    for (int step = 0; step < iterations; ++step) {
      team.each(parts, [&](int64_t part) {
        float* own = sums + part * stride;
        std::memset(own, 0, sizeof(float) * n);
        double total = 0.0;
        const int64_t end = minimum(m, (part + 1) * part_rows);
        for (int64_t row = part * part_rows; row < end; row += kTogether) {
          const int rows = static_cast<int>(minimum(kTogether, end - row));
          const RowBlock<W> block(weight + row * row_stride, row_stride, rows);
          float y[kTogether];
          dot_rows(block, vector, n, y);
          for (int r = 0; r < kTogether; ++r) {
            if (r >= rows) y[r] = 0.0f;
            total += static_cast<double>(y[r]) * y[r];
          }
          add_rows(block, y, own, n);
        }
        squares[part] = total;
      });
      team.each(slices, [&](int64_t slice) {
        const int64_t first = slice * kSlice, end = minimum(n, first + kSlice);
        double total = 0.0;
        for (int64_t i = first; i < end; ++i) next[i] = 0.0f;
        for (int64_t part = 0; part < parts; ++part) {
          for (int64_t i = first; i < end; ++i) next[i] += sums[part * stride + i];
        }
        for (int64_t i = first; i < end; ++i) total += static_cast<double>(next[i]) * next[i];
        slice_squares[slice] = total;
      });
      team.each(1, [&](int64_t) {
        double length = 0.0, y_length = 0.0;
        for (int64_t slice = 0; slice < slices; ++slice) length += slice_squares[slice];
        for (int64_t part = 0; part < parts; ++part) y_length += squares[part];
        const float scale = static_cast<float>(1.0 / std::sqrt(length));
        if (!(length == 0.0)) {
          for (int64_t i = 0; i < n; ++i) vector[i] = next[i] * scale;
        }
        *sigma = static_cast<float>(std::sqrt(y_length));
      });
    }
  });
  return workspace.used();
}

}  // namespace

size_t power_iteration(const void* weight, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int iterations,
                       float* vector, float* sigma, int threads, void* workspace) {
  return with_weight_type(dtype, [&](auto type) {
    using W = decltype(type);
    return iterate<W>(static_cast<const typename W::Store*>(weight), rows, cols, row_stride, iterations, vector, sigma,
                      threads, workspace);
  });
}

}  // namespace rmcore::cpu::RMCORE_ISA
