#pragma once
#include <nanobind/nanobind.h>

namespace kernels::splat {

void bind(nanobind::module_& m);

} // namespace kernels::splat
