// The portable tiles by name, for the vector tiles to fall back to.
#pragma once
#include "tile.h"

namespace kernels::ct::portable {

void project_parallel(const ParallelSheet& sheet, const ProjectTask& task);
void project_fan(const FanSheet& sheet, const ProjectTask& task);
void backproject_parallel(const ParallelSheet& sheet, const BackprojectTask& task);
void backproject_fan(const FanSheet& sheet, const BackprojectTask& task);

} // namespace kernels::ct::portable
