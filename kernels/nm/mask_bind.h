#pragma once
#include <nanobind/nanobind.h>

namespace kernels::nm {

void bind_mask(nanobind::module_& m);

} // namespace kernels::nm
