// Outliers of rows that are rounded, to int8 or bf16: the few columns so far beyond the rest of their row that whole
// numbers would leave the rest nothing, and that the 8 bits of a bf16 are wrong by more than the rest holds. They are
// taken out of the row before it is rounded, and join the product in float32 (Dettmers et al. 2022, arXiv:2208.07339,
// who choose columns of a batch; here each row has its own, so that rows do not depend on each other):
//
//   x projectionᵀ = x' projectionᵀ + Σ_k x_k projection[:, k]      x' = x without its outliers k
//
// A row has them where its largest magnitude is beyond kFar times its mean one: a step of the whole numbers is then a
// tenth of what the other columns hold. One outlier costs D multiplications, beside the D h of the row's product.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "simd.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int kMostOutliers = 32;
constexpr float kFar = 12.0f;
constexpr float kNearby = 0.25f;  // outliers are taken with all that are at least this part of the largest

struct Outliers {
  int32_t count;
  int32_t columns[kMostOutliers];
  float values[kMostOutliers];
};

// Largest magnitude and sum of magnitudes of a row, or of what is left of it.
struct Extent {
  float edge, total;
  bool far(int64_t columns) const { return edge * static_cast<float>(columns) > kFar * total; }  // not where NaN or Inf
};

// Takes outliers out of a row of `extent`, `values(i)` giving kWidth columns at a time; the extent of what is left. All
// of one size are taken or none, so at most kMostOutliers.
template <class Values>
Extent take_outliers(int64_t columns, Extent extent, Values&& values, Outliers& out) {
  out.count = 0;
  while (extent.far(columns)) {
    const float limit = extent.edge, from = kNearby * limit;
    Extent rest{0.0f, 0.0f};
    int found = out.count;
    for (int64_t i = 0; i < columns; i += kWidth) {
      float x[kWidth];
      store(x, values(i));
      for (int j = 0; j < kWidth; ++j) {
        const float size = x[j] < 0.0f ? -x[j] : x[j];
        if (size > limit) continue;  // taken before
        if (size <= from) {
          rest.edge = size > rest.edge ? size : rest.edge;
          rest.total += size;
        } else if (found == kMostOutliers) {
          return extent;
        } else {
          out.columns[found] = static_cast<int32_t>(i + j);
          out.values[found++] = x[j];
        }
      }
    }
    out.count = found;
    extent = rest;
  }
  return extent;
}

inline float weight_value(int8_t weight) { return static_cast<float>(weight); }
inline float weight_value(uint16_t weight) { return bf16_to_float(weight); }

// acc (rows × 64) += the outliers of each row times their columns of one panel of W's, int8 with its scales.
template <class W>
void add_outliers(int rows, const Outliers* outliers, const typename W::Store* panel, const float* scale, float* acc) {
  for (int r = 0; r < rows; ++r) {
    const Outliers& own = outliers[r];
    for (int k = 0; k < own.count; ++k) {
      const auto* weights = panel + own.columns[k] / W::kStep * (W::kStep * kPanel) + own.columns[k] % W::kStep;
      for (int c = 0; c < kPanel; ++c) {
        const float weight = weight_value(weights[W::kStep * c]);
        acc[r * kPanel + c] += own.values[k] * (scale == nullptr ? weight : weight * scale[c]);
      }
    }
  }
}

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
