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

void select(const Groups& groups, int threads) {
    const int64_t lanes = groups.count * groups.inner, step = lanes_of(groups), panels = (lanes + step - 1) / step;
    const int64_t room = std::max(kPanel, step * groups.size);
    const int bands = static_cast<int>(lanes * groups.size < kFew ? 1 : std::min<int64_t>(threads, panels));
    const MaskOps& ops = mask_ops();
    std::vector<int32_t> scratch(bands * room); // here, where running out of memory can be told
#pragma omp parallel for schedule(static, 1) num_threads(bands) if (bands > 1)
    for (int band = 0; band < bands; ++band)
        for (int64_t panel = panels * band / bands; panel < panels * (band + 1) / bands; ++panel)
            ops.select(groups, panel * step, std::min(lanes, (panel + 1) * step), scratch.data() + band * room);
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
    switch (current_lanes()) {
#if defined(KERNELS_X86)
    // Sixteen lanes would bring little: the time goes into transposing and into memory.
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
