// Which instruction set this machine offers, asked once at run time.
#pragma once

namespace rmcore::cpu {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best instruction set of this processor and operating system.
Isa detect_isa();

const char* isa_name(Isa isa);

}  // namespace rmcore::cpu
