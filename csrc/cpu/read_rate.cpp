// Reading memory and doing nothing else: what the bandwidth limit of a benchmark is measured with.
//
//   in   bytes (a multiple of 64) at an aligned address
//   out  the exclusive or of all 64-bit words, so that no read can be left out
//
// Like the kernels it asks 8 KB ahead and shares the work in pieces, so a kernel is held against the same access.
#include "read_rate.h"

#include <atomic>

#include "parallel.h"

namespace rmcore::cpu {

uint64_t read_all(const void* data, int64_t bytes, int threads) {
  constexpr int64_t kPiece = 512 << 10, kNear = 8192;
  const char* base = static_cast<const char*>(data);
  std::atomic<uint64_t> total{0};
  parallel(threads, [&](Team& team) {
    uint64_t own = 0;
    team.each((bytes + kPiece - 1) / kPiece, [&](int64_t piece) {
      const int64_t end = (piece + 1) * kPiece < bytes ? (piece + 1) * kPiece : bytes;
      uint64_t words[8] = {};
      for (int64_t at = piece * kPiece; at < end; at += 64) {
        __builtin_prefetch(base + at + kNear, 0, 3);
        const auto* line = reinterpret_cast<const uint64_t*>(base + at);
        for (int i = 0; i < 8; ++i) words[i] ^= line[i];
      }
      for (const uint64_t word : words) own ^= word;
    });
    total ^= own;
  });
  return total;
}

}  // namespace rmcore::cpu
