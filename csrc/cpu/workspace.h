// Sizes in whole panels, and the caller's workspace handed out piece by piece.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t panels_of(int64_t columns) { return ceil_div(columns, kPanel); }

// Row stride of an activation buffer: whole panels, plus a line so that rows do not fall into one cache set.
template <class Act>
int64_t act_stride(int64_t columns) {
  return round_up(columns, kPanel) + 64 / static_cast<int64_t>(sizeof(Act));
}

// Hands out 64-byte aligned pieces of the caller's workspace; counts bytes only where there is none yet.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

  // `count` pieces, one a thread, a line apart.
  template <class T>
  struct PerThread {
    T* base;
    int64_t stride;
    T* operator[](int rank) const { return base + rank * stride; }
  };
  template <class T>
  PerThread<T> take_each(int threads, int64_t count) {
    const int64_t stride = round_up(count * static_cast<int64_t>(sizeof(T)), 64) / sizeof(T) + 64 / sizeof(T);
    return {take<T>(stride * threads), stride};
  }

  bool counting() const { return base_ == nullptr; }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
