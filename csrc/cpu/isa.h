// Which instruction set the kernels run with, chosen at run time.
#pragma once

namespace rmcore::cpu {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, avx512_bf16 = 4 };

// The best instruction set of this processor and operating system.
Isa detect_isa();

// The one in use: the best, lowered by the environment variable RMCORE_CPU_ISA or by set_isa.
Isa active_isa();

// Use `name`, or the best again for "auto". False where the name is unknown or above what the machine has.
bool set_isa(const char* name);

const char* isa_name(Isa isa);

}  // namespace rmcore::cpu
