// Matrix products of rows with weight panels: acc (rows × 64) += A (rows × k) · panel (k × 64), float32 accumulators.
//
// A panel holds 64 columns of the product, k-major: float and fp16 as [k][64], bf16 as pairs [k/2][64][2], which is
// what the bf16 dot product takes, and which a shift and a mask turn into two float vectors elsewhere; int8 as quads
// [k/4][64][4], likewise. A block of 6 rows × 64 (AVX-512) or fewer columns stays in registers while k runs through one
// weight block; blocks are summed apart and then added, which keeps rounding errors small. The order of additions along
// k is the same for every row, whatever block it falls in, so a row's result does not depend on its neighbours or on
// the size of the batch.
//
// int8 weights meet activations that are whole numbers −127 … 127 times a factor of the row. With VNNI they are stored
// as bytes, 128 too high, since the instruction takes unsigned times signed; sums are exact in int32 (k ≤ 65,536), and
// what 128 · Σ weights adds is taken away at the end. Elsewhere the same whole numbers are floats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "simd.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int kRowBlock = 6;        // rows of a register block
constexpr int kConvertDepth = 256;  // k of a weight block that may first be converted to float (64 KB)
constexpr int kConvertRows = 12;    // from how many rows on converting first pays

// Where weights are asked for before they are needed. With one row block, memory is the limit: 8 KB ahead, into the
// first cache. With more, the next weight block is asked for while this one is at work, into the second.
enum class Ahead { nothing, near, block };
constexpr ptrdiff_t kNear = 8192;

// A weight type: how it is stored, what it is multiplied with, how many k one step takes, and the k of a weight block
// that is used for all rows before the next one is read (at most 128 KB).
struct F32 {
  using Store = float;
  using Act = float;
  static constexpr int kStep = 1;
  static constexpr int kDepth = 256;
};
struct F16 {
  using Store = uint16_t;
  using Act = float;
  static constexpr int kStep = 1;
  static constexpr int kDepth = kConvertDepth;
};
struct BF16 {
  using Store = uint16_t;
#if defined(__AVX512BF16__)
  using Act = uint16_t;
  static constexpr int kDepth = 1024;
#else
  using Act = float;
  static constexpr int kDepth = kConvertDepth;
#endif
  static constexpr int kStep = 2;
};

struct I8 {
  using Store = int8_t;
#if defined(__AVX512VNNI__)
  using Act = uint8_t;
  static constexpr int kDepth = 2048;
#else
  using Act = float;
  static constexpr int kDepth = kConvertDepth;
#endif
  static constexpr int kStep = 4;
};

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

// Cache lines of weights in one step.
template <class W>
constexpr int kStepLines = W::kStep * kPanel * static_cast<int>(sizeof(typename W::Store)) / 64;

// True where narrow weights meet float activations, so that converting the weights can be shared by many rows.
template <class W>
constexpr bool kConverts = !Same<W, F32>::value && Same<typename W::Act, float>::value;

// Weight vectors of step `w` into b[kStep][N].
template <class W, int N>
inline void load_step(const typename W::Store* w, Vec (&b)[W::kStep][N]) {
  RMCORE_UNROLL
  for (int j = 0; j < N; ++j) {
    if constexpr (Same<W, F32>::value) {
      b[0][j] = load(w + j * kWidth);
    } else if constexpr (Same<W, F16>::value) {
      b[0][j] = load_f16(w + j * kWidth);
    } else if constexpr (Same<W, I8>::value) {
      load_i8_quads(w + 4 * j * kWidth, b[0][j], b[1][j], b[2][j], b[3][j]);
    } else {
      load_bf16_pairs(w + 2 * j * kWidth, b[0][j], b[1][j]);
    }
  }
}

