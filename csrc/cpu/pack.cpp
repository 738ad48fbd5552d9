// Weights → panels, once per head.
//
//   pack_panels  matrix (N, K) row-major → ⌈N/64⌉ panels of 64 output columns, each k-major over K:
//                float and fp16 [K][64], bf16 [⌈K/2⌉][64][2], int8 [⌈K/4⌉][64][4]; zeros beyond N and K.
//   pack_factor  lower 128 × 128 tiles of U (D, D) → ⌈D/64⌉ panels of 64 rows of U, panel p over k < 64 (p + 1) only.
//
// Reads and writes each byte of the weights once.
#include "kernels.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int kTile = 128;      // edge of the tiles the factor arrives in
constexpr int kPackDepth = 32;  // k copied at a time, through a buffer that fits the first cache whatever the stride

// Columns k0 .. k0 + n of 64 rows, row j at source + j * stride (nullptr rows are zero), to their place in a panel.
template <class T, int kStep>
void transpose_block(const T* source, int64_t stride, int rows, int n, T* panel) {
  T buffer[kPanel][kPackDepth] = {};
  for (int j = 0; j < rows; ++j) std::memcpy(buffer[j], source + j * stride, sizeof(T) * n);
  const int whole = static_cast<int>(round_up(n, kStep));
  for (int k = 0; k < whole; k += kStep) {
    for (int j = 0; j < kPanel; ++j) {
      for (int i = 0; i < kStep; ++i) *panel++ = buffer[j][k + i];
    }
  }
}

template <class T, int kStep>
void pack_matrix(const T* matrix, int64_t rows, int64_t cols, T* panels, int threads) {
  const int64_t depth = round_up(cols, kStep), count = panels_of(rows);
  parallel(threads, [&](Team& team) {
    team.each(count, [&](int64_t panel) {
      const int n = static_cast<int>(minimum(kPanel, rows - panel * kPanel));
      for (int64_t k = 0; k < cols; k += kPackDepth) {
        const int width = static_cast<int>(minimum(kPackDepth, cols - k));
        transpose_block<T, kStep>(matrix + panel * kPanel * cols + k, cols, n, width,
                                  panels + (panel * depth + k) * kPanel);
      }
    });
  });
}

template <class T, int kStep>
void pack_tiles(const T* tiles, int64_t size, T* panels, int threads) {
  const int64_t count = panels_of(size);
  parallel(threads, [&](Team& team) {
    team.each(count, [&](int64_t task) {
      const int64_t panel = count - 1 - task, depth = factor_depth(size, panel, kStep);
      const int64_t tile_row = panel * kPanel / kTile, row = panel * kPanel % kTile;
      for (int64_t k = 0; k < depth; k += kPackDepth) {
        const T* tile = tiles + (tile_row * (tile_row + 1) / 2 + k / kTile) * kTile * kTile;
        const int width = static_cast<int>(minimum(kPackDepth, depth - k));
        transpose_block<T, kStep>(tile + row * kTile + k % kTile, kTile, kPanel, width,
                                  panels + factor_offset(panel) + k * kPanel);
      }
    });
  });
}

}  // namespace

void pack_panels(const void* matrix, Dtype dtype, int64_t rows, int64_t cols, void* panels, int threads) {
  if (dtype == Dtype::f32) {
    pack_matrix<float, 1>(static_cast<const float*>(matrix), rows, cols, static_cast<float*>(panels), threads);
  } else if (dtype == Dtype::f16) {
    pack_matrix<uint16_t, 1>(static_cast<const uint16_t*>(matrix), rows, cols, static_cast<uint16_t*>(panels), threads);
  } else if (dtype == Dtype::i8) {
    pack_matrix<int8_t, 4>(static_cast<const int8_t*>(matrix), rows, cols, static_cast<int8_t*>(panels), threads);
  } else {
    pack_matrix<uint16_t, 2>(static_cast<const uint16_t*>(matrix), rows, cols, static_cast<uint16_t*>(panels), threads);
  }
}

void pack_factor(const void* tiles, Dtype dtype, int64_t size, void* panels, int threads) {
  if (dtype == Dtype::f32) {
    pack_tiles<float, 1>(static_cast<const float*>(tiles), size, static_cast<float*>(panels), threads);
  } else if (dtype == Dtype::f16) {
    pack_tiles<uint16_t, 1>(static_cast<const uint16_t*>(tiles), size, static_cast<uint16_t*>(panels), threads);
  } else if (dtype == Dtype::i8) {
    pack_tiles<int8_t, 4>(static_cast<const int8_t*>(tiles), size, static_cast<int8_t*>(panels), threads);
  } else {
    pack_tiles<uint16_t, 2>(static_cast<const uint16_t*>(tiles), size, static_cast<uint16_t*>(panels), threads);
  }
}

}  // namespace rmcore::cpu::RMCORE_ISA
