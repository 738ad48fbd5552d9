// The stages the kernels share: hidden rows → layer → features, and the triangular product.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "activations.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "streams.h"
#include "workspace.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int64_t kRowGroup = 192;  // rows of one panel task: 48 KB of accumulators, beside a weight block in L2
constexpr float kLayerNormEps = 1e-5f;

// -- layer and features -----------------------------------------------------------------------------------------------

// Buffers of the feature stages for `rows` rows at a time.
template <class W>
struct FeatureBuffers {
  using Act = typename W::Act;
  Act* hidden;         // (rows, h), then their low terms where there are two
  float* layer;        // (rows, m)
  Act* activated;      // (rows, m)
  int64_t hidden_low;  // from a row to its low term, or 0
  int64_t hidden_stride, layer_stride, activated_stride;
  float* hidden_factor;                                    // (rows), int8 only
  float* hidden_low_factor;                                // (rows), of their low terms
  Outliers* outliers;                                      // (rows), nullptr where nothing is rounded
  Workspace::PerThread<float> acc;                         // (rows of a task, 64)
  Workspace::PerThread<typename Wide<W>::Store> scratch;   // (kConvertDepth, 64)
  Workspace::PerThread<float> low_acc;                     // (rows of a task, 64), int8 in two terms only
  uint16_t *hidden_across, *low_across, *features_across;  // pairs of bytes laid across (saturation.h), I8U only
  int64_t across_stride;
};

template <class W>
FeatureBuffers<W> take_feature_buffers(Workspace& workspace, const Map& map, const Rows& hidden, int64_t rows,
                                       int64_t task_rows, int threads) {
  using Act = typename W::Act;
  FeatureBuffers<W> b{};
  const bool two = two_terms<W>(map, hidden);
  b.hidden_stride = act_stride<Act>(map.hidden);
  b.hidden_low = two ? rows * b.hidden_stride : 0;
  b.hidden = workspace.take<Act>(rows * b.hidden_stride * (two ? 2 : 1));
  if (kInt8<W>) {
    b.hidden_factor = workspace.take<float>(rows);
    b.hidden_low_factor = workspace.take<float>(rows);
    if (two) b.low_acc = workspace.take_each<float>(threads, task_rows * kPanel);
  }
  if constexpr (kSaturates<W>) {
    b.across_stride = across_stride(rows);
    b.hidden_across = workspace.take<uint16_t>(round_up(map.hidden, 4) / 2 * b.across_stride);
    if (two) b.low_across = workspace.take<uint16_t>(round_up(map.hidden, 4) / 2 * b.across_stride);
    b.features_across = workspace.take<uint16_t>(round_up(map.features, 4) / 2 * b.across_stride);
  }
  if (rounds<W>(hidden)) b.outliers = workspace.take<Outliers>(rows);
  if (map.layer != nullptr) {
    b.layer_stride = act_stride<float>(map.layer_size);
    b.activated_stride = act_stride<Act>(map.layer_size);
    b.layer = workspace.take<float>(rows * b.layer_stride);
    b.activated = workspace.take<Act>(rows * b.activated_stride);
  }
  b.acc = workspace.take_each<float>(threads, task_rows * kPanel);
  b.scratch = workspace.take_each<typename Wide<W>::Store>(threads, kConvertDepth * kPanel);
  return b;
}

