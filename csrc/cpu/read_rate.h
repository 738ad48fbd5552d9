#pragma once

#include <cstdint>

namespace rmcore::cpu {

// The exclusive or of the 64-bit words of `bytes` bytes (a multiple of 64) at `data`, read by `threads` threads from 1,
// 2 or 4 places at a time each, asking for what lies `ahead` bytes ahead.
uint64_t read_all(const void* data, int64_t bytes, int threads, int streams, int64_t ahead);

}  // namespace rmcore::cpu
