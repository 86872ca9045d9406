#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(KERNELS_X86)
#include <cpuid.h>
#endif

namespace kernels {
namespace {

#if defined(KERNELS_X86)
// The operating system must save the wide registers too, not only the processor have them.
unsigned long long saved_state() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<unsigned long long>(high) << 32) | low;
}

bool has_avx2() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
    if (!(ecx & bit_FMA) || !(ecx & bit_AVX) || (saved_state() & 0x6) != 0x6) return false;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_AVX2);
}

bool has_avx512() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const unsigned needed = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    if (!has_avx2() || (saved_state() & 0xe6) != 0xe6) return false;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & needed) == needed;
}
#endif

Isa widest() {
    for (Isa isa : {Isa::avx512, Isa::avx2})
        if (host_runs(isa)) return isa;
    return Isa::portable;
}

} // namespace

const char* name(Isa isa) {
    switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::emulated512: return "emulated512";
    default: return "portable";
    }
}

std::vector<Isa> compiled_isas() {
#if defined(KERNELS_X86)
    return {Isa::portable, Isa::avx2, Isa::avx512, Isa::emulated512};
#else
    return {Isa::portable, Isa::emulated512};
#endif
}

bool host_runs(Isa isa) {
    if (isa == Isa::portable || isa == Isa::emulated512) return true;
#if defined(KERNELS_X86)
    static const bool avx2 = has_avx2(), avx512 = has_avx512();
    return isa == Isa::avx2 ? avx2 : avx512;
#else
    return false;
#endif
}

Isa current_isa() {
    const char* asked = std::getenv("KERNELS_ISA");
    if (!asked || !*asked) return widest();
    std::string known;
    for (Isa isa : compiled_isas()) {
        if (std::string(asked) != name(isa)) {
            known += (known.empty() ? "" : ", ") + std::string(name(isa));
            continue;
        }
        if (host_runs(isa)) return isa;
        throw std::runtime_error("KERNELS_ISA is " + std::string(asked) + ", which this processor lacks; the widest it has is " +
                                 name(widest()) + "; unset KERNELS_ISA to use that");
    }
    throw std::runtime_error("KERNELS_ISA is " + std::string(asked) + "; expected one of " + known +
                             ", or unset for the widest this processor has");
}

} // namespace kernels
