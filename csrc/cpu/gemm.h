// Matrix products of rows with weight panels: acc (rows × 64) += A (rows × k) · panel (k × 64), float32 accumulators.
//
// What a panel is, and how a step of it is multiplied: multiply.h. A block of 6 rows × 64 (AVX-512) or fewer columns
// stays in registers while k runs through one weight block; fewer rows take more columns at once, one row all 64, so
// that a single row reads the weights once, in order, at the speed of memory. Blocks are summed apart and then added,
// which keeps rounding errors small. The order of additions along k is the same for every row, whatever block it falls
// in, so a row's result does not depend on its neighbours or on the size of the batch.
//
// int8 weights meet activations that are whole numbers −127 … 127 times a factor of the row; their sums are exact,
// after what saturated has been added (saturation.h), and int32 in `acc` until finish_product.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "multiply.h"
#include "saturation.h"
#include "simd.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int kRowBlock = 6;      // rows of a register block
constexpr int kConvertRows = 12;  // from how many rows on converting first pays

// Where weights are asked for before they are needed. With one row block, memory is the limit: a little ahead, into the
// first cache. With more, the next weight block is asked for while this one is at work, into the second.
enum class Ahead { nothing, near, block };
// On a Zen 3 (AVX2) 1 KB ahead reads some 10% more than 8 KB; not measured with AVX-512. A row alone: streams.h.
constexpr ptrdiff_t kNear = kRegisters == 32 ? 8192 : 1024;

// Vectors across a register block of R rows.
template <int R>
constexpr int kColumnVecs = kRegisters == 32 ? 4
                            : R == 1         ? 8
                            : R <= 3         ? 4
                                             : 2;

// One part of a step: R rows × N vectors. Whatever there is less of stays in registers.
template <class W, int kPart, int R, int N, class Sum>
inline void multiply_part(const typename W::Act* a, ptrdiff_t row_stride, const typename W::Store* w, Sum (&s)[R][N]) {
  using M = Multiply<W>;
  if constexpr (R < N) {
    decltype(M::template rows<kPart>(a)) x[R];
    RMCORE_UNROLL
    for (int r = 0; r < R; ++r) x[r] = M::template rows<kPart>(a + r * row_stride);
    RMCORE_UNROLL
    for (int j = 0; j < N; ++j) {
      const auto b = M::template weights<kPart>(w + j * W::kStep * kWidth);
      RMCORE_UNROLL
      for (int r = 0; r < R; ++r) s[r][j] = M::add(x[r], b, s[r][j]);
    }
  } else {
    decltype(M::template weights<kPart>(w)) b[N];
    RMCORE_UNROLL
    for (int j = 0; j < N; ++j) b[j] = M::template weights<kPart>(w + j * W::kStep * kWidth);
    RMCORE_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto x = M::template rows<kPart>(a + r * row_stride);
      RMCORE_UNROLL
      for (int j = 0; j < N; ++j) s[r][j] = M::add(x, b[j], s[r][j]);
    }
  }
}

inline void add_up(float* out, Vec sum, bool accumulate) { store(out, accumulate ? add(load(out), sum) : sum); }
inline void add_up(float* out, Ints sum, bool accumulate) { store_ints(out, accumulate ? load_ints(out) + sum : sum); }

