// The search in vectors that every processor has: SSE2 on any x86-64, NEON on Arm.
#include "mask_simd.h"

namespace kernels::nm {
namespace {

struct Portable {
    static constexpr int N = 4;
    typedef int32_t I __attribute__((vector_size(16)));
    typedef double D __attribute__((vector_size(16)));
    typedef int64_t L __attribute__((vector_size(16)));
};

} // namespace

const MaskOps& portable_mask_ops() {
    static const MaskOps ops = simd_mask_ops<Portable>();
    return ops;
}

} // namespace kernels::nm
