// pair_variance: groups of rows → logit and variance of the difference of every pair i < j of each group.
//
//   δ_i = c_i − c_first     y_i = U δ_i     g_ij = βᵀ δ_i − βᵀ δ_j     v_ij = α ‖y_i − y_j‖²
//
//   in   hidden (ΣK, h), rows of group 0, then of group 1, ...; group_sizes (G); head as in score
//   out  g, v (ΣK(K−1)/2) float32, pairs (0,1), (0,2), ..., (1,2), ... within each group
//
// FLOP: 2 ΣK (D h + D²/2) + 3 D ΣK(K−1)/2. Bytes: one read of the weights per about kChunkRows rows (whole groups).
//
// The first row of a group is taken away in float32, before anything is rounded, so that only the group's own spread is
// rounded; differences of y are summed directly, never as G_ii + G_jj − 2 G_ij. Equal rows go through the same
// arithmetic wherever they stand, so their differences are exactly zero.
#include <cmath>

#include "kernels.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int64_t kChunkRows = 256;

struct Group {
  int64_t first, size, pairs;  // first row and first pair within the chunk
};

// The next run of whole groups with at most kChunkRows rows (or one group that is larger by itself).
struct Chunk {
  int64_t groups, rows, pairs;
};
inline Chunk next_chunk(const int64_t* sizes, int64_t groups) {
  Chunk chunk{0, 0, 0};
  while (chunk.groups < groups && (chunk.rows == 0 || chunk.rows + sizes[chunk.groups] <= kChunkRows)) {
    const int64_t k = sizes[chunk.groups++];
    chunk.rows += k;
    chunk.pairs += k * (k - 1) / 2;
  }
  return chunk;
}

// tile row r → c_r − c_first(r), last row of a group first so that the first is still there.
inline void subtract_first(float* tile, const Group* groups, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float* first = tile + groups[i].first * kPanel;
    for (int64_t r = groups[i].size - 1; r >= 0; --r) {
      float* row = first + r * kPanel;
      for (int j = 0; j < kPanel; j += kWidth) store(row + j, sub(load(row + j), load(first + j)));
    }
  }
}

// partial[pair] = Σ over the tile's 64 columns of (y_i − y_j)².
inline void pair_squares(const float* tile, const Group* groups, int64_t count, float* partial) {
  for (int64_t g = 0; g < count; ++g) {
    const float* y = tile + groups[g].first * kPanel;
    float* out = partial + groups[g].pairs;
    for (int64_t i = 0; i < groups[g].size; ++i) {
      for (int64_t j = i + 1; j < groups[g].size; ++j) {
        Vec squares = zero();
        for (int c = 0; c < kPanel; c += kWidth) {
          const Vec d = sub(load(y + i * kPanel + c), load(y + j * kPanel + c));
          squares = fma(d, d, squares);
        }
        *out++ = sum(squares);
      }
    }
  }
}

template <class W>
size_t pair_variance_chunks(const Head& head, const Rows& rows, const int64_t* sizes, int64_t groups, float* logits,
                            float* variances, int threads, void* memory) {
  using Act = typename W::Act;
  const Map& map = head.map;
  const int64_t panels = panels_of(map.features);
  int64_t most_rows = 1, most_pairs = 1, most_groups = 1;
  for (int64_t done = 0; done < groups;) {
    const Chunk chunk = next_chunk(sizes + done, groups - done);
    done += chunk.groups;
    most_rows = maximum(most_rows, chunk.rows);
    most_pairs = maximum(most_pairs, chunk.pairs);
    most_groups = maximum(most_groups, chunk.groups);
  }

  Workspace workspace(memory);
  const auto buffers = take_feature_buffers<W>(workspace, map, rows, most_rows, most_rows, threads);
  const int64_t stride = act_stride<Act>(map.features);
  auto* delta = workspace.take<Act>(most_rows * stride);
  auto* row_logits = workspace.take<float>(panels * most_rows);  // (panel, row)
  auto* partial = workspace.take<float>(panels * most_pairs);    // (panel, pair)
  auto* members = workspace.take<Group>(most_groups);
  // int8: how large a row's differences are is known only when all its panels are there.
  auto* exact = kInt8<W> ? workspace.take<float>(most_rows * stride) : nullptr;
  auto* delta_factor = kInt8<W> ? workspace.take<float>(most_rows) : nullptr;
  if (workspace.counting()) return workspace.used();

  parallel(threads, [&](Team& team) {
    int64_t row = 0, pair = 0;
    for (int64_t done = 0; done < groups;) {
      const Chunk chunk = next_chunk(sizes + done, groups - done);
      team.each(1, [&](int64_t) {
        int64_t first = 0, pairs = 0;
        for (int64_t i = 0; i < chunk.groups; ++i) {
          const int64_t k = sizes[done + i];
          members[i] = {first, k, pairs};
          first += k;
          pairs += k * (k - 1) / 2;
        }
      });
      feature_stages<W>(
          team, map, rows, row, chunk.rows, most_rows, buffers, [&](float* tile, int64_t panel, int64_t, int64_t n) {
            subtract_first(tile, members, chunk.groups);
            beta_product(static_cast<int>(n), tile, head.beta + panel * kPanel, row_logits + panel * most_rows);
            for (int64_t r = 0; r < n; ++r) {
              for (int j = 0; j < kPanel; j += kWidth) {
                const Vec d = load(tile + r * kPanel + j);
                if constexpr (kInt8<W>) {
                  store(exact + r * stride + panel * kPanel + j, d);
                } else {
                  store_act(delta + r * stride + panel * kPanel + j, d);
                }
              }
            }
          });
      if constexpr (kInt8<W>) {
        team.each(chunk.rows, [&](int64_t r) {
          const float* row = exact + r * stride;
          delta_factor[r] =
              quantize_row(panels * kPanel, delta + r * stride, 0, [&](int64_t i) { return load(row + i); });
        });
      }
      factor_stage<W>(team, head, delta, stride, delta_factor, chunk.rows, most_rows, buffers,
                      [&](const float* tile, int64_t panel, int64_t, int64_t) {
                        pair_squares(tile, members, chunk.groups, partial + panel * most_pairs);
                      });
      team.each(chunk.groups, [&](int64_t i) {
        const Group& group = members[i];
        int64_t at = group.pairs;
        for (int64_t r = 0; r < group.size; ++r) {
          float g = 0.0f;
          for (int64_t p = 0; p < panels; ++p) g += row_logits[p * most_rows + group.first + r];
          row_logits[group.first + r] = g;
        }
        for (int64_t r = 0; r < group.size; ++r) {
          for (int64_t s = r + 1; s < group.size; ++s, ++at) {
            float v = 0.0f;
            for (int64_t p = 0; p < panels; ++p) v += partial[p * most_pairs + at];
            logits[pair + at] = row_logits[group.first + r] - row_logits[group.first + s];
            variances[pair + at] = v * head.factor_scale;
          }
        }
      });
      done += chunk.groups;
      row += chunk.rows;
      pair += chunk.pairs;
    }
  });
  return workspace.used();
}

}  // namespace

size_t pair_variance(const Head& head, const Rows& rows, const int64_t* group_sizes, int64_t groups, float* logits,
                     float* variances, int threads, void* workspace) {
  if (rows.count == 0) return 0;
  return with_any_weight_type(head.map.dtype, rows.count, [&](auto weight) {
    return pair_variance_chunks<decltype(weight)>(head, rows, group_sizes, groups, logits, variances, threads,
                                                  workspace);
  });
}

}  // namespace rmcore::cpu::RMCORE_ISA
