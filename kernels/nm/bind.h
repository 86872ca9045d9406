#pragma once
#include <nanobind/nanobind.h>

namespace kernels::nm {

void bind(nanobind::module_& m);

} // namespace kernels::nm
