// Multiplying and doing nothing else: what the arithmetic limit of a benchmark is measured with.
//
//   in   the dtype of the weights whose products are meant; how many rounds each piece takes
//   out  operations done (a multiply-add is two)
//
// The multiply-adds of multiply.h on registers alone, in more independent sums than an addition takes cycles: nothing
// that reads its operands from memory can be faster in this instruction set. fp16, and bf16 without dot products, count
// as the float32 they are multiplied in.
#include "kernels.h"
#include "multiply.h"
#include "parallel.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

// No more than RMCORE_UNROLL unrolls: the sums of a loop that is left standing lie in memory, and every addition then
// waits for a store, at half the machine's rate.
constexpr int kSums = kRegisters == 32 ? 16 : 12;
constexpr int64_t kPieces = 4;  // a thread

template <class W>
constexpr int kTogether = Same<W, F32>::value ? 1 : 4 / static_cast<int>(sizeof(typename W::Store));

// Half a step of any multiplication: small numbers, so that no sum leaves its range.
inline void fill(Vec& a) { a = splat(0.5f); }
inline void fill(Ints& a) { a = splat_int(0x01010101); }

template <class W>
size_t multiply_registers(int64_t rounds, int threads) {
  using M = Multiply<W>;
  constexpr int kNumbers = kTogether<W> * kWidth;
  parallel(threads, [&](Team& team) {
    team.each(kPieces * threads, [&](int64_t) {
      decltype(M::template rows<0>(nullptr)) x;
      decltype(M::template weights<0>(nullptr)) b;
      typename M::Sum s[kSums];
      fill(x);
      fill(b);
      RMCORE_UNROLL
      for (int i = 0; i < kSums; ++i) s[i] = typename M::Sum{};
      for (int64_t round = 0; round < rounds; ++round) {
        RMCORE_UNROLL
        for (int i = 0; i < kSums; ++i) {
          hold(x);  // or all sums would be seen to be one
          s[i] = M::add(x, b, s[i]);
        }
      }
      RMCORE_UNROLL
      for (int i = 0; i < kSums; ++i) hold(s[i]);
    });
  });
  return static_cast<size_t>(2 * kPieces * threads * rounds * kSums * kNumbers);
}

}  // namespace

size_t multiply_all(Dtype dtype, int64_t rounds, int threads) {
  return with_any_weight_type(dtype, kConvertRows,
                              [&](auto weight) { return multiply_registers<Wide<decltype(weight)>>(rounds, threads); });
}

}  // namespace rmcore::cpu::RMCORE_ISA