// R rows × kColumnVecs<R> vectors. Row r, k at a[r * row_stride + k / kStep * step_stride + k % kStep].
// Each step asks for `Lines` cache lines from `next` on.
template <class W, int R, Ahead kAhead, int Lines>
inline void block_product(const typename W::Act* a, ptrdiff_t row_stride, ptrdiff_t step_stride,
                          const typename W::Store* w, int k, float* acc, bool accumulate, const char* next) {
  using M = Multiply<W>;
  constexpr int N = kColumnVecs<R>;
  typename M::Sum s[R][N];
  RMCORE_UNROLL
  for (int r = 0; r < R; ++r) {
    RMCORE_UNROLL
    for (int j = 0; j < N; ++j) s[r][j] = typename M::Sum{};
  }
  for (int p = 0; p < k; p += W::kStep) {
    if constexpr (kAhead != Ahead::nothing) {
      RMCORE_UNROLL
      for (int i = 0; i < Lines; ++i) __builtin_prefetch(next + 64 * i, 0, kAhead == Ahead::near ? 3 : 2);
      next += 64 * Lines;
    }
    multiply_part<W, 0>(a, row_stride, w, s);
    if constexpr (M::kParts == 2) {
      // gcc would keep both parts' weights, or all products of one, and spill sums to make room.
      RMCORE_UNROLL
      for (int r = 0; r < R; ++r) {
        RMCORE_UNROLL
        for (int j = 0; j < N; ++j) hold(s[r][j]);
      }
      multiply_part<W, 1>(a, row_stride, w, s);
    }
    a += step_stride;
    w += kPanel * W::kStep;
  }
  RMCORE_UNROLL
  for (int r = 0; r < R; ++r) {
    RMCORE_UNROLL
    for (int j = 0; j < N; ++j) add_up(acc + r * kPanel + j * kWidth, s[r][j], accumulate);
  }
}

// R rows across all 64 columns. Where that takes several passes, they share what is asked for ahead: a pass finds its
// own weights in the cache, and memory must not rest meanwhile.
template <class W, int R, Ahead kAhead, int Lines>
void block_row(const typename W::Act* a, ptrdiff_t row_stride, ptrdiff_t step_stride, const typename W::Store* w, int k,
               float* acc, bool accumulate, const char* next) {
  constexpr int columns = kColumnVecs<R> * kWidth, kPasses = kPanel / columns;
  constexpr int kShare = kAhead == Ahead::near ? Lines : (Lines + kPasses - 1) / kPasses;
  const ptrdiff_t share = kAhead == Ahead::near ? 0 : static_cast<ptrdiff_t>(64) * kShare * (k / W::kStep);
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto* slice = w + pass * columns * W::kStep;
    float* out = acc + pass * columns;
    if (kAhead != Ahead::nothing && pass * kShare < Lines) {
      block_product<W, R, kAhead, kShare>(a, row_stride, step_stride, slice, k, out, accumulate, next + pass * share);
    } else {
      block_product<W, R, Ahead::nothing, 1>(a, row_stride, step_stride, slice, k, out, accumulate, nullptr);
    }
  }
}

// One register block of `rows` rows.
template <class W, Ahead kAhead, int Lines>
void block_rows(int rows, const typename W::Act* a, ptrdiff_t row_stride, ptrdiff_t step_stride,
                const typename W::Store* w, int k, float* acc, bool accumulate, const char* next) {
  switch (rows) {
    case 1:
      return block_row<W, 1, kAhead, Lines>(a, row_stride, step_stride, w, k, acc, accumulate, next);
    case 2:
      return block_row<W, 2, kAhead, Lines>(a, row_stride, step_stride, w, k, acc, accumulate, next);
    case 3:
      return block_row<W, 3, kAhead, Lines>(a, row_stride, step_stride, w, k, acc, accumulate, next);
    case 4:
      return block_row<W, 4, kAhead, Lines>(a, row_stride, step_stride, w, k, acc, accumulate, next);
    case 5:
      return block_row<W, 5, kAhead, Lines>(a, row_stride, step_stride, w, k, acc, accumulate, next);
    default:
      return block_row<W, 6, kAhead, Lines>(a, row_stride, step_stride, w, k, acc, accumulate, next);
  }
}

