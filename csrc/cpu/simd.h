// One vector type, `Vec`, for whatever instruction set this file is compiled for. Everything here has the same meaning
// in each: round to nearest even, fused multiply-add where the machine has one, sums in a fixed order.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Before a loop over registers: unroll it whole.
#if defined(__clang__)
#define RMCORE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define RMCORE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace rmcore::cpu::RMCORE_ISA {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_float(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }

inline float f16_to_float(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16;
  const uint32_t rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // Inf, NaN
  // Shifted into place the exponent is 112 too small; a multiplication puts that right for subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kRegisters = 32;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float sum(Vec a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// Element kPart of interleaved pairs (a0 b0 a1 b1 ...).
template <int kPart>
inline Vec load_bf16_of_pairs(const uint16_t* p) {
  const __m512i pairs = _mm512_loadu_si512(p);
  if (kPart == 0) return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Not __m512i, whose sums gcc 12 writes back to the stack at every step of a product.
typedef int Ints __attribute__((vector_size(64)));
inline Ints splat_int(int x) { return (Ints)_mm512_set1_epi32(x); }
inline Ints load_ints(const void* p) { return (Ints)_mm512_loadu_si512(p); }
inline void store_ints(void* p, Ints a) { _mm512_storeu_si512(p, (__m512i)a); }
inline Vec to_float(Ints a) { return _mm512_cvtepi32_ps((__m512i)a); }

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kRegisters = 16;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float sum(Vec a) {
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline Vec load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
template <int kPart>
inline Vec load_bf16_of_pairs(const uint16_t* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (kPart == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

typedef int Ints __attribute__((vector_size(32)));
inline Ints splat_int(int x) { return (Ints)_mm256_set1_epi32(x); }
inline Ints load_ints(const void* p) { return (Ints)_mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_ints(void* p, Ints a) { _mm256_storeu_si256(static_cast<__m256i*>(p), (__m256i)a); }
inline Vec to_float(Ints a) { return _mm256_cvtepi32_ps((__m256i)a); }

#else  // any machine: four lanes of the compiler's own vectors

typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t VecBits __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kRegisters = 16;

inline Vec zero() { return Vec{}; }
inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec abs(Vec a) { return (Vec)((VecBits)a & VecBits{0x7fffffffu, 0x7fffffffu, 0x7fffffffu, 0x7fffffffu}); }
inline Vec larger(Vec a, Vec b) {
  const VecBits above = (VecBits)(a > b);
  return (Vec)(((VecBits)a & above) | ((VecBits)b & ~above));
}
// Adding and taking away 1.5·2²³ leaves the nearest integer; beyond 2²² every float is one to within the phase's own
// error, and Inf − Inf is the NaN that the caller's subtraction would give.
inline Vec nearest(Vec a) {
  const Vec magic = splat(12582912.0f);
  Vec shifted = a + magic;
  asm("" : "+m"(shifted));  // no reassociation, whatever the flags
  const Vec rounded = shifted - magic;
  const VecBits small = (VecBits)(abs(a) < splat(4194304.0f));
  return (Vec)(((VecBits)rounded & small) | ((VecBits)a & ~small));
}
inline float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline Vec load_f16(const uint16_t* p) {
  return Vec{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
}
inline Vec load_bf16(const uint16_t* p) {
  return Vec{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
}
template <int kPart>
inline Vec load_bf16_of_pairs(const uint16_t* p) {
  p += kPart;
  return Vec{bf16_to_float(p[0]), bf16_to_float(p[2]), bf16_to_float(p[4]), bf16_to_float(p[6])};
}

typedef int Ints __attribute__((vector_size(16)));
inline Ints splat_int(int x) { return Ints{x, x, x, x}; }
inline Ints load_ints(const void* p) {
  Ints a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline void store_ints(void* p, Ints a) { std::memcpy(p, &a, sizeof a); }
inline Vec to_float(Ints a) { return __builtin_convertvector(a, Vec); }

#endif

#if defined(__AVX512BF16__)
inline void store_bf16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
}
// (a, b) → interleaved pairs.
inline void store_bf16_pairs(uint16_t* p, Vec a, Vec b) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// The compiler has `a` in a register here, and what it has loaded from memory it loads again.
template <class T>
inline void hold(T& a) {
#if defined(RMCORE_EMULATE_AVX512)
  asm volatile("" : "+m"(a)::"memory");  // there are no such registers
#elif defined(__AVX512F__)
  asm volatile("" : "+v"(a)::"memory");
#elif defined(__SSE2__)
  asm volatile("" : "+x"(a)::"memory");
#else
  (void)a;
#endif
}

// The largest lane.
inline float largest(Vec a) {
  float lanes[kWidth], most;
  store(lanes, a);
  most = lanes[0];
  for (int i = 1; i < kWidth; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// cos 2πt by t − round(t) and sin 2π(¼ − |r|), an odd polynomial of degree 9 on [−¼, ¼] fitted in the largest error:
// 3e-9 in exact arithmetic, 2e-7 in float32. NaN and Inf give NaN.
inline Vec cos_turns(Vec t) {
  const Vec q = sub(splat(0.25f), abs(sub(t, nearest(t))));
  const Vec s = mul(q, q);
  Vec p = fma(splat(39.536705f), s, splat(-76.54978f));
  p = fma(p, s, splat(81.601006f));
  p = fma(p, s, splat(-41.341656f));
  p = fma(p, s, splat(6.283185f));
  return mul(p, q);
}

// e^x − 1 for x ≤ 0, to 1e-7: 2ⁿ (e^r − 1) + (2ⁿ − 1) with |r| ≤ ln 2 / 2, so that nothing cancels near 0. Below −87 it
// is −1; a NaN may give a number.
inline Vec exp_less_one(Vec x) {
  x = larger(x, splat(-87.0f));
  const Vec n = nearest(mul(x, splat(1.44269504f)));
  const Vec r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
  Vec p = fma(splat(1.0f / 5040), r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(mul(p, r), r, r);
  // n + 1.5·2²³ has n in its last bits, where it is moved to become an exponent.
  const Vec power = (Vec)(((Ints)add(n, splat(12582912.0f)) - (0x4b400000 - 127)) << 23);
  return fma(power, p, sub(power, splat(1.0f)));
}

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
