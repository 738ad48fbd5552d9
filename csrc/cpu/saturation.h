// What vpmaddubsw leaves out: its sums of two products of bytes are int16, and stop at 32,767 and −32,768.
//
// Activations are 0 … 255, so a sum can leave int16 only where the two weights have one sign and add up to more than
// 128 in magnitude: no others do, whatever the activations (255 · 128 = 32,640). Such pairs are known from the weights
// alone and listed when they are packed, by columns; of int8 rows scaled to their largest weight they are a hundredth,
// and cost a twentieth of the product. What their sums had beyond int16 is added before the product is finished, so
// that it is exact, whatever weights and activations are.
//
// That is done for kWidth rows at a time, so the pairs of the activations are laid out across, row beside row:
// [pair][row].
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "multiply.h"
#include "simd.h"
#include "simd_whole.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int kAcross = 64;  // rows of which a column is added up at once

// Distance of two pairs that are laid across. Half of kAcross rows may be read past the last one, and are not used.
inline int64_t across_stride(int64_t rows) { return (rows + kAcross - 1) / kAcross * kAcross + kAcross / 2; }

// The pairs of one panel that can saturate, and the activations that meet them.
struct Saturating {
  const int64_t* first;  // (65) where each column's pairs begin in `pairs`, and where the last one's end
  const FarPair* pairs;
  const uint16_t* across;  // [pair][row]
  int64_t stride;          // from a pair to the next
};

// Pairs first … last of `count` rows to [pair][row].
inline void lay_across(const uint8_t* rows, int64_t row_stride, int64_t count, int64_t first, int64_t last,
                       uint16_t* across, int64_t stride) {
  for (int64_t pair = first; pair < last; ++pair) {
    for (int64_t r = 0; r < count; ++r) {
      std::memcpy(across + pair * stride + r, rows + r * row_stride + 2 * pair, sizeof(uint16_t));
    }
  }
}

// sums (rows × 64 int32) += what the products of rows with one int8 panel had beyond int16. For W that saturate.
template <class W>
void add_saturated(int rows, const Saturating& list, float* sums);

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// kVecs vectors of rows of one column: what the products with the pairs begin … end had beyond int16.
template <int kVecs>
inline void sum_beyond(const FarPair* begin, const FarPair* end, const uint16_t* across, int64_t stride, int32_t* out) {
  Ints beyond[kVecs] = {};
  for (const FarPair* far = begin; far != end; ++far) {
    const Ints weights = splat_bits(far->weights);
    const uint16_t* pair = across + far->pair * stride;
    const auto* soon = reinterpret_cast<const char*>(across + far[kFarAhead].pair * stride);
    RMCORE_UNROLL
    for (int i = 0; i < kVecs * kWidth * 2; i += 64) __builtin_prefetch(soon + i);
    RMCORE_UNROLL
    for (int i = 0; i < kVecs; ++i)
      beyond[i] += beyond_i16(multiply_pairs(load_byte_pairs(pair + i * kWidth), weights));
  }
  RMCORE_UNROLL
  for (int i = 0; i < kVecs; ++i) store_ints(out + i * kWidth, beyond[i]);
}

// Adds 8 rows of 8 columns, which lie column by column, to rows that are kPanel apart and still hold int32.
inline void add_transposed(const int32_t* columns, int rows, float* sums) {
  __m256i a[8], b[8];
  RMCORE_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = (__m256i)_mm256_loadu_ps(reinterpret_cast<const float*>(columns + i * kAcross));
  RMCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  RMCORE_UNROLL
  for (int i = 0; i < 2; ++i) {
    RMCORE_UNROLL
    for (int j = 0; j < 2; ++j) {
      a[4 * i + 2 * j] = _mm256_unpacklo_epi64(b[4 * i + j], b[4 * i + 2 + j]);
      a[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(b[4 * i + j], b[4 * i + 2 + j]);
    }
  }
  RMCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x20);
    b[4 + i] = _mm256_permute2x128_si256(a[i], a[4 + i], 0x31);
  }
  for (int r = 0; r < rows; ++r) {
    auto* at = reinterpret_cast<__m256i*>(sums + r * kPanel);
    _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), b[r]));
  }
}

template <class W>
void add_saturated(int rows, const Saturating& list, float* sums) {
  int32_t beyond[kPanel * kAcross];  // column by column
  for (int start = 0; start < rows; start += kAcross) {
    const int n = rows - start < kAcross ? rows - start : kAcross;
    for (int c = 0; c < kPanel; ++c) {
      const FarPair *begin = list.pairs + list.first[c], *end = list.pairs + list.first[c + 1];
      int32_t* out = beyond + c * kAcross;
      if (n > kAcross / 2) {
        sum_beyond<kAcross / kWidth>(begin, end, list.across + start, list.stride, out);
      } else if (n > kAcross / 4) {
        sum_beyond<kAcross / kWidth / 2>(begin, end, list.across + start, list.stride, out);
      } else {
        sum_beyond<kAcross / kWidth / 4>(begin, end, list.across + start, list.stride, out);
      }
    }
    for (int r = 0; r < n; r += 8) {
      float* to = sums + (start + r) * kPanel;
      const int count = n - r < 8 ? n - r : 8;
      for (int c = 0; c < kPanel; c += 8) add_transposed(beyond + c * kAcross + r, count, to + c);
    }
  }
}

#endif

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
