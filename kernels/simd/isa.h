// Which instruction set this process uses: the widest one the host has, or what KERNELS_ISA asks for.
#pragma once
#include <string>
#include <vector>

namespace kernels {

// emulated512: the 16-lane kernels over plain C++ lanes; slow, for tests on hosts without AVX-512.
enum class Isa { portable, avx2, avx512, emulated512 };

const char* name(Isa isa);

// Compiled into this binary / of these, what this host can run.
std::vector<Isa> compiled_isas();
bool host_runs(Isa isa);

// Throws std::runtime_error if KERNELS_ISA names something unknown, not compiled, or not runnable here.
// Read again at every call: tests change it.
Isa current_isa();

} // namespace kernels
