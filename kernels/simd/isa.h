// Which instruction set this process uses: the widest one the host has, or what KERNELS_ISA asks for.
#pragma once
#include <string>
#include <vector>

namespace kernels {

// amx: AVX-512 with a matrix unit for bfloat16. emulated512, emulated_amx: the 16-lane kernels and the tiles in plain C++;
// slow, for tests on hosts without AVX-512 and AMX.
enum class Isa { portable, avx2, avx512, amx, emulated512, emulated_amx };

const char* name(Isa isa);

// Compiled into this binary / of these, what this host can run.
std::vector<Isa> compiled_isas();
bool host_runs(Isa isa);

// Throws std::runtime_error if KERNELS_ISA names something unknown, not compiled, or not runnable here.
// Read again at every call: tests change it.
Isa current_isa();

// The same to code that knows no tiles: the lanes beside them.
Isa current_lanes();

} // namespace kernels