// z of a row: + bias, tanh, layer norm; rounded to Act for the next product.
template <class Act>
void finish_layer_row(const Map& map, float* z, Act* out) {
  const int64_t m = map.layer_size;
  if (map.tanh) {
    // tanh saturates: an infinite hidden value would come out as a confident answer. z − z keeps it from that.
    for (int64_t i = 0; i < m; ++i) z[i] = std::tanh(z[i]) + (z[i] - z[i]);
  }
  if (map.layernorm) {
    Vec total = zero();
    int64_t i = 0;
    for (; i + kWidth <= m; i += kWidth) total = add(total, load(z + i));
    float mean = sum(total);
    for (; i < m; ++i) mean += z[i];
    mean /= static_cast<float>(m);
    total = zero();
    for (i = 0; i + kWidth <= m; i += kWidth) {
      const Vec d = sub(load(z + i), splat(mean));
      total = fma(d, d, total);
    }
    float variance = sum(total);
    for (; i < m; ++i) variance += (z[i] - mean) * (z[i] - mean);
    const float scale = 1.0f / std::sqrt(variance / static_cast<float>(m) + kLayerNormEps);
    for (i = 0; i < m; ++i) z[i] = (z[i] - mean) * scale;
  }
  for (int64_t i = m; i < round_up(m, kPanel); ++i) z[i] = 0.0f;
  for (int64_t i = 0; i < round_up(m, kPanel); i += kWidth) store_act(out + i, load(z + i));
}

// acc (rows × 64) ← features of one panel, in place: t = acc + phase, then cos 2πt where the map has it.
inline void finish_features(const Map& map, int64_t panel, int rows, float* acc) {
  const float* phase = map.phase + panel * kPanel;
  for (int c = 0; c < kPanel; c += kWidth) {
    const Vec offset = load(phase + c);
    if (map.cosine) {
      for (int r = 0; r < rows; ++r) store(acc + r * kPanel + c, cos_turns(add(load(acc + r * kPanel + c), offset)));
    } else {
      for (int r = 0; r < rows; ++r) store(acc + r * kPanel + c, add(load(acc + r * kPanel + c), offset));
    }
  }
}

// Dot products of the rows of a feature tile with β: partial[r] = Σ_c tile[r, c] β[c].
inline void beta_product(int rows, const float* tile, const float* beta, float* partial) {
  for (int r = 0; r < rows; ++r) {
    Vec total = zero();
    for (int c = 0; c < kPanel; c += kWidth) total = fma(load(tile + r * kPanel + c), load(beta + c), total);
    partial[r] = sum(total);
  }
}

// What one panel's int8 product with rows from `first` on comes with; `across` are the rows' pairs.
template <class W>
Scales scales_of(const Quantized& matrix, int64_t panel, const float* row_factors, int64_t first,
                 const uint16_t* across, int64_t across_stride) {
  if constexpr (kInt8<W>) {
    const int64_t column = panel * kPanel;
    Saturating saturating{};
    if (kSaturates<W>) saturating = {matrix.far_first + column, matrix.far_pairs, across + first, across_stride};
    return {matrix.scale + column, matrix.sum + column, row_factors + first, saturating};
  } else {
    return {};
  }
}

// A stage: `count` rows of `columns` bytes to pairs that are laid across.
template <class Act>
void lay_rows_across(Team& team, const Act* rows, int64_t stride, int64_t count, int64_t columns, uint16_t* across,
                     int64_t across_stride) {
  constexpr int64_t kPairs = 256;  // of a task
  const int64_t pairs = round_up(columns, 4) / 2;
  team.each(ceil_div(pairs, kPairs), [&](int64_t task) {
    lay_across(rows, stride, count, task * kPairs, minimum((task + 1) * kPairs, pairs), across, across_stride);
  });
}

// acc += what was taken out of rows first … first + rows of hidden states.
template <class W>
void join_outliers(const FeatureBuffers<W>& b, int rows, int64_t first, const typename W::Store* weights,
                   const float* scale, float* acc) {
  if constexpr (!Same<typename W::Act, float>::value) {
    if (b.outliers != nullptr) add_outliers<W>(rows, b.outliers + first, weights, scale, acc);
  }
}