// All rows over one weight block. Rows are spread evenly over blocks of at most 6. `next` is what will be read after
// this, at `Lines` cache lines for each step here; asking for it is shared by the first few blocks.
template <class W, int Lines>
void rows_product(int rows, const typename W::Act* a, ptrdiff_t row_stride, ptrdiff_t step_stride,
                  const typename W::Store* w, int k, float* acc, bool accumulate, const char* next) {
  const int blocks = (rows + kRowBlock - 1) / kRowBlock;
  const ptrdiff_t step_count = k / W::kStep;
  // In one pass over the weights, memory is the limit.
  const bool one_pass = rows == 1 || kRegisters == 32;
  for (int b = 0, r = 0; b < blocks; ++b) {
    const int n = (rows - r + blocks - b - 1) / (blocks - b);
    const auto* block = a + r * row_stride;
    float* out = acc + static_cast<ptrdiff_t>(r) * kPanel;
    if (blocks == 1 && one_pass) {
      const char* near = reinterpret_cast<const char*>(w) + kNear;
      block_rows<W, Ahead::near, Lines>(n, block, row_stride, step_stride, w, k, out, accumulate, near);
    } else if (next != nullptr && blocks < Lines && b == 0) {
      block_rows<W, Ahead::block, Lines>(n, block, row_stride, step_stride, w, k, out, accumulate, next);
    } else if (next != nullptr && blocks >= Lines && b < Lines) {
      const char* share = next + 64 * step_count * b;
      block_rows<W, Ahead::block, 1>(n, block, row_stride, step_stride, w, k, out, accumulate, share);
    } else {
      block_rows<W, Ahead::nothing, 1>(n, block, row_stride, step_stride, w, k, out, accumulate, nullptr);
    }
    r += n;
  }
}

// k × 64 weights as what is multiplied: floats [k][64], or pairs of int16.
template <class W>
void convert_block(const typename W::Store* w, int k, typename Wide<W>::Store* out) {
  using M = Multiply<W>;
  constexpr int kPart = kPanel * W::kStep / M::kParts;  // elements of a part of a step
  for (int p = 0; p < k; p += W::kStep, w += kPanel * W::kStep, out += kPanel * W::kStep) {
    for (int c = 0; c < kPanel; c += kWidth) {
      auto* to = out + c * Wide<W>::kStep;
      store_any(to, M::template weights<0>(w + c * W::kStep));
      if constexpr (M::kParts == 2) store_any(to + kPart, M::template weights<1>(w + c * W::kStep));
    }
  }
}

// What int8 products are multiplied with; not read for other weights.
struct Scales {
  const float* columns;   // of the panel's 64 columns: the factor of its weights
  const int32_t* sums;    // of the panel's 64 columns: the sum of its weights
  const float* rows;      // the factor of each row's activations
  Saturating saturating;  // I8U only
};

// Whole-number products → floats: acc[r, c] ← (acc[r, c] − offset · sums[c]) columns[c] rows[r].
template <class W>
void finish_product(int rows, const Scales& scales, float* acc) {
  for (int c = 0; c < kPanel; c += kWidth) {
    const Vec column = load(scales.columns + c);
    const Ints offset = Same<typename W::Act, uint8_t>::value ? load_ints(scales.sums + c) * 128 : Ints{};
    for (int r = 0; r < rows; ++r) {
      float* out = acc + r * kPanel + c;
      store(out, mul(mul(to_float(load_ints(out) - offset), column), splat(scales.rows[r])));
    }
  }
}

// acc (rows × 64) = A (rows × k, row-major with stride lda) · panel. k is a multiple of kStep. `scratch` holds
// kConvertDepth × 64 widened weights; `next` is the panel this thread will read after this one, or nullptr. Where `low`
// is not 0, A is the sum of what is at `a` and at `a + low`.
template <class W>
void panel_product(int rows, const typename W::Act* a, ptrdiff_t lda, ptrdiff_t low, const typename W::Store* w, int k,
                   const Scales& scales, float* acc, typename Wide<W>::Store* scratch, const void* next) {
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
        constexpr int steps = W::kStep / Wide<W>::kStep;  // of the wide type to one of W
        constexpr int lines = (kStepLines<W> + steps - 1) / steps;
        rows_product<Wide<W>, lines>(rows, a + k0, lda, Wide<W>::kStep, scratch, n, acc, k0 > 0, following);
        continue;
      }
    }
    rows_product<W, kStepLines<W>>(rows, a + k0, lda, W::kStep, block, n, acc, k0 > 0, following);
    if (low != 0) rows_product<W, kStepLines<W>>(rows, a + low + k0, lda, W::kStep, block, n, acc, true, nullptr);
  }
  if constexpr (kSaturates<W>) add_saturated<W>(rows, scales.saturating, acc);
  if constexpr (kInt8<W>) finish_product<W>(rows, scales, acc);
}

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