// R rows × kColumnVecs vectors. Row r, k at a[r * row_stride + k / kStep * step_stride + k % kStep].
// Each step asks for `Lines` cache lines from `next` on.
template <class W, int R, Ahead kAhead, int Lines>
inline void block_product(const typename W::Act* a, ptrdiff_t row_stride, ptrdiff_t step_stride,
                          const typename W::Store* w, int k, float* acc, bool accumulate, const char* next) {
  constexpr int N = kColumnVecs;
#if defined(__AVX512VNNI__)
  if constexpr (Same<W, I8>::value) {
    // Not __m512i, whose sums gcc 12 writes back to the stack at every step.
    typedef int Whole __attribute__((vector_size(64)));
    Whole s[R][N];
    RMCORE_UNROLL
    for (int r = 0; r < R; ++r) {
      RMCORE_UNROLL
      for (int j = 0; j < N; ++j) s[r][j] = Whole{};
    }
    for (int p = 0; p < k; p += W::kStep) {
      if constexpr (kAhead != Ahead::nothing) {
        RMCORE_UNROLL
        for (int i = 0; i < Lines; ++i) __builtin_prefetch(next + 64 * i, 0, kAhead == Ahead::near ? 3 : 2);
        next += 64 * Lines;
      }
      __m512i b[N];
      RMCORE_UNROLL
      for (int j = 0; j < N; ++j) b[j] = _mm512_loadu_si512(w + j * 4 * kWidth);
      RMCORE_UNROLL
      for (int r = 0; r < R; ++r) {
        int quad;
        std::memcpy(&quad, a + r * row_stride, 4);
        const __m512i x = _mm512_set1_epi32(quad);
        RMCORE_UNROLL
        for (int j = 0; j < N; ++j) s[r][j] = (Whole)_mm512_dpbusd_epi32((__m512i)s[r][j], x, b[j]);
      }
      a += step_stride;
      w += kPanel * W::kStep;
    }
    RMCORE_UNROLL
    for (int r = 0; r < R; ++r) {
      RMCORE_UNROLL
      for (int j = 0; j < N; ++j) {
        float* out = acc + r * kPanel + j * kWidth;  // int32 until finish_product
        const __m512i sum = (__m512i)s[r][j];
        _mm512_storeu_si512(out, accumulate ? _mm512_add_epi32(_mm512_loadu_si512(out), sum) : sum);
      }
    }
    return;
  }
#endif
  Vec s[R][N];
  RMCORE_UNROLL
  for (int r = 0; r < R; ++r) {
    RMCORE_UNROLL
    for (int j = 0; j < N; ++j) s[r][j] = zero();
  }
  const int steps = k / W::kStep;
  for (int p = 0; p < steps; ++p) {
    if constexpr (kAhead != Ahead::nothing) {
      RMCORE_UNROLL
      for (int i = 0; i < Lines; ++i) __builtin_prefetch(next + 64 * i, 0, kAhead == Ahead::near ? 3 : 2);
      next += 64 * Lines;
    }
#if defined(__AVX512BF16__)
    if constexpr (Same<W, BF16>::value) {
      __m512bh b[N];
      RMCORE_UNROLL
      for (int j = 0; j < N; ++j) b[j] = (__m512bh)_mm512_loadu_si512(w + j * 2 * kWidth);
      RMCORE_UNROLL
      for (int r = 0; r < R; ++r) {
        int pair;
        std::memcpy(&pair, a + r * row_stride, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        RMCORE_UNROLL
        for (int j = 0; j < N; ++j) s[r][j] = _mm512_dpbf16_ps(s[r][j], x, b[j]);
      }
      a += step_stride;
      w += kPanel * W::kStep;
      continue;
    }
#endif
    if constexpr (Same<typename W::Act, float>::value) {
      Vec b[W::kStep][N];
      load_step<W, N>(w, b);
      RMCORE_UNROLL
      for (int i = 0; i < W::kStep; ++i) {
        RMCORE_UNROLL
        for (int r = 0; r < R; ++r) {
          const Vec x = splat(a[r * row_stride + i]);
          RMCORE_UNROLL
          for (int j = 0; j < N; ++j) s[r][j] = fma(x, b[i][j], s[r][j]);
        }
      }
    }
    a += step_stride;
    w += kPanel * W::kStep;
  }
  RMCORE_UNROLL
  for (int r = 0; r < R; ++r) {
    RMCORE_UNROLL
    for (int j = 0; j < N; ++j) {
      float* out = acc + r * kPanel + j * kWidth;
      store(out, accumulate ? add(load(out), s[r][j]) : s[r][j]);
    }
  }
}

// One register block across all 64 columns.
template <class W, Ahead kAhead, int Lines>
void block_row(int rows, const typename W::Act* a, ptrdiff_t row_stride, ptrdiff_t step_stride,
               const typename W::Store* w, int k, float* acc, bool accumulate, const char* next) {
  constexpr int columns = kColumnVecs * kWidth;
  for (int c = 0; c < kPanel; c += columns) {
    const auto* slice = w + c * W::kStep;
    float* out = acc + c;
    switch (rows) {
      case 1:
        block_product<W, 1, kAhead, Lines>(a, row_stride, step_stride, slice, k, out, accumulate, next);
        break;
      case 2:
        block_product<W, 2, kAhead, Lines>(a, row_stride, step_stride, slice, k, out, accumulate, next);
        break;
      case 3:
        block_product<W, 3, kAhead, Lines>(a, row_stride, step_stride, slice, k, out, accumulate, next);
        break;
      case 4:
        block_product<W, 4, kAhead, Lines>(a, row_stride, step_stride, slice, k, out, accumulate, next);
        break;
      case 5:
        block_product<W, 5, kAhead, Lines>(a, row_stride, step_stride, slice, k, out, accumulate, next);
        break;
      default:
        block_product<W, 6, kAhead, Lines>(a, row_stride, step_stride, slice, k, out, accumulate, next);
    }
  }
}

// All rows over one weight block. Rows are spread evenly over blocks of at most 6. `next` is what will be read after
// this, at `Lines` cache lines for each step here; asking for it is shared by the first few blocks.
template <class W, int Lines>
void rows_product(int rows, const typename W::Act* a, ptrdiff_t row_stride, ptrdiff_t step_stride,
                  const typename W::Store* w, int k, float* acc, bool accumulate, const char* next) {
  const int blocks = (rows + kRowBlock - 1) / kRowBlock;
  const ptrdiff_t step_count = k / W::kStep;
  for (int b = 0, r = 0; b < blocks; ++b) {
    const int n = (rows - r + blocks - b - 1) / (blocks - b);
    const auto* block = a + r * row_stride;
    float* out = acc + static_cast<ptrdiff_t>(r) * kPanel;
    if (blocks == 1) {
      const char* near = reinterpret_cast<const char*>(w) + kNear;
      block_row<W, Ahead::near, Lines>(n, block, row_stride, step_stride, w, k, out, accumulate, near);
    } else if (next != nullptr && blocks < Lines && b == 0) {
      block_row<W, Ahead::block, Lines>(n, block, row_stride, step_stride, w, k, out, accumulate, next);
    } else if (next != nullptr && blocks >= Lines && b < Lines) {
      const char* share = next + 64 * step_count * b;
      block_row<W, Ahead::block, 1>(n, block, row_stride, step_stride, w, k, out, accumulate, share);
    } else {
      block_row<W, Ahead::nothing, 1>(n, block, row_stride, step_stride, w, k, out, accumulate, nullptr);
    }
    r += n;
  }
}

// k × 64 weights as floats [k][64].
template <class W>
void convert_block(const typename W::Store* w, int k, float* out) {
  for (int p = 0; p < k; p += W::kStep, w += kPanel * W::kStep, out += kPanel * W::kStep) {
    for (int c = 0; c < kPanel; c += kWidth) {
      Vec b[W::kStep][1];
      load_step<W, 1>(w + c * W::kStep, b);
      for (int i = 0; i < W::kStep; ++i) store(out + i * kPanel + c, b[i][0]);
    }
  }
}

// What int8 products are multiplied with; not read for other weights.
struct Scales {
  const float* columns;  // of the panel's 64 columns: the factor of its weights
  const int32_t* sums;   // of the panel's 64 columns: the sum of its weights
  const float* rows;     // the factor of each row's activations
};

// Whole-number products → floats: acc[r, c] ← (acc[r, c] − offset · sums[c]) columns[c] rows[r].
inline void finish_product(int rows, const Scales& scales, float* acc) {
  for (int c = 0; c < kPanel; c += kWidth) {
    const Vec column = load(scales.columns + c);
#if defined(__AVX512VNNI__)
    const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(scales.sums + c), 7);
#endif
    for (int r = 0; r < rows; ++r) {
      float* out = acc + r * kPanel + c;
#if defined(__AVX512VNNI__)
      const Vec whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(out), offset));
#else
      const Vec whole = load(out);
#endif
      store(out, mul(mul(whole, column), splat(scales.rows[r])));
    }
  }
}

