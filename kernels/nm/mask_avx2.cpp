// The search in AVX2 vectors. This file alone is compiled with their flag; run only where the processor has them.
#include "mask_simd.h"

namespace kernels::nm {
namespace {

struct Avx2 {
    static constexpr int N = 8;
    typedef int32_t I __attribute__((vector_size(32)));
    typedef double D __attribute__((vector_size(32)));
    typedef int64_t L __attribute__((vector_size(32)));
};

} // namespace

const MaskOps& avx2_mask_ops() {
    static const MaskOps ops = simd_mask_ops<Avx2>();
    return ops;
}

} // namespace kernels::nm
