#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(KERNELS_X86)
#include <cpuid.h>
#endif
#if defined(KERNELS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
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

#if defined(KERNELS_AMX)
// Linux (5.16) lets a process use the tiles after it has asked: their 8 KiB a thread are no part of what it saves by default.
bool permitted_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM of asm/prctl.h, the bit of XCR0
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const unsigned tiles = 1u << 24 | 1u << 22, vectors = 1u << 5; // AMX-TILE and AMX-BF16; AVX512-BF16
    if (!has_avx512() || (saved_state() & 0x60000) != 0x60000) return false;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & tiles) != tiles) return false;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & vectors) && permitted_tiles();
}
#endif

Isa widest() {
    for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2})
        if (host_runs(isa)) return isa;
    return Isa::portable;
}

} // namespace

const char* name(Isa isa) {
    switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::amx: return "amx";
    case Isa::emulated512: return "emulated512";
    case Isa::emulated_amx: return "emulated_amx";
    default: return "portable";
    }
}

std::vector<Isa> compiled_isas() {
    return {
        Isa::portable,
#if defined(KERNELS_X86)
        Isa::avx2, Isa::avx512,
#endif
#if defined(KERNELS_AMX)
        Isa::amx,
#endif
        Isa::emulated512, Isa::emulated_amx,
    };
}

bool host_runs(Isa isa) {
    switch (isa) {
#if defined(KERNELS_X86)
    case Isa::avx2: {
        static const bool here = has_avx2();
        return here;
    }
    case Isa::avx512: {
        static const bool here = has_avx512();
        return here;
    }
#endif
#if defined(KERNELS_AMX)
    case Isa::amx: {
        static const bool here = has_amx();
        return here;
    }
#endif
    case Isa::portable:
    case Isa::emulated512:
    case Isa::emulated_amx: return true;
    default: return false;
    }
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

Isa current_lanes() {
    const Isa isa = current_isa();
    return isa == Isa::amx ? Isa::avx512 : isa == Isa::emulated_amx ? Isa::emulated512 : isa;
}

} // namespace kernels
