// Sizes in whole panels, and the caller's workspace handed out piece by piece.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

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

// Hands out 64-byte aligned pieces of the caller's workspace; counts bytes only where there is none yet. In a build
// with an address sanitizer nobody may touch what lies behind a piece, and there is some behind each.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), whole = round_up(bytes, 64) + kBetween;
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += whole;
    if (piece != nullptr) fence(piece, bytes, whole);
    return reinterpret_cast<T*>(piece);
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
    const int64_t size = static_cast<int64_t>(sizeof(T));
    const int64_t stride = round_up(count * size, 64) / size + 64 / size;
    T* base = take<T>(stride * threads);
    for (int t = 0; base != nullptr && t < threads; ++t) {
      fence(reinterpret_cast<char*>(base + t * stride), count * size, stride * size);
    }
    return {base, stride};
  }

  bool counting() const { return base_ == nullptr; }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kBetween = 64;
  // Of `whole` bytes only the first may be touched: an earlier call may have forbidden any of them.
  static void fence(char* start, int64_t bytes, int64_t whole) {
    __asan_unpoison_memory_region(start, static_cast<size_t>(bytes));
    __asan_poison_memory_region(start + bytes, static_cast<size_t>(whole - bytes));
  }
#else
  static constexpr int64_t kBetween = 0;
  static void fence(char*, int64_t, int64_t) {}
#endif

  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
