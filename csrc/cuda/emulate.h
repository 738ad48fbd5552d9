// What the emulations share: rounding, the product of a warp, errors. See emulate.cpp.
#pragma once

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "score.h"

namespace rmcore::cuda {

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();
inline std::string message;  // of the last error, for emulate_message

inline void expect(bool condition, const char* what) {
  if (!condition) throw std::logic_error(what);
}

// Rounds to the serving dtype: 11 significant bits from 2^-14 up for fp16, 8 for bf16; ties to even.
inline float rounded(float x, Scalar dtype) {
  if (!std::isfinite(x) || x == 0.0f) return x;
  int exponent;
  std::frexp(x, &exponent);
  int bits = dtype == Scalar::kFloat16 ? 11 : 8;
  if (dtype == Scalar::kFloat16 && exponent < -13) bits -= -13 - exponent;
  return static_cast<float>(
      std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(x), bits - exponent)), exponent - bits));
}

// Fragments of mma.m16n8k16 as PTX lays them out: register word w, half e of a lane.
inline int a_row(int lane, int w) { return lane / 4 + (w % 2) * 8; }
inline int a_column(int lane, int w, int e) { return (lane % 4) * 2 + e + (w / 2) * 8; }
inline int b_row(int lane, int w, int e) { return (lane % 4) * 2 + e + w * 8; }
inline int b_column(int lane) { return lane / 4; }

// One warp-wide product: a[lane][4][2], b[lane][2][2], d[lane][4].
inline void mma(float (&d)[32][4], const float (&a)[32][4][2], const float (&b)[32][2][2]) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 2; ++e) {
      for (int w = 0; w < 4; ++w) left[a_row(lane, w)][a_column(lane, w, e)] = a[lane][w][e];
      for (int w = 0; w < 2; ++w) right[b_row(lane, w, e)][b_column(lane)] = b[lane][w][e];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + (e / 2) * 8, column = (lane % 4) * 2 + e % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
      d[lane][e] += sum;
    }
  }
}

}  // namespace rmcore::cuda
