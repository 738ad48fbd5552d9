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
// in order, so the result depends on neither.
#include <cmath>

#include "kernels.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int64_t kParts = 64;
constexpr int kTogether = 4;      // rows whose w contributions share one pass over w
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

template <class W>
float row_dot(const typename W::Store* w, const float* v, int64_t n) {
  Vec total[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) total[j] = fma(load_weights<W>(w + i + j * kWidth), load(v + i + j * kWidth), total[j]);
  }
  for (; i + kWidth <= n; i += kWidth) total[0] = fma(load_weights<W>(w + i), load(v + i), total[0]);
  float result = sum(add(add(total[0], total[1]), add(total[2], total[3])));
  for (; i < n; ++i) result += weight_at<W>(w + i) * v[i];
  return result;
}

// sums += Σ_r y_r W_r over `rows` ≤ kTogether rows.
template <class W>
void add_rows(const typename W::Store* w, int64_t row_stride, int rows, const float* y, float* sums, int64_t n) {
  const typename W::Store* at[kTogether];
  float factor[kTogether];
  for (int r = 0; r < kTogether; ++r) {
    at[r] = w + (r < rows ? r : 0) * row_stride;
    factor[r] = r < rows ? y[r] : 0.0f;
  }
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    Vec total = load(sums + i);
    for (int r = 0; r < kTogether; ++r) total = fma(load_weights<W>(at[r] + i), splat(factor[r]), total);
    store(sums + i, total);
  }
  for (; i < n; ++i) {
    for (int r = 0; r < rows; ++r) sums[i] += weight_at<W>(at[r] + i) * factor[r];
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
          float y[kTogether];
          for (int r = 0; r < rows; ++r) {
            y[r] = row_dot<W>(weight + (row + r) * row_stride, vector, n);
            total += static_cast<double>(y[r]) * y[r];
          }
          add_rows<W>(weight + row * row_stride, row_stride, rows, y, own, n);
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
