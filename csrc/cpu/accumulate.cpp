// accumulate: one pass over data rows into the posterior's precision and the gradient.
//
//   g = βᵀ c + β₀    p = σ(g)    w = sample_weight · p (1 − p)  (logistic)  or  sample_weight  (gaussian)
//   P += f² Σ_n w_n c_n c_nᵀ  (lower triangle)     gradient += f Σ_n sample_weight_n (y_n − p_n) c_n
//   returns Σ_n sample_weight_n (y_n log p_n + (1 − y_n) log(1 − p_n))     f = feature_scale
//
//   in   hidden (N, h), c from its rows; or, with pairs (N, 2), c_n = c[first] − c[second] of features (R, D) float32
//        labels, sample_weight (N); β (D) for c
//   out  P (D, D) and gradient (D), each float32 or float64, added to; the log-likelihood, float64
//
// FLOP: 2 N D h + N D². Bytes: the weights once and the lower half of P read and written once per chunk of rows.
//
// A chunk of rows is taken through four stages: features; w and residual of each row; √w c laid out as panels over
// rows, with the gradient on the way; lower 64 × 64 tiles of the Gram matrix. Both operands of a tile are the same
// rounded numbers, so each chunk adds a positive semi-definite matrix. They are bf16 for bf16 heads where the machine
// has bf16 dot products, float32 otherwise. A tile is summed in float32 over one chunk, then added to P in P's own
// type.
#include <cmath>

#include "kernels.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

// Bytes of one column of √w c in a chunk: both operands of a tile stay in the second cache. In bf16 that is 2048 rows,
// and at D = 4096 c takes 32 MB and √w c 16 MB.
constexpr int64_t kColumnBytes = 4096;

// The Gram product's operand for weights W: bf16 where those are multiplied as bf16, else float.
template <class W, bool = Same<typename W::Act, float>::value>
struct GramType {
  using Type = F32;
};
template <class W>
struct GramType<W, false> {
  using Type = BF16;
};

// log σ(x) without overflow on either side.
inline double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }

// c of datum n at a column: a feature row, or the difference of two.
struct FeatureSource {
  const float* base;
  int64_t stride;
  const int64_t* pairs;

  Vec at(int64_t n, int64_t column) const {
    if (pairs == nullptr) return load(base + n * stride + column);
    return sub(load(base + pairs[2 * n] * stride + column), load(base + pairs[2 * n + 1] * stride + column));
  }
};

// √weight, residual and log-likelihood of a datum with logit g.
inline void datum_terms(const AccumulateTask& task, int64_t n, float g, float* root, float* residual,
                        double* likelihood) {
  const double y = task.labels[n], importance = task.sample_weight == nullptr ? 1.0 : task.sample_weight[n];
  const double p = 1.0 / (1.0 + std::exp(-static_cast<double>(g)));
  const double q = 1.0 / (1.0 + std::exp(static_cast<double>(g)));
  *root = static_cast<float>(std::sqrt(task.logistic ? importance * p * q : importance));
  *residual = static_cast<float>(importance * (y - p));
  *likelihood = importance * (y * log_sigmoid(g) + (1.0 - y) * log_sigmoid(-static_cast<double>(g)));
}

// √w c of rows 0..count at 64 columns → [rows][64] panel (zeros up to whole steps); returns Σ residual c in `slope`.
template <class G>
void weighted_panel(const FeatureSource& c, int64_t first, int64_t count, int64_t column, const float* root,
                    const float* residual, typename G::Store* panel, float* slope) {
  constexpr int kVecs = kPanel / kWidth;
  Vec total[kVecs];
  for (int j = 0; j < kVecs; ++j) total[j] = zero();
  for (int64_t n = 0; n < count; n += G::kStep) {
    for (int j = 0; j < kVecs; ++j) {
      Vec x[2] = {zero(), zero()};
      for (int i = 0; i < G::kStep && n + i < count; ++i) {
        const Vec value = c.at(first + n + i, column + j * kWidth);
        total[j] = fma(value, splat(residual[n + i]), total[j]);
        x[i] = mul(value, splat(root[n + i]));
      }
      if constexpr (Same<G, F32>::value) {
        store(panel + n * kPanel + j * kWidth, x[0]);
      } else {
#if defined(__AVX512BF16__)
        store_bf16_pairs(panel + n * kPanel + 2 * j * kWidth, x[0], x[1]);
#endif
      }
    }
  }
  for (int j = 0; j < kVecs; ++j) store(slope + j * kWidth, total[j]);
}

// out[i] += scale · in[i]
template <class T>
void add_scaled(T* out, const float* in, int64_t count, T scale) {
  for (int64_t i = 0; i < count; ++i) out[i] += scale * static_cast<T>(in[i]);
}

// Adds tile (64 × 64) to P at panels (i, j ≤ i), lower triangle only.
template <class T>
void add_tile(T* precision, int64_t size, int64_t i, int64_t j, const float* tile, T scale) {
  const int64_t rows = minimum(kPanel, size - i * kPanel);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t columns = i == j ? r + 1 : kPanel;
    add_scaled(precision + (i * kPanel + r) * size + j * kPanel, tile + r * kPanel, columns, scale);
  }
}

