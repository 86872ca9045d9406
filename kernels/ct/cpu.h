// Joseph's projector pair for 2-D scans on the CPU. The four entry points; see cpu.cpp for how they work.
//
// image [batch, height, width], sinogram [batch, views, cells]: contiguous float32, written over, not added to.
// angles [views] in radians. Results do not depend on `threads` (>= 1), bit for bit.
// Throw std::invalid_argument for impossible geometries, std::bad_alloc when the O(one block of rows) scratch fails.
#pragma once
#include "geometry.h"

namespace kernels::ct {

template <class Beam>
void project(const Beam& beam, const float* image, int64_t batch, const Shape& shape, const double* angles,
             int64_t views, float* sinogram, int threads);

template <class Beam>
void backproject(const Beam& beam, const float* sinogram, int64_t batch, const Shape& shape, const double* angles,
                 int64_t views, float* image, int threads);

} // namespace kernels::ct
