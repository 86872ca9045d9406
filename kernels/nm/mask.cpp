// Groups are shared out among threads in panels of a few hundred; a mask is the same whoever finds it.
#include "mask.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../simd/isa.h"
#include "mask_ops.h"

namespace kernels::nm {
namespace {

constexpr int64_t kFew = 1 << 15; // weights that are not worth waking threads for

// keep of every `size` places, `count` groups of which `per_row` lie one after the other, rows `row` apart.
void select(const Groups& groups, int threads) {
    const int64_t lanes = groups.count * groups.inner, step = lanes_of(groups), panels = (lanes + step - 1) / step;
    const MaskOps& ops = mask_ops();
    const bool many = threads > 1 && lanes * groups.size >= kFew;
#pragma omp parallel num_threads(threads) if (many)
    {
        std::vector<int32_t> scratch(std::max(kPanel, step * groups.size));
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel)
            ops.select(groups, panel * step, std::min(lanes, (panel + 1) * step), scratch.data());
    }
}

// Groups that keep all or nothing.
void fill(const Groups& groups) {
    for (int64_t g = 0; g < groups.count; g += groups.per_row) // the groups of a row lie one after the other
        std::memset(groups.out + g / groups.per_row * groups.row, groups.keep > 0, groups.per_row * groups.size * groups.inner);
}

void run(const Groups& groups, int threads) {
    if (!groups.count || !groups.size || !groups.inner) return;
    if (groups.keep == 0 || groups.keep == groups.size)
        fill(groups);
    else
        select(groups, threads);
}

} // namespace

const MaskOps& mask_ops() {
    switch (current_isa()) {
#if defined(KERNELS_X86)
    // Sixteen lanes bring nothing: the time goes into transposing and into memory.
    case Isa::avx512:
    case Isa::avx2: return avx2_mask_ops();
#endif
    default: return portable_mask_ops();
    }
}

void mask(const float* weight, const Axis& axis, int64_t n, int64_t m, uint8_t* out, int threads) {
    const int64_t row = axis.size * axis.inner, full = axis.size / m, rest = axis.size % m;
    if (rest == 0) { // one long row
        run({weight, out, axis.outer * full, std::max<int64_t>(1, axis.outer * full), 0, axis.inner, m, n}, threads);
        return;
    }
    const int64_t start = full * m * axis.inner; // of the last group in its row
    run({weight, out, axis.outer * full, std::max<int64_t>(1, full), row, axis.inner, m, n}, threads);
    run({weight + start, out + start, axis.outer, 1, row, axis.inner, rest, std::min(n, rest)}, threads);
}

} // namespace kernels::nm