// Walks one group of rows through the stages up to c. `emit(tile, panel, first, n)` receives c of rows first..first+n
// (within the group) for one panel of 64 columns, (n, 64) contiguous, in the claiming thread; every (row, panel) once.
// `task_rows` bounds n. Ends with all threads met.
template <class W, class Emit>
void feature_stages(Team& team, const Map& map, const Rows& rows, int64_t start, int64_t count, int64_t task_rows,
                    const FeatureBuffers<W>& b, Emit&& emit) {
  using Act = typename W::Act;
  const int64_t groups = ceil_div(count, task_rows);
  float* acc = b.acc[team.rank()];
  auto* scratch = b.scratch[team.rank()];

  if (map.projection == nullptr && map.layer == nullptr) {  // c = s x: nothing to multiply
    const int64_t panels = panels_of(map.hidden);
    team.each(panels * groups, [&](int64_t task) {
      const int64_t panel = task / groups, first = task % groups * task_rows;
      const int64_t n = minimum(task_rows, count - first);
      for (int64_t r = 0; r < n; ++r) {
        for (int c = 0; c < kPanel; ++c) {
          const int64_t column = panel * kPanel + c;
          const int64_t index = (start + first + r) * rows.row_stride + column * rows.col_stride;
          acc[r * kPanel + c] = column < map.hidden ? element(rows, index) * map.input_scale : 0.0f;
        }
      }
      emit(acc, panel, first, n);
    });
    return;
  }

  team.each(count, [&](int64_t r) {
    Act* row = b.hidden + r * b.hidden_stride;
    const RowValues values(map, rows, start + r);
    Outliers* outliers = b.outliers == nullptr ? nullptr : b.outliers + r;
    if constexpr (kInt8<W>) {
      b.hidden_factor[r] = load_row_int8(values, map.hidden, row, b.hidden_low, *outliers);
      b.hidden_low_factor[r] = b.hidden_factor[r] * kLowTerm;
    } else {
      load_row(values, map.hidden, row, b.hidden_low, outliers);
    }
  });

  if constexpr (kSaturates<W>) {
    lay_rows_across(team, b.hidden, b.hidden_stride, count, map.hidden, b.hidden_across, b.across_stride);
    if (b.hidden_low != 0) {
      lay_rows_across(team, b.hidden + b.hidden_low, b.hidden_stride, count, map.hidden, b.low_across, b.across_stride);
    }
  }

  const Act* input = b.hidden;
  int64_t input_stride = b.hidden_stride, low = b.hidden_low;
  int64_t depth = map.hidden;
  if (map.layer != nullptr) {
    const int64_t panels = panels_of(map.layer_size);
    const int k = static_cast<int>(round_up(depth, W::kStep));
    team.each(panels * groups, [&](int64_t task) {
      const int64_t panel = task / groups, first = task % groups * task_rows;
      const int64_t n = minimum(task_rows, count - first);
      const auto* weights = static_cast<const typename W::Store*>(map.layer) + panel * k * kPanel;
      panel_product<W>(static_cast<int>(n), input + first * input_stride, input_stride, low, weights, k, {}, acc,
                       scratch, nullptr);
      join_outliers<W>(b, static_cast<int>(n), first, weights, nullptr, acc);
      for (int64_t r = 0; r < n; ++r) {
        for (int c = 0; c < kPanel; c += kWidth) {
          const Vec z = add(load(acc + r * kPanel + c), load(map.layer_bias + panel * kPanel + c));
          store(b.layer + (first + r) * b.layer_stride + panel * kPanel + c, z);
        }
      }
    });
    team.each(count, [&](int64_t r) {
      if constexpr (!kInt8<W>)
        finish_layer_row(map, b.layer + r * b.layer_stride, b.activated + r * b.activated_stride);
    });
    input = b.activated;
    input_stride = b.activated_stride;
    low = 0;
    depth = map.layer_size;
  }

  if (map.projection == nullptr) {  // c = z
    const int64_t panels = panels_of(map.layer_size);
    team.each(panels * groups, [&](int64_t task) {
      const int64_t panel = task / groups, first = task % groups * task_rows;
      const int64_t n = minimum(task_rows, count - first);
      for (int64_t r = 0; r < n; ++r) {
        std::memcpy(acc + r * kPanel, b.layer + (first + r) * b.layer_stride + panel * kPanel, sizeof(float) * kPanel);
      }
      emit(acc, panel, first, n);
    });
    return;
  }

  const int64_t tasks = panels_of(map.features) * groups;
  const int k = static_cast<int>(round_up(depth, W::kStep));
  const auto* projection = static_cast<const typename W::Store*>(map.projection);
  const auto scales = [&](int64_t panel, int64_t first, bool low_term) {
    return scales_of<W>(map.projection_int8, panel, low_term ? b.hidden_low_factor : b.hidden_factor, first,
                        low_term ? b.low_across : b.hidden_across, b.across_stride);
  };
  const auto finish = [&](int64_t panel, int64_t first, int64_t n, float* sums) {
    if (map.layer == nullptr) {  // outliers are those of the hidden states
      const float* scale = kInt8<W> ? map.projection_int8.scale + panel * kPanel : nullptr;
      join_outliers<W>(b, static_cast<int>(n), first, projection + panel * k * kPanel, scale, sums);
    }
    finish_features(map, panel, static_cast<int>(n), sums);
    emit(sums, panel, first, n);
  };
  if constexpr (kStreamed<W>) {
    if (count == 1 && (kInt8<W> || low == 0)) {
      one_row_stage<W>(
          team, tasks, input, low, [&](int64_t panel) { return Stream<W>{projection + panel * k * kPanel, k}; },
          [&](int64_t panel, float* sums, float* low_sums) {
            if constexpr (kInt8<W>) {
              finish_product<W>(1, scales(panel, 0, false), sums);
              if (low != 0) {
                finish_product<W>(1, scales(panel, 0, true), low_sums);
                for (int c = 0; c < kPanel; c += kWidth) store(sums + c, add(load(sums + c), load(low_sums + c)));
              }
            }
            finish(panel, 0, 1, sums);
          });
      return;
    }
  }
  team.each_ahead(tasks, [&](int64_t task, int64_t following) {  // the next one's weights are asked for early
    const int64_t panel = task / groups, first = task % groups * task_rows;
    const int64_t n = minimum(task_rows, count - first);
    const auto* next = following < tasks ? projection + following / groups * k * kPanel : nullptr;
    const auto product = [&](int64_t from, int64_t two, float* to, const void* ahead) {
      panel_product<W>(static_cast<int>(n), input + first * input_stride + from, input_stride, two,
                       projection + panel * k * kPanel, k, scales(panel, first, from != 0), to, scratch, ahead);
    };
    if (kInt8<W> && low != 0) {  // whole numbers of different sizes are summed apart
      float* low_acc = b.low_acc[team.rank()];
      product(0, 0, acc, nullptr);
      product(low, 0, low_acc, next);
      for (int64_t i = 0; i < n * kPanel; i += kWidth) store(acc + i, add(load(acc + i), load(low_acc + i)));
    } else {
      product(0, low, acc, next);
    }
    finish(panel, first, n, acc);
  });
}

