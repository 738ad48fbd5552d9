// AVX-512 as two halves of AVX2, lane by lane: so that the kernels of every instruction set can be tested on a machine
// without it (RMCORE_EMULATE_AVX512; make test-avx512). In the include path of that build alone, before the compiler's
// own header. What the kernels use and no more; rounding and NaN as the machine has them, denormals of bf16 products
// kept where it makes them zeros.
#pragma once

#pragma push_macro("__AVX512F__")
#pragma push_macro("__AVX512BW__")
#pragma push_macro("__AVX512VNNI__")
#pragma push_macro("__AVX512BF16__")
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512VNNI__
#undef __AVX512BF16__
#include_next <immintrin.h>
#pragma pop_macro("__AVX512F__")
#pragma pop_macro("__AVX512BW__")
#pragma pop_macro("__AVX512VNNI__")
#pragma pop_macro("__AVX512BF16__")

#include <stdint.h>
#include <string.h>

// `to` and `from` have 64 and 32 bytes, or the other way round.
template <class Whole, class Half>
static inline Whole emulated_join(Half low, Half high) {
  Whole whole;
  memcpy(&whole, &low, 32);
  memcpy(reinterpret_cast<char*>(&whole) + 32, &high, 32);
  return whole;
}
template <class Half, class Whole>
static inline Half emulated_half(Whole whole, int which) {
  Half half;
  memcpy(&half, reinterpret_cast<const char*>(&whole) + 32 * which, 32);
  return half;
}

#define EMULATED_1(name, half, type, part)                                                        \
  static inline type emulated_##name(type a) {                                                    \
    return emulated_join<type>(half(emulated_half<part>(a, 0)), half(emulated_half<part>(a, 1))); \
  }
#define EMULATED_2(name, half, type, part)                                                  \
  static inline type emulated_##name(type a, type b) {                                      \
    return emulated_join<type>(half(emulated_half<part>(a, 0), emulated_half<part>(b, 0)),  \
                               half(emulated_half<part>(a, 1), emulated_half<part>(b, 1))); \
  }
#define EMULATED_SHIFT(name, half)                                            \
  static inline __m512i emulated_##name(__m512i a, int count) {               \
    return emulated_join<__m512i>(half(emulated_half<__m256i>(a, 0), count),  \
                                  half(emulated_half<__m256i>(a, 1), count)); \
  }

EMULATED_2(add_ps, _mm256_add_ps, __m512, __m256)
EMULATED_2(sub_ps, _mm256_sub_ps, __m512, __m256)
EMULATED_2(mul_ps, _mm256_mul_ps, __m512, __m256)
EMULATED_2(max_ps, _mm256_max_ps, __m512, __m256)
EMULATED_2(add_epi32, _mm256_add_epi32, __m512i, __m256i)
EMULATED_2(sub_epi32, _mm256_sub_epi32, __m512i, __m256i)
EMULATED_2(min_epi32, _mm256_min_epi32, __m512i, __m256i)
EMULATED_2(max_epi32, _mm256_max_epi32, __m512i, __m256i)
EMULATED_2(and_si512, _mm256_and_si256, __m512i, __m256i)
EMULATED_2(or_si512, _mm256_or_si256, __m512i, __m256i)
EMULATED_2(madd_epi16, _mm256_madd_epi16, __m512i, __m256i)
EMULATED_2(maddubs_epi16, _mm256_maddubs_epi16, __m512i, __m256i)
EMULATED_SHIFT(slli_epi16, _mm256_slli_epi16)
EMULATED_SHIFT(slli_epi32, _mm256_slli_epi32)
EMULATED_SHIFT(srai_epi16, _mm256_srai_epi16)

static inline __m512 emulated_set1_ps(float x) { return emulated_join<__m512>(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static inline __m512i emulated_set1_epi32(int x) {
  return emulated_join<__m512i>(_mm256_set1_epi32(x), _mm256_set1_epi32(x));
}
static inline __m512i emulated_set1_epi16(short x) {
  return emulated_join<__m512i>(_mm256_set1_epi16(x), _mm256_set1_epi16(x));
}
static inline __m512 emulated_setzero_ps() { return emulated_set1_ps(0.0f); }
static inline __m512 emulated_abs_ps(__m512 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return emulated_join<__m512>(_mm256_andnot_ps(sign, emulated_half<__m256>(a, 0)),
                               _mm256_andnot_ps(sign, emulated_half<__m256>(a, 1)));
}
static inline __m512 emulated_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated_join<__m512>(
      _mm256_fmadd_ps(emulated_half<__m256>(a, 0), emulated_half<__m256>(b, 0), emulated_half<__m256>(c, 0)),
      _mm256_fmadd_ps(emulated_half<__m256>(a, 1), emulated_half<__m256>(b, 1), emulated_half<__m256>(c, 1)));
}
// To whole numbers: the one way that is used.
static inline __m512 emulated_roundscale_ps(__m512 a, int) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return emulated_join<__m512>(_mm256_round_ps(emulated_half<__m256>(a, 0), kNearest),
                               _mm256_round_ps(emulated_half<__m256>(a, 1), kNearest));
}

static inline __m512 emulated_loadu_ps(const void* p) {
  __m512 a;
  memcpy(&a, p, sizeof a);
  return a;
}
static inline __m512i emulated_loadu_si512(const void* p) {
  __m512i a;
  memcpy(&a, p, sizeof a);
  return a;
}
static inline void emulated_storeu_ps(void* p, __m512 a) { memcpy(p, &a, sizeof a); }
static inline void emulated_storeu_si512(void* p, __m512i a) { memcpy(p, &a, sizeof a); }

