// Hidden rows → what the products take: float, bf16, or whole numbers with a factor a row; and c likewise.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "kernels.h"
#include "outliers.h"
#include "simd.h"
#include "workspace.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

inline float element(const Rows& rows, int64_t index) {
  switch (rows.dtype) {
    case Dtype::f32:
      return static_cast<const float*>(rows.data)[index];
    case Dtype::f16:
      return f16_to_float(static_cast<const uint16_t*>(rows.data)[index]);
    case Dtype::bf16:
      return bf16_to_float(static_cast<const uint16_t*>(rows.data)[index]);
    case Dtype::f64:
    case Dtype::i8:  // weights only
      break;
  }
  return static_cast<float>(static_cast<const double*>(rows.data)[index]);
}

inline Vec load_elements(const Rows& rows, int64_t index) {
  switch (rows.dtype) {
    case Dtype::f32:
      return load(static_cast<const float*>(rows.data) + index);
    case Dtype::f16:
      return load_f16(static_cast<const uint16_t*>(rows.data) + index);
    case Dtype::bf16:
      return load_bf16(static_cast<const uint16_t*>(rows.data) + index);
    case Dtype::f64:
    case Dtype::i8:  // weights only
      break;
  }
  float buffer[kWidth];
  for (int i = 0; i < kWidth; ++i) buffer[i] = static_cast<float>(static_cast<const double*>(rows.data)[index + i]);
  return load(buffer);
}

inline void store_act(float* out, Vec x) { store(out, x); }
#if defined(__AVX512BF16__)
inline void store_act(uint16_t* out, Vec x) { store_bf16(out, x); }
#endif

// x at `out`; where `low` is not 0, what rounding took away at `out + low`.
template <class Act>
inline void store_act(Act* out, int64_t low, Vec x) {
  store_act(out, x);
  if constexpr (!Same<Act, float>::value) {
    if (low != 0) store_act(out + low, sub(x, load_bf16(out)));
  }
}

// int8 activations: whole numbers −127 … 127, each row with a factor of its own.
constexpr float kWhole = 127.0f;
template <class Act>
constexpr Act kNothing = Same<Act, uint8_t>::value ? Act(128) : Act(0);  // 0 as store_whole writes it
// Where store_whole puts a column of a row.
template <class Act>
inline int place_whole(int column) {
  if (Same<Act, uint8_t>::value) return column;
  constexpr int kOrder[4] = {0, 2, 1, 3};
  return column / 4 * 4 + kOrder[column % 4];
}

constexpr float kLowTerm = 1.0f / (2.0f * kWhole);  // a low term's factor over its row's: rounding leaves half a step

// Columns 0 … columns of a row, kWidth at a time from `values(i)`, to whole numbers; returns the row's factor, which is
// NaN where a value is not finite. Where `low` is not 0, what rounding took away goes to `out + low`. Where `outliers`
// is given, they go there and are zeros in the row.
template <class Act, class Values>
float quantize_row(int64_t columns, Act* out, int64_t low, Values&& values, Outliers* outliers = nullptr) {
  Vec most = zero(), spoilt = zero(), sizes = zero();
  for (int64_t i = 0; i < columns; i += kWidth) {
    const Vec x = values(i), size = abs(x);
    most = larger(most, size);
    sizes = add(sizes, size);
    spoilt = add(spoilt, sub(x, x));
  }
  Extent extent{largest(most), sum(sizes)};
  if (outliers != nullptr) extent = take_outliers(columns, extent, values, *outliers);
  const Vec factor = splat(extent.edge > 1e-30f ? kWhole / extent.edge : 0.0f);
  for (int64_t i = 0; i < columns; i += kWidth) {
    const Vec x = mul(values(i), factor), whole = nearest(x);
    store_whole(out + i, whole);
    if (low != 0) store_whole(out + low + i, nearest(mul(sub(x, whole), splat(1.0f / kLowTerm))));
  }
  for (int k = 0; outliers != nullptr && k < outliers->count; ++k) {
    const int place = place_whole<Act>(outliers->columns[k]);
    out[place] = kNothing<Act>;
    if (low != 0) out[low + place] = kNothing<Act>;
  }
  return extent.edge / kWhole + sum(spoilt);
}

