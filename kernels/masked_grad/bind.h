#pragma once
#include <nanobind/nanobind.h>

namespace kernels::masked_grad {

void bind(nanobind::module_& m);

} // namespace kernels::masked_grad
