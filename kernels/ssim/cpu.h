// The photometric loss of 3D Gaussian splatting and its gradient on the CPU. See row.h for the equations. Images are
// [height][width][channels], contiguous; results do not depend on `threads` (>= 1), bit for bit.
#pragma once
#include <cstdint>

namespace kernels::ssim {

struct Size {
    int64_t height, width, channels;
};

struct Photo {
    const float* image;    // already times `weight`
    const float* mean;     // its window means
    const float* variance; // its window variances
    const float* weight;   // [height][width] of the loss map, or null for 1
};

// rows [height][2]: the sums over each row of weight * SSIM and of |render - photo|. gradient, or null: of
// l1 * sum |render - photo| - dssim * sum weight * SSIM with respect to the render.
void photometric(const float* render, const Photo& photo, const Size& size, float l1, float dssim, double* rows,
                 float* gradient, int threads);

// Window means with zeros around.
void window_mean(const float* image, const Size& size, float* out, int threads);

} // namespace kernels::ssim
