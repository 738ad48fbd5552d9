#pragma once

#include <cstdint>

namespace rmcore::cpu {

// The exclusive or of the 64-bit words of `bytes` bytes (a multiple of 64) at `data`, read by `threads` threads.
uint64_t read_all(const void* data, int64_t bytes, int threads);

}  // namespace rmcore::cpu
