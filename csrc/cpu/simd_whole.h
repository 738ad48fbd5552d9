// Whole numbers of int8 products: how activations are stored and loaded, and pairs of int16 multiplied where there is
// no 8-bit dot product. Everything here means the same in each instruction set.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace rmcore::cpu::RMCORE_ISA {
namespace {

#if defined(__AVX512F__)

// Whole numbers −127 … 127 → bytes, 128 too high. A NaN becomes some byte.
inline void store_whole(uint8_t* p, Vec a) {
  const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(128));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(whole));
}
inline Vec load_whole(const uint8_t* p) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(bytes, _mm512_set1_epi32(128)));
}

#if !defined(__AVX512VNNI__)

// k of every quad in the order 0, 2, 1, 3, and back.
inline __m256i swap_middle(__m256i a) {
  return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(a, _MM_SHUFFLE(3, 1, 2, 0)), _MM_SHUFFLE(3, 1, 2, 0));
}

// Whole numbers −127 … 127 → int16, the middle two of every quad swapped. A NaN becomes −128.
inline void store_whole(int16_t* p, Vec a) {
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), swap_middle(_mm256_cvtepi8_epi16(bytes)));
}
inline Vec load_whole(const int16_t* p) {
  const __m256i whole = swap_middle(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(whole));
}

// Part kPart of kWidth quads of bytes, as pairs of int16: k = 0 and 2, or 1 and 3.
template <int kPart>
inline Ints load_i16_of_quads(const int8_t* p) {
  const __m512i quads = _mm512_loadu_si512(p);
  return (Ints)_mm512_srai_epi16(kPart == 0 ? _mm512_slli_epi16(quads, 8) : quads, 8);
}

// a0 b0 + a1 b1 of pairs of int16, in int32.
inline Ints multiply_pairs(Ints a, Ints b) { return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }

// Dot products of quads of bytes, those of `a` unsigned, in int32; either pair's sum is held within int16.
inline Ints multiply_quads(Ints a, Ints b) {
  return (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)b), _mm512_set1_epi16(1));
}
// What int16 would not hold of numbers.
inline Ints beyond_i16(Ints a) {
  const __m512i held =
      _mm512_min_epi32(_mm512_max_epi32((__m512i)a, _mm512_set1_epi32(-32768)), _mm512_set1_epi32(32767));
  return (Ints)_mm512_sub_epi32((__m512i)a, held);
}
// kWidth pairs of unsigned bytes as pairs of int16.
inline Ints load_byte_pairs(const uint16_t* p) {
  return (Ints)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#endif

#elif defined(__AVX2__)

inline __m128i swap_middle(__m128i a) {
  return _mm_shufflehi_epi16(_mm_shufflelo_epi16(a, _MM_SHUFFLE(3, 1, 2, 0)), _MM_SHUFFLE(3, 1, 2, 0));
}
inline void store_whole(int16_t* p, Vec a) {
  const __m256i whole = _mm256_cvtps_epi32(a);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const __m128i bytes = _mm_packs_epi16(words, words);  // so that a NaN becomes −128 and no more
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), swap_middle(_mm_cvtepi8_epi16(bytes)));
}
inline Vec load_whole(const int16_t* p) {
  const __m128i whole = swap_middle(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(whole));
}
template <int kPart>
inline Ints load_i16_of_quads(const int8_t* p) {
  const __m256i quads = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Ints)_mm256_srai_epi16(kPart == 0 ? _mm256_slli_epi16(quads, 8) : quads, 8);
}
inline Ints multiply_pairs(Ints a, Ints b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

inline void store_whole(uint8_t* p, Vec a) {
  const __m256i whole = _mm256_cvtps_epi32(a);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const __m128i high = _mm_add_epi16(words, _mm_set1_epi16(128));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(high, high));
}
inline Vec load_whole(const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(bytes, _mm256_set1_epi32(128)));
}
alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
inline Ints multiply_quads(Ints a, Ints b) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  __m256i quads;  // the ones stay in memory: in a register they would put one of a product's sums there
  asm("vpmaddwd %2, %1, %0" : "=x"(quads) : "x"(pairs), "m"(*reinterpret_cast<const __m256i*>(kOnes)));
  return (Ints)quads;
}
inline Ints beyond_i16(Ints a) {
  const __m256i held =
      _mm256_min_epi32(_mm256_max_epi32((__m256i)a, _mm256_set1_epi32(-32768)), _mm256_set1_epi32(32767));
  return (Ints)_mm256_sub_epi32((__m256i)a, held);
}
inline Ints load_byte_pairs(const uint16_t* p) {
  return (Ints)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

#else  // any machine

inline void store_whole(int16_t* p, Vec a) {
  constexpr int kOrder[kWidth] = {0, 2, 1, 3};
  for (int i = 0; i < kWidth; ++i) {
    const float x = a[kOrder[i]];
    p[i] = static_cast<int16_t>(x >= -127.0f && x <= 127.0f ? static_cast<int>(x) : -128);  // −128: a NaN
  }
}
inline Vec load_whole(const int16_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[2]), static_cast<float>(p[1]), static_cast<float>(p[3])};
}
#if defined(__SSE2__)
template <int kPart>
inline Ints load_i16_of_quads(const int8_t* p) {
  const __m128i quads = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Ints)_mm_srai_epi16(kPart == 0 ? _mm_slli_epi16(quads, 8) : quads, 8);
}
inline Ints multiply_pairs(Ints a, Ints b) { return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
inline Ints low_of_pairs(Ints a) { return (Ints)((VecBits)a << 16) >> 16; }
template <int kPart>
inline Ints load_i16_of_quads(const int8_t* p) {
  const VecBits quads = (VecBits)load_ints(p);
  const Ints low = (Ints)(quads << (kPart == 0 ? 24 : 16)) >> 24, high = (Ints)(quads << (kPart == 0 ? 8 : 0)) >> 24;
  return (Ints)(((VecBits)low & 0xffffu) | ((VecBits)high << 16));
}
inline Ints multiply_pairs(Ints a, Ints b) { return low_of_pairs(a) * low_of_pairs(b) + (a >> 16) * (b >> 16); }
#endif

#endif

inline void store_any(float* p, Vec a) { store(p, a); }
inline void store_any(int16_t* p, Ints a) { store_ints(p, a); }

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
