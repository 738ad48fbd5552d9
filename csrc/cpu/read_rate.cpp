// Reading memory and doing nothing else: what the bandwidth limit of a benchmark is measured with.
//
//   in   bytes (a multiple of 64) at an aligned address
//   out  the exclusive or of all 64-bit words, so that no read can be left out
//
// The work is shared in pieces, as the kernels do. A thread reads its piece from `streams` places at a time and asks
// `ahead` bytes ahead: which of them reads fastest differs by machine, and by what else the machine is doing.
#include "read_rate.h"

#include <atomic>

#include "parallel.h"

namespace rmcore::cpu {
namespace {

constexpr int64_t kPiece = 512 << 10, kLine = 64;

template <int kStreams>
uint64_t read_piece(const char* from, int64_t bytes, int64_t ahead) {
  const int64_t apart = bytes / (kLine * kStreams) * kLine;
  uint64_t words[8] = {};
  const auto read = [&](const char* at) {
    __builtin_prefetch(at + ahead, 0, 3);
    const auto* line = reinterpret_cast<const uint64_t*>(at);
    for (int i = 0; i < 8; ++i) words[i] ^= line[i];
  };
  for (int64_t at = 0; at < apart; at += kLine) {
    for (int stream = 0; stream < kStreams; ++stream) read(from + stream * apart + at);
  }
  for (int64_t at = kStreams * apart; at < bytes; at += kLine) read(from + at);
  uint64_t all = 0;
  for (const uint64_t word : words) all ^= word;
  return all;
}

}  // namespace

uint64_t read_all(const void* data, int64_t bytes, int threads, int streams, int64_t ahead) {
  const char* base = static_cast<const char*>(data);
  const auto piece_of = streams == 1 ? read_piece<1> : streams == 2 ? read_piece<2> : read_piece<4>;
  std::atomic<uint64_t> total{0};
  parallel(threads, [&](Team& team) {
    uint64_t own = 0;
    team.each((bytes + kPiece - 1) / kPiece, [&](int64_t piece) {
      const int64_t start = piece * kPiece, left = bytes - start;
      own ^= piece_of(base + start, left < kPiece ? left : kPiece, ahead);
    });
    total ^= own;
  });
  return total;
}

}  // namespace rmcore::cpu
