// Weight types, and one step of a product with each: what the matrix product (gemm.h) is made of.
//
// A panel holds 64 columns of the product, k-major: float and fp16 as [k][64], bf16 as pairs [k/2][64][2], int8 as
// quads [k/4][64][4]. `Multiply<W>` says how kWidth columns of one step are loaded, what meets them, and how the
// products are summed:
//
//   float, fp16, bf16   float32 fused multiply-adds; bf16 by a shift or a mask
//   bf16, AVX-512 bf16  dot products of pairs
//   int8, VNNI          dot products of quads, unsigned times signed: activations are stored 128 too high, and what
//                       128 · Σ weights adds is taken away at the end
//   int8, AVX2, AVX-512 many rows (I8U): the same by vpmaddubsw, whose sums of pairs are int16, and a multiplication by
//                       one that sums them in int32; what a pair's sum has beyond int16 is added at the end
//                       (saturation.h)
//   int8, elsewhere     both sides as int16, vpmaddwd: pairs are multiplied and summed in int32
//
// No whole-number sum can overflow, whatever the bytes: on either side every number is within [−128, 127], so a pair's
// sum is at most 2 · 128² = 2¹⁵ in int32, and k ≤ 65,536 of them (binding.cpp holds k to that) at most 2³⁰; with
// activations 128 too high, 65,536 · 255 · 128 < 2³¹. So sums are exact, in any order: every instruction set finds the
// same whole numbers. vpmaddubsw takes three instructions for 32 multiply-adds where vpmaddwd takes four, and its
// weights need no conversion. Few rows stay with vpmaddwd: what saturates is added for 16 rows at once or more.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "simd.h"
#include "simd_whole.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int kConvertDepth = 256;  // k of a weight block that may first be converted to what is multiplied

// A weight type: how it is stored, what it is multiplied with, how many k one step takes, and the k of a weight block
// that is used for all rows before the next one is read (at most 128 KB).
struct F32 {
  using Store = float;
  using Act = float;
  static constexpr int kStep = 1;
  static constexpr int kDepth = kConvertDepth;
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
  using Act = int16_t;  // k within a quad in the order 0, 2, 1, 3: two pairs as the weights' bytes come apart
  static constexpr int kDepth = kConvertDepth;
#endif
  static constexpr int kStep = 4;
};
// int8 weights as they are, for many rows where there are no dot products of bytes.
struct I8U {
  using Store = int8_t;
  using Act = uint8_t;
  static constexpr int kDepth = 2048;
  static constexpr int kStep = 4;
};
// int8 weights as int16: pairs [k/2][64][2], where two pairs are a quad's (0, 2) and (1, 3).
struct I16 {
  using Store = int16_t;
  using Act = int16_t;
  static constexpr int kStep = 2;
  static constexpr int kDepth = kConvertDepth;
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

// What weights W are turned into where that is shared by many rows; W itself where they are multiplied as they are.
template <class W>
struct WideOf {
  using Type = W;
};
template <>
struct WideOf<F16> {
  using Type = F32;
};
#if !defined(__AVX512BF16__)
template <>
struct WideOf<BF16> {
  using Type = F32;
};
#endif
#if !defined(__AVX2__)
template <>
struct WideOf<I8> {
  using Type = I16;
};
#endif
template <class W>
using Wide = typename WideOf<W>::Type;
template <class W>
constexpr bool kConverts = !Same<W, Wide<W>>::value;

template <class W>
constexpr bool kInt8 = Same<W, I8>::value || Same<W, I8U>::value;
template <class W>
constexpr bool kSaturates = Same<W, I8U>::value;
// int8 weights that many rows share.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
using ManyI8 = I8U;
#else
using ManyI8 = I8;
#endif

// Two neighbours of the activations, or four bytes of them, in every lane.
template <class Act>
inline Ints splat_bits(const Act* p) {
  int bits;
  std::memcpy(&bits, p, 4);
  return splat_int(bits);
}

// A step is taken in kParts multiplications. `weights<i>(w)` loads part i of kWidth columns, `rows<i>(a)` what of one
// row meets it, in every lane; sum ← add(x, b, sum).
template <class W>
struct Multiply;

template <>
struct Multiply<F32> {
  using Sum = Vec;
  static constexpr int kParts = 1;
  template <int>
  static Vec weights(const float* w) {
    return load(w);
  }
  template <int>
  static Vec rows(const float* a) {
    return splat(*a);
  }
  static Vec add(Vec x, Vec b, Vec sum) { return fma(x, b, sum); }
};

template <>
struct Multiply<F16> {
  using Sum = Vec;
  static constexpr int kParts = 1;
  template <int>
  static Vec weights(const uint16_t* w) {
    return load_f16(w);
  }
  template <int>
  static Vec rows(const float* a) {
    return splat(*a);
  }
  static Vec add(Vec x, Vec b, Vec sum) { return fma(x, b, sum); }
};

template <>
struct Multiply<BF16> {
  using Sum = Vec;
#if defined(__AVX512BF16__)
  static constexpr int kParts = 1;
  template <int>
  static Ints weights(const uint16_t* w) {
    return load_ints(w);
  }
  template <int>
  static Ints rows(const uint16_t* a) {
    return splat_bits(a);
  }
  static Vec add(Ints x, Ints b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)b); }
#else
  static constexpr int kParts = 2;
  template <int kPart>
  static Vec weights(const uint16_t* w) {
    return load_bf16_of_pairs<kPart>(w);
  }
  template <int kPart>
  static Vec rows(const float* a) {
    return splat(a[kPart]);
  }
  static Vec add(Vec x, Vec b, Vec sum) { return fma(x, b, sum); }
#endif
};

#if defined(__AVX512VNNI__)
template <>
struct Multiply<I8> {
  using Sum = Ints;
  static constexpr int kParts = 1;
  template <int>
  static Ints weights(const int8_t* w) {
    return load_ints(w);
  }
  template <int>
  static Ints rows(const uint8_t* a) {
    return splat_bits(a);
  }
  static Ints add(Ints x, Ints b, Ints sum) { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)b); }
};
#else
template <>
struct Multiply<I8> {
  using Sum = Ints;
  static constexpr int kParts = 2;
  template <int kPart>
  static Ints weights(const int8_t* w) {
    return load_i16_of_quads<kPart>(w);
  }
  template <int kPart>
  static Ints rows(const int16_t* a) {
    return splat_bits(a + 2 * kPart);
  }
  static Ints add(Ints x, Ints b, Ints sum) { return multiply_pairs(x, b) + sum; }
};

#if defined(__AVX2__)
template <>
struct Multiply<I8U> {
  using Sum = Ints;
  static constexpr int kParts = 1;
  template <int>
  static Ints weights(const int8_t* w) {
    return load_ints(w);
  }
  template <int>
  static Ints rows(const uint8_t* a) {
    return splat_bits(a);
  }
  static Ints add(Ints x, Ints b, Ints sum) { return multiply_quads(x, b) + sum; }
};
#else
template <>
struct Multiply<I16> {
  using Sum = Ints;
  static constexpr int kParts = 1;
  template <int>
  static Ints weights(const int16_t* w) {
    return load_ints(w);
  }
  template <int>
  static Ints rows(const int16_t* a) {
    return splat_bits(a);
  }
  static Ints add(Ints x, Ints b, Ints sum) { return multiply_pairs(x, b) + sum; }
};
#endif
#endif

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