// -- the triangular product -------------------------------------------------------------------------------------------

// Depth of factor panel p (its diagonal, whole steps) and where it starts, in elements.
inline int64_t factor_depth(int64_t size, int64_t panel, int step) {
  return minimum((panel + 1) * kPanel, round_up(size, step));
}
inline int64_t factor_offset(int64_t panel) {
  return static_cast<int64_t>(kPanel) * kPanel * (panel * (panel + 1) / 2);
}

// int8 factors keep their diagonal apart, in float32: y[r, c] += diagonal[c] c_r[c] for the panel's 64 columns. It is a
// hundred times the rest of a row, and would leave the rest no digits.
template <class Act>
void add_diagonal(const float* diagonal, const Act* c, int64_t stride, const float* c_factor, int rows, float* acc) {
  for (int j = 0; j < kPanel; j += kWidth) {
    const Vec d = load(diagonal + j);
    for (int r = 0; r < rows; ++r) {
      float* y = acc + r * kPanel + j;
      store(y, fma(mul(d, splat(c_factor[r])), load_whole(c + r * stride + j), load(y)));
    }
  }
}

// y = U c by panels, longest first; `c_factor` are the factors of int8 rows c. `emit(tile, panel, first, n)` receives y
// as feature_stages does c.
template <class W, class Emit>
void factor_stage(Team& team, const Head& head, const typename W::Act* c, int64_t stride, const float* c_factor,
                  int64_t count, int64_t task_rows, const FeatureBuffers<W>& b, Emit&& emit) {
  const int64_t size = head.map.features;
  const auto* factor = static_cast<const typename W::Store*>(head.factor);
  const int64_t groups = ceil_div(count, task_rows), panels = panels_of(size), tasks = panels * groups;
  if constexpr (kSaturates<W>) {
    lay_rows_across(team, c, stride, count, size, b.features_across, b.across_stride);
  }
  const auto finish = [&](int64_t panel, int64_t first, int64_t n, float* y) {
    if constexpr (kInt8<W>) {
      add_diagonal(head.factor_diagonal + panel * kPanel, c + first * stride + panel * kPanel, stride, c_factor + first,
                   static_cast<int>(n), y);
    }
    emit(y, panel, first, n);
  };
  const auto scales = [&](int64_t panel, int64_t first) {
    return scales_of<W>(head.factor_int8, panel, c_factor, first, b.features_across, b.across_stride);
  };
  const auto depth = [&](int64_t panel) { return static_cast<int>(factor_depth(size, panel, W::kStep)); };
  if constexpr (kStreamed<W>) {
    if (count == 1) {
      one_row_stage<W>(
          team, panels, c, 0,
          [&](int64_t i) { return Stream<W>{factor + factor_offset(panels - 1 - i), depth(panels - 1 - i)}; },
          [&](int64_t i, float* y, float*) {
            if constexpr (kInt8<W>) finish_product<W>(1, scales(panels - 1 - i, 0), y);
            finish(panels - 1 - i, 0, 1, y);
          });
      return;
    }
  }
  team.each_ahead(tasks, [&](int64_t task, int64_t following) {
    const int64_t panel = panels - 1 - task / groups, first = task % groups * task_rows;
    const int64_t n = minimum(task_rows, count - first);
    const auto* next = following < tasks ? factor + factor_offset(panels - 1 - following / groups) : nullptr;
    float* acc = b.acc[team.rank()];
    panel_product<W>(static_cast<int>(n), c + first * stride, stride, 0, factor + factor_offset(panel), depth(panel),
                     scales(panel, first), acc, b.scratch[team.rank()], next);
    finish(panel, first, n, acc);
  });
}

// Calls `run.template operator()<W>()` for the weight type of `dtype`.
template <class Run>
size_t with_weight_type(Dtype dtype, Run&& run) {
  switch (dtype) {
    case Dtype::f16:
      return run(F16{});
    case Dtype::bf16:
      return run(BF16{});
    default:
      return run(F32{});
  }
}

// The same for the kernels that also take int8 weights, which are multiplied in another way where many rows share them.
template <class Run>
size_t with_any_weight_type(Dtype dtype, int64_t rows, Run&& run) {
  if (dtype != Dtype::i8) return with_weight_type(dtype, run);
  return rows >= kConvertRows ? run(ManyI8{}) : run(I8{});
}

// Rows of one task, so that a short list of panels still keeps every thread busy.
inline int64_t choose_task_rows(int64_t count, int64_t panels, int threads) {
  const int64_t groups = maximum(ceil_div(count, kRowGroup), ceil_div(2 * threads, panels));
  return maximum(ceil_div(count, groups), minimum(count, 4 * kRowBlock));
}

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