// acc (rows × 64) = A (rows × k, row-major with stride lda) · panel. k is a multiple of kStep. `scratch` holds
// kConvertDepth × 64 floats; `next` is the panel this thread will read after this one, or nullptr. Where `low` is not
// 0, A is the sum of what is at `a` and at `a + low`.
template <class W>
void panel_product(int rows, const typename W::Act* a, ptrdiff_t lda, ptrdiff_t low, const typename W::Store* w, int k,
                   const Scales& scales, float* acc, float* scratch, const void* next) {
  const bool convert = kConverts<W> && rows >= kConvertRows;
  if (k == 0) std::memset(acc, 0, sizeof(float) * kPanel * rows);
  for (int k0 = 0; k0 < k; k0 += W::kDepth) {
    const int n = k - k0 < W::kDepth ? k - k0 : W::kDepth;
    const auto* block = w + static_cast<ptrdiff_t>(k0) * kPanel;
    const char* following = reinterpret_cast<const char*>(block + static_cast<ptrdiff_t>(n) * kPanel);
    if (k0 + n >= k) following = static_cast<const char*>(next);
    if constexpr (kConverts<W>) {
      if (convert) {
        convert_block<W>(block, n, scratch);
        constexpr int lines = (kStepLines<W> + W::kStep - 1) / W::kStep;
        rows_product<F32, lines>(rows, a + k0, lda, 1, scratch, n, acc, k0 > 0, following);
        continue;
      }
    }
    rows_product<W, kStepLines<W>>(rows, a + k0, lda, W::kStep, block, n, acc, k0 > 0, following);
    if (low != 0) rows_product<W, kStepLines<W>>(rows, a + low + k0, lda, W::kStep, block, n, acc, true, nullptr);
  }
  if constexpr (Same<W, I8>::value) finish_product(rows, scales, acc);
}

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
