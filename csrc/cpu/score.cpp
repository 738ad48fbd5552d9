// score: hidden rows → logit, variance, uncertainty, preference.
//
//   t = (s x) projectionᵀ + phase      c = cos 2πt         (B, D)   (unfolded: z = norm(tanh((s x) layerᵀ + b)) first)
//   g = βᵀ c + β₀                      v = α ‖U c‖²        (B)      u = √(1 + a v)    p = g / u
//
//   in   hidden (B, h) any dtype and strides; projection (D, h), U (D, D) lower, as panels (pack.cpp); β, phase (D)
//   out  (4, B) float32: g, v, u, p
//
// Bytes: one read of the weights, e (D h + D (D + 64) / 2) for e bytes an element, per kChunkRows rows (h = D = 4096 in
// 16 bits: 50.9 MB). FLOP: 2 B (D h + D² / 2). Memory-bound up to B ≈ 12 in bf16 on two AVX-512 cores.
//
// Rows go in chunks whose activations stay in the outer cache. Two stages, each a list of panels that threads claim:
// product with a projection panel, then cosine and β-dot while the 64 columns are in the first cache, c rounded to the
// product's operand; product with a factor panel, longest first, squared and summed on the spot. β meets c before it is
// rounded. Sums over panels are taken in a fixed order at the end, so results depend neither on the number of threads
// nor on which rows share a call. A non-finite row spoils its own results only.
//
// int8 weights: rows and c as whole numbers with a factor a row (gemm.h), the outliers of a row apart (outliers.h),
// rows in two terms where 2 h ≤ D, the diagonal of U apart in float32. β meets c before it is rounded. Half the bytes
// and half the time, with VNNI or without.
//
// Operands: bf16 weights with AVX-512 bf16 dot products take rows and c rounded to bf16 (float32 and fp16 rows in two
// bf16 terms where 2 h ≤ D); every other combination multiplies in float32 with rows and c unrounded. Largest relative
// error of u on a MiniLM head (h = 385, D = 1024, ridge 1, rows float32): 8e-5 bf16, 2e-4 with rows in one term, 1e-7
// fp16; largest error of g 2e-5, 9e-3, 6e-7. int8 on the demo's head (h = 385, D = 1024, κ = 3, pairs): u 3e-4, g 1e-4.
#include <cmath>

#include "kernels.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int64_t kChunkRows = 384;  // rows per pass over the weights: hidden and c take 6 MB in bf16 at h = D = 4096

template <class W>
size_t score_chunks(const Head& head, const Rows& rows, float* out, int threads, void* memory) {
  using Act = typename W::Act;
  const Map& map = head.map;
  const int64_t total = rows.count, panels = panels_of(map.features);
  const int64_t chunk = ceil_div(total, ceil_div(total, kChunkRows));
  const int64_t task_rows = choose_task_rows(chunk, panels, threads);

  Workspace workspace(memory);
  const auto buffers = take_feature_buffers<W>(workspace, map, rows, chunk, task_rows, threads);
  const int64_t stride = act_stride<Act>(map.features);
  auto* c = workspace.take<Act>(chunk * stride);
  auto* logits = workspace.take<float>(chunk * panels);     // (panel, row)
  auto* variances = workspace.take<float>(chunk * panels);  // (panel, row)
  auto* c_factor = kInt8<W> ? workspace.take<float>(chunk) : nullptr;
  if (workspace.counting()) return workspace.used();

  for (int64_t r = 0; kInt8<W> && r < chunk; ++r) c_factor[r] = 1.0f / kWhole;

  parallel(threads, [&](Team& team) {
    for (int64_t start = 0; start < total; start += chunk) {
      const int64_t count = minimum(chunk, total - start);
      feature_stages<W>(team, map, rows, start, count, task_rows, buffers,
                        [&](const float* tile, int64_t panel, int64_t first, int64_t n) {
                          beta_product(static_cast<int>(n), tile, head.beta + panel * kPanel,
                                       logits + panel * chunk + first);
                          Act* to = c + first * stride + panel * kPanel;
                          for (int64_t r = 0; r < n; ++r) {
                            for (int j = 0; j < kPanel; j += kWidth) {
                              store_feature<W>(to + r * stride + j, load(tile + r * kPanel + j));
                            }
                          }
                        });
      factor_stage<W>(team, head, c, stride, c_factor, count, task_rows, buffers,
                      [&](const float* tile, int64_t panel, int64_t first, int64_t n) {
                        for (int64_t r = 0; r < n; ++r) {
                          Vec squares = zero();
                          for (int j = 0; j < kPanel; j += kWidth) {
                            const Vec y = load(tile + r * kPanel + j);
                            squares = fma(y, y, squares);
                          }
                          variances[panel * chunk + first + r] = sum(squares);
                        }
                      });
      team.each(count, [&](int64_t r) {
        float g = 0.0f, v = 0.0f;
        for (int64_t p = 0; p < panels; ++p) {
          g += logits[p * chunk + r];
          v += variances[p * chunk + r];
        }
        g += head.beta0;
        v *= head.factor_scale;
        if (kInt8<W>) v += g - g;  // whole numbers know no NaN
        const float u = std::sqrt(1.0f + head.amplitude * v);
        out[start + r] = g;
        out[total + start + r] = v;
        out[2 * total + start + r] = u;
        out[3 * total + start + r] = g / u;
      });
    }
  });
  return workspace.used();
}

}  // namespace

size_t score(const Head& head, const Rows& rows, float* out, int threads, void* workspace) {
  if (rows.count == 0) return 0;
  return with_any_weight_type(head.map.dtype, rows.count, [&](auto weight) {
    return score_chunks<decltype(weight)>(head, rows, out, threads, workspace);
  });
}

}  // namespace rmcore::cpu::RMCORE_ISA