template <class W>
size_t accumulate_chunks(const Map& map, const Rows& rows, const AccumulateTask& task, int threads, void* memory) {
  using G = typename GramType<W>::Type;
  const bool from_rows = task.pairs == nullptr;
  constexpr int64_t most_rows = kColumnBytes / sizeof(typename G::Store);
  const int64_t total = task.count, chunk = ceil_div(total, ceil_div(total, most_rows));
  const int64_t panels = panels_of(map.features), tiles = panels * (panels + 1) / 2;
  const int64_t task_rows = choose_task_rows(chunk, panels, threads);
  const int64_t stride = from_rows ? act_stride<float>(map.features) : task.features_stride;
  const int64_t depth = round_up(chunk, 2);

  Workspace workspace(memory);
  const auto buffers =
      take_feature_buffers<W>(workspace, map, rows, from_rows ? chunk : 1, from_rows ? task_rows : kPanel, threads);
  float* c = from_rows ? workspace.take<float>(chunk * stride) : nullptr;
  auto* logits = workspace.take<float>(panels * chunk);  // (panel, row)
  auto* root = workspace.take<float>(chunk);
  auto* residual = workspace.take<float>(chunk);
  auto* likelihoods = workspace.take<double>(chunk);
  auto* weighted = workspace.take<typename G::Store>(panels * depth * kPanel);
  const auto tile_of = workspace.take_each<float>(threads, kPanel * kPanel);
  if (workspace.counting()) return workspace.used();

  const float scale = task.feature_scale;
  double log_likelihood = 0.0;
  parallel(threads, [&](Team& team) {
    float* tile = tile_of[team.rank()];
    for (int64_t start = 0; start < total; start += chunk) {
      const int64_t count = minimum(chunk, total - start);
      if (from_rows) {
        feature_stages<W>(
            team, map, rows, start, count, task_rows, buffers,
            [&](const float* features, int64_t panel, int64_t first, int64_t n) {
              beta_product(static_cast<int>(n), features, task.beta + panel * kPanel, logits + panel * chunk + first);
              for (int64_t r = 0; r < n; ++r) {
                std::memcpy(c + (first + r) * stride + panel * kPanel, features + r * kPanel, sizeof(float) * kPanel);
              }
            });
      }
      const FeatureSource source{from_rows ? c : task.features, stride, from_rows ? nullptr : task.pairs + 2 * start};
      team.each(count, [&](int64_t n) {
        float g = 0.0f;
        for (int64_t p = 0; p < panels; ++p) {
          if (from_rows) {
            g += logits[p * chunk + n];
          } else {
            Vec dot = zero();
            for (int64_t k = p * kPanel; k < (p + 1) * kPanel; k += kWidth)
              dot = fma(source.at(n, k), load(task.beta + k), dot);
            g += sum(dot);
          }
        }
        datum_terms(task, start + n, g + task.beta0, root + n, residual + n, likelihoods + n);
      });
      team.each(panels + 1, [&](int64_t panel) {
        if (panel == panels) {  // one task more: the likelihoods, in the order of the rows
          for (int64_t n = 0; n < count; ++n) log_likelihood += likelihoods[n];
          return;
        }
        weighted_panel<G>(source, 0, count, panel * kPanel, root, residual, weighted + panel * depth * kPanel, tile);
        const int64_t columns = minimum(kPanel, map.features - panel * kPanel);
        if (task.gradient_double) {
          add_scaled(static_cast<double*>(task.gradient) + panel * kPanel, tile, columns, static_cast<double>(scale));
        } else {
          add_scaled(static_cast<float*>(task.gradient) + panel * kPanel, tile, columns, scale);
        }
      });
      const int k = static_cast<int>(round_up(count, G::kStep));
      team.each(tiles, [&](int64_t index) {
        int64_t i = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
        while (i * (i + 1) / 2 > index) --i;
        while ((i + 1) * (i + 2) / 2 <= index) ++i;
        const int64_t j = index - i * (i + 1) / 2;
        const auto* left = weighted + i * depth * kPanel;
        const auto* right = weighted + j * depth * kPanel;
        rows_product<G, 1>(kPanel, left, G::kStep, kPanel * G::kStep, right, k, tile, false, nullptr);
        if (task.precision_double) {
          add_tile(static_cast<double*>(task.precision), map.features, i, j, tile, static_cast<double>(scale) * scale);
        } else {
          add_tile(static_cast<float*>(task.precision), map.features, i, j, tile, scale * scale);
        }
      });
    }
  });
  *task.log_likelihood = log_likelihood;
  return workspace.used();
}

}  // namespace

size_t accumulate(const Map& map, const Rows& rows, const AccumulateTask& task, int threads, void* workspace) {
  if (task.count == 0) {
    if (workspace != nullptr) *task.log_likelihood = 0.0;
    return 0;
  }
  return with_weight_type(
      map.dtype, [&](auto weight) { return accumulate_chunks<decltype(weight)>(map, rows, task, threads, workspace); });
}

}  // namespace rmcore::cpu::RMCORE_ISA