static inline __m512 emulated_castsi512_ps(__m512i a) { return emulated_loadu_ps(&a); }
static inline __m256 emulated_castps512_ps256(__m512 a) { return emulated_half<__m256>(a, 0); }
static inline __m256 emulated_extractf32x8_ps(__m512 a, int which) { return emulated_half<__m256>(a, which); }

static inline __m512 emulated_cvtepi32_ps(__m512i a) {
  return emulated_join<__m512>(_mm256_cvtepi32_ps(emulated_half<__m256i>(a, 0)),
                               _mm256_cvtepi32_ps(emulated_half<__m256i>(a, 1)));
}
static inline __m512i emulated_cvtps_epi32(__m512 a) {
  return emulated_join<__m512i>(_mm256_cvtps_epi32(emulated_half<__m256>(a, 0)),
                                _mm256_cvtps_epi32(emulated_half<__m256>(a, 1)));
}
#define EMULATED_WIDEN(name, type, part, from, low, high) \
  static inline type emulated_##name(from a) { return emulated_join<type>(part(low), part(high)); }
EMULATED_WIDEN(cvtph_ps, __m512, _mm256_cvtph_ps, __m256i, _mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1))
EMULATED_WIDEN(cvtepi16_epi32, __m512i, _mm256_cvtepi16_epi32, __m256i, _mm256_castsi256_si128(a),
               _mm256_extracti128_si256(a, 1))
EMULATED_WIDEN(cvtepu16_epi32, __m512i, _mm256_cvtepu16_epi32, __m256i, _mm256_castsi256_si128(a),
               _mm256_extracti128_si256(a, 1))
EMULATED_WIDEN(cvtepu8_epi16, __m512i, _mm256_cvtepu8_epi16, __m256i, _mm256_castsi256_si128(a),
               _mm256_extracti128_si256(a, 1))
EMULATED_WIDEN(cvtepu8_epi32, __m512i, _mm256_cvtepu8_epi32, __m128i, a, _mm_srli_si128(a, 8))

// The low byte of each int32, or the nearest there is.
static inline __m128i emulated_cvtepi32_epi8(__m512i a) {
  int32_t from[16];
  uint8_t to[16];
  memcpy(from, &a, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(from[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(to));
}
static inline __m128i emulated_cvtsepi32_epi8(__m512i a) {
  int32_t from[16];
  int8_t to[16];
  memcpy(from, &a, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(from[i] > 127 ? 127 : from[i] < -128 ? -128 : from[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(to));
}

// sum + the dot products of quads, those of `a` unsigned.
static inline __m512i emulated_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  __m256i out[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i x = emulated_half<__m256i>(a, i), y = emulated_half<__m256i>(b, i);
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    out[i] = _mm256_add_epi32(emulated_half<__m256i>(sum, i), _mm256_add_epi32(even, odd));
  }
  return emulated_join<__m512i>(out[0], out[1]);
}

// Round to nearest even; NaN stays one.
static inline __m256i emulated_cvtneps_pbh(__m512 a) {
  uint32_t from[16];
  uint16_t to[16];
  memcpy(from, &a, sizeof from);
  for (int i = 0; i < 16; ++i) {
    const bool nan = (from[i] & 0x7fffffffu) > 0x7f800000u, denormal = (from[i] & 0x7f800000u) == 0;
    const uint32_t rounded = denormal ? from[i] & 0x80000000u : from[i] + 0x7fffu + ((from[i] >> 16) & 1);
    to[i] = static_cast<uint16_t>(nan ? (from[i] >> 16) | 64u : rounded >> 16);
  }
  __m256i all;
  memcpy(&all, to, sizeof all);
  return all;
}
// sum + the dot products of pairs of bf16, the second of a pair first.
template <class Pairs>
static inline __m512 emulated_dpbf16_ps(__m512 sum, Pairs a, Pairs b) {
  __m256 out[2];
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int i = 0; i < 2; ++i) {
    const __m256i x = emulated_half<__m256i>(a, i), y = emulated_half<__m256i>(b, i);
    const __m256 second =
        _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(y, high)),
                        emulated_half<__m256>(sum, i));
    out[i] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                             _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), second);
  }
  return emulated_join<__m512>(out[0], out[1]);
}

#define _mm512_abs_ps emulated_abs_ps
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_ps emulated_add_ps
#define _mm512_and_si512 emulated_and_si512
#define _mm512_castps512_ps256 emulated_castps512_ps256
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_cvtepi16_epi32 emulated_cvtepi16_epi32
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtsepi32_epi8 emulated_cvtsepi32_epi8
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_maddubs_epi16 emulated_maddubs_epi16
#define _mm512_max_epi32 emulated_max_epi32
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_epi32 emulated_min_epi32
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_or_si512 emulated_or_si512
#define _mm512_roundscale_ps emulated_roundscale_ps
#define _mm512_set1_epi16 emulated_set1_epi16
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_setzero_ps emulated_setzero_ps
#define _mm512_slli_epi16 emulated_slli_epi16
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_srai_epi16 emulated_srai_epi16
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_sub_epi32 emulated_sub_epi32
#define _mm512_sub_ps emulated_sub_ps
