#pragma once
#include <nanobind/nanobind.h>

namespace kernels::attention {

void bind(nanobind::module_& m);

} // namespace kernels::attention
