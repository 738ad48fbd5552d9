// features: hidden rows → c in float32, for the passes that take differences of rows.
//
//   c = cos 2π((s x) projectionᵀ + phase)   or the other forms of a FeatureMap
//
//   in   hidden (R, h) any dtype and strides; the map's panels (pack.cpp)
//   out  (R, out_stride) float32, the first D of each row rounded up to whole panels (what lies beyond D is no feature)
//
// Bytes: one read of the weights per kChunkRows rows, 4 R D written. FLOP: 2 R D h.
#include "kernels.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int64_t kChunkRows = 1024;

template <class W>
size_t features_chunks(const Map& map, const Rows& rows, float* out, int64_t out_stride, int threads, void* memory) {
  const int64_t total = rows.count, chunk = ceil_div(total, ceil_div(total, kChunkRows));
  const int64_t task_rows = choose_task_rows(chunk, panels_of(map.features), threads);
  Workspace workspace(memory);
  const auto buffers = take_feature_buffers<W>(workspace, map, rows, chunk, task_rows, threads);
  if (workspace.counting()) return workspace.used();

  parallel(threads, [&](Team& team) {
    for (int64_t start = 0; start < total; start += chunk) {
      feature_stages<W>(team, map, rows, start, minimum(chunk, total - start), task_rows, buffers,
                        [&](const float* tile, int64_t panel, int64_t first, int64_t n) {
                          for (int64_t r = 0; r < n; ++r) {
                            std::memcpy(out + (start + first + r) * out_stride + panel * kPanel, tile + r * kPanel,
                                        sizeof(float) * kPanel);
                          }
                        });
    }
  });
  return workspace.used();
}

}  // namespace

size_t features(const Map& map, const Rows& rows, float* out, int64_t out_stride, int threads, void* workspace) {
  if (rows.count == 0) return 0;
  return with_weight_type(map.dtype, [&](auto weight) {
    return features_chunks<decltype(weight)>(map, rows, out, out_stride, threads, workspace);
  });
}

}  // namespace rmcore::cpu::RMCORE_ISA