// c, which is within ±1, in whole numbers of 1/127; a NaN is anything, so that whoever sums must bring it back.
template <class W>
void store_feature(typename W::Act* out, Vec c) {
  if constexpr (kInt8<W>) {
    store_whole(out, nearest(mul(c, splat(kWhole))));
  } else {
    store_act(out, c);
  }
}

// True where what the products take, bf16 or int8, holds less than the rows do.
template <class W>
bool rounds(const Rows& rows) {
  return kInt8<W> || (!Same<typename W::Act, float>::value && rows.dtype != Dtype::bf16);
}

// True where rows are worth two terms each: they hold more than one, and the product that takes them is the lesser part
// of the work. A property of the head and the dtype of its rows, never of how many there are.
template <class W>
bool two_terms(const Map& map, const Rows& rows) {
  return rounds<W>(rows) && 2 * map.hidden <= map.features;
}

// Row `row` of a map's input, shifted and scaled by column: kWidth columns at a time, zeros behind the last.
struct RowValues {
  const Rows& rows;
  int64_t start, columns;
  float factor;
  const float *shifts, *scales;  // by column, or null

  RowValues(const Map& map, const Rows& rows, int64_t row)
      : rows(rows),
        start(row * rows.row_stride),
        columns(map.hidden),
        factor(map.input_scale),
        shifts(map.hidden_shift),
        scales(map.hidden_scale) {}

  // Of a head without a map: times one factor.
  RowValues(const Rows& rows, int64_t row, int64_t columns, float factor)
      : rows(rows), start(row * rows.row_stride), columns(columns), factor(factor), shifts(nullptr), scales(nullptr) {}

  Vec operator()(int64_t i) const {
    const bool centred = shifts != nullptr;
    Vec x, shift = zero(), scale = splat(factor);
    if (rows.col_stride == 1 && i + kWidth <= columns) {
      x = load_elements(rows, start + i);
      if (centred) {
        shift = load(shifts + i);
        scale = mul(scale, load(scales + i));
      }
    } else {
      float values[kWidth] = {}, less[kWidth] = {}, times[kWidth] = {};
      for (int j = 0; j < kWidth && i + j < columns; ++j) {
        values[j] = element(rows, start + (i + j) * rows.col_stride);
        less[j] = centred ? shifts[i + j] : 0.0f;
        times[j] = (centred ? scales[i + j] : 1.0f) * factor;
      }
      x = load(values);
      shift = load(less);
      scale = load(times);
    }
    return mul(sub(x, shift), scale);
  }
};

// A row rounded to Act, zeros up to a whole panel; where `outliers` is given they go there and are zeros in the row.
template <class Act>
void load_row(const RowValues& values, int64_t columns, Act* out, int64_t low, Outliers* outliers) {
  const int64_t whole = round_up(columns, kPanel);
  if (outliers != nullptr) {
    Vec most = zero(), sizes = zero();
    for (int64_t i = 0; i < whole; i += kWidth) {
      const Vec size = abs(values(i));
      most = larger(most, size);
      sizes = add(sizes, size);
    }
    take_outliers(whole, Extent{largest(most), sum(sizes)}, values, *outliers);
  }
  for (int64_t i = 0; i < whole; i += kWidth) store_act(out + i, low, values(i));
  for (int k = 0; outliers != nullptr && k < outliers->count; ++k) {
    out[outliers->columns[k]] = Act(0);
    if (low != 0) out[low + outliers->columns[k]] = Act(0);
  }
}

// A row as whole numbers and outliers; returns the row's factor.
template <class Act>
float load_row_int8(const RowValues& values, int64_t columns, Act* out, int64_t low, Outliers& outliers) {
  return quantize_row(round_up(columns, kPanel), out, low, values, &outliers);
}

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
