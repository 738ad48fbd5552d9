// One row over several panels at a time, for CPUs whose memory reads more from several places than from one.
//
// A row reads every weight once, and memory is the limit. On a Zen 3 a thread reads up to a third more from four panels
// side by side, a granule of each in turn, than from one after the other (`rmcore bench` tries both: ReadRate). The
// sums of a weight block wait in memory while the other panels have their turn; additions come in the order of
// rows_product, so the bits are the same.
#pragma once

#include <cstring>

#include "gemm.h"
#include "parallel.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int kStreams = 4;        // panels at a time
constexpr int kGranuleLines = 32;  // of a panel before the next one's turn

// Whether a row goes this way. With AVX-512 it has not been measured.
template <class W>
constexpr bool kStreamed = kRegisters == 16 && kColumnVecs<1> * kWidth == kPanel && !kSaturates<W>;

template <class W>
constexpr int kGranule = kGranuleLines / kStepLines<W> * W::kStep;  // k

// A panel: its weights, and how many k it has.
template <class W>
struct Stream {
  const typename W::Store* weights;
  int k;
};

inline void take_sum(const float* from, Vec& sum) { sum = load(from); }
inline void take_sum(const float* from, Ints& sum) { sum = load_ints(from); }

constexpr int kTerm = kStreams * kPanel;  // from the sums of one row to those of the other

// sums (R, 64), kTerm apart, += a (R, k), `low` apart · k × 64 weights. A whole granule may ask for as many lines, of
// each of `next` in turn.
template <class W, int R, bool kWhole, bool kAsk>
inline void add_granule(const typename W::Act* a, ptrdiff_t low, const typename W::Store* w, int k, float* sums,
                        const char* const* next) {
  using M = Multiply<W>;
  constexpr int N = kColumnVecs<R>, kColumns = N * kWidth;
  constexpr int kSteps = kWhole ? kStreams / kStepLines<W> : 1;  // while a line of each is asked for
  const int rounds = kWhole ? kGranuleLines / kStreams : k / W::kStep;
  RMCORE_UNROLL
  for (int first = 0; first < kPanel; first += kColumns) {
    typename M::Sum s[R][N];
    RMCORE_UNROLL
    for (int r = 0; r < R; ++r) {
      RMCORE_UNROLL
      for (int j = 0; j < N; ++j) take_sum(sums + r * kTerm + first + j * kWidth, s[r][j]);
    }
    const auto* rows = a;
    const auto* columns = w + first * W::kStep;
    for (int round = 0; round < rounds; ++round) {
      if constexpr (kAsk) {
        RMCORE_UNROLL
        for (int q = 0; q < kStreams && first == 0; ++q) __builtin_prefetch(next[q] + 64 * round, 0, 3);
      }
      RMCORE_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        multiply_part<W, 0>(rows, low, columns, s);
        if constexpr (M::kParts == 2) {
          RMCORE_UNROLL
          for (int r = 0; r < R; ++r) {
            RMCORE_UNROLL
            for (int j = 0; j < N; ++j) hold(s[r][j]);
          }
          multiply_part<W, 1>(rows, low, columns, s);
        }
        rows += W::kStep;
        columns += kPanel * W::kStep;
      }
    }
    RMCORE_UNROLL
    for (int r = 0; r < R; ++r) {
      RMCORE_UNROLL
      for (int j = 0; j < N; ++j) add_up(sums + r * kTerm + first + j * kWidth, s[r][j], false);
    }
  }
}

// acc[r][s] (64) = row r · panel s, for `count` panels (kStreams or one) and the R rows from `a` on, `low` apart.
template <class W, int R>
void streams_product(const typename W::Act* a, ptrdiff_t low, const Stream<W>* streams, int count, float* acc) {
  alignas(64) float running[R * kTerm];
  int longest = 0, shortest = streams[0].k;
  for (int s = 0; s < count; ++s) {
    longest = streams[s].k > longest ? streams[s].k : longest;
    shortest = streams[s].k < shortest ? streams[s].k : shortest;
  }
  if (longest == 0) std::memset(acc, 0, sizeof(float) * R * kTerm);
  constexpr int kShare = kGranuleLines / kStreams * 64;
  for (int k0 = 0; k0 < longest; k0 += W::kDepth) {
    const int end = k0 + W::kDepth < longest ? k0 + W::kDepth : longest;
    std::memset(running, 0, sizeof running);
    for (int at = k0; at < end; at += kGranule<W>) {
      const bool whole = at + kGranule<W> <= (shortest < end ? shortest : end);
      const bool ask = whole && at + 2 * kGranule<W> <= shortest;  // there is as much again
      const char* next[kStreams];
      for (int q = 0; q < kStreams && ask; ++q) {
        const auto* from = streams[count == 1 ? 0 : q].weights + static_cast<ptrdiff_t>(at + kGranule<W>) * kPanel;
        next[q] = reinterpret_cast<const char*>(from) + (count == 1 ? q * kShare : 0);
      }
      for (int s = 0; s < count; ++s) {
        const auto* w = streams[s].weights + static_cast<ptrdiff_t>(at) * kPanel;
        float* sums = running + s * kPanel;
        if (ask) {
          add_granule<W, R, true, true>(a + at, low, w, 0, sums, next);
          for (int q = 0; q < kStreams; ++q) next[q] += kShare;
          continue;
        }
        const int left = (streams[s].k < end ? streams[s].k : end) - at;
        const int k = left < kGranule<W> ? left : kGranule<W>;
        if (k > 0) add_granule<W, R, false, false>(a + at, low, w, k, sums, nullptr);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int s = 0; s < count; ++s) {
        for (int c = 0; c < kPanel && k0 < streams[s].k; c += kWidth) {
          typename Multiply<W>::Sum sum;
          take_sum(running + r * kTerm + s * kPanel + c, sum);
          add_up(acc + r * kTerm + s * kPanel + c, sum, k0 > 0);
        }
      }
    }
  }
}

// A stage of one row: its products with `panels` panels, where panel_of(i) is the i-th. `done(i, acc, low_acc)`
// receives each one's 64 sums (and those of the row at `a + low`, where `low` is not 0) in the thread that has made
// them. Panels go four by four and, for the end, so that no thread waits long for another, one by one.
template <class W, class PanelOf, class Done>
void one_row_stage(Team& team, int64_t panels, const typename W::Act* a, ptrdiff_t low, PanelOf&& panel_of,
                   Done&& done) {
  const int64_t alone = static_cast<int64_t>(kStreams) * team.size();
  const int64_t fours = panels > alone ? (panels - alone) / kStreams : 0;
  team.each(panels - fours * (kStreams - 1), [&](int64_t task) {
    const int count = task < fours ? kStreams : 1;
    const int64_t first = task < fours ? task * kStreams : task + fours * (kStreams - 1);
    Stream<W> streams[kStreams];
    for (int s = 0; s < count; ++s) streams[s] = panel_of(first + s);
    alignas(64) float acc[2 * kTerm];
    if (low == 0) {
      streams_product<W, 1>(a, 0, streams, count, acc);
    } else {
      streams_product<W, 2>(a, low, streams, count, acc);
    }
    for (int s = 0; s < count; ++s) done(first + s, acc + s * kPanel, acc + kTerm + s * kPanel);
  });
}

}  // namespace
}  // namespace rmcore::cpu::RMCORE_ISA
