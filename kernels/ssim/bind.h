#pragma once
#include <nanobind/nanobind.h>

namespace kernels::ssim {

void bind(nanobind::module_& m);

} // namespace kernels::ssim
