// The seam between what is the same on every machine (cpu.cpp: planes, tiles, threads) and what is compiled once per
// instruction set (tile_*.cpp): four functions that work on one tile for one group of views.
//
// A tile is kTileLines consecutive lines of a plane. Work is cut further into chunks of positions [begin, end) so that
// what one call touches stays in the first-level cache.
#pragma once
#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace kernels::ct {

constexpr int kTileLines = 16;

// Forward: rows[m][k] += sum over the tile's lines of the interpolated image, without the step.
struct ProjectTask {
    int members;                         // 1..kMaxMembers
    const float* tiles[kMaxMembers];     // first line of the member's tile at position 0; lines past the image are zero
    float* rows[kMaxMembers];            // detector row of the member's view
    bool reversed[kMaxMembers];          // cell k of the sheet is cell cells-1-k of the row
    ptrdiff_t stride;                    // floats from line to line
    int64_t line;                        // the tile's first line in the plane
    int64_t lines;                       // how many of its lines lie in the plane, 1..kTileLines
    int64_t width;                       // positions of a line; `padding` zeros stand on both sides of it
    int64_t padding;
    int64_t cells;                       // length of a row
    int64_t begin, end;                  // cells of the sheet to compute
};

// Adjoint, the step included: the sum of sums[m][(i sum_stride + x) sums_per_position + 0..] grows by the image at
// line i, position x.
struct BackprojectTask {
    int members;
    float* sums[kMaxMembers];
    const float* rows[kMaxMembers];
    bool reversed[kMaxMembers];
    ptrdiff_t sum_stride;                // positions from line to line, at least width rounded up to kChunkAlign
    int sums_per_position;               // see TileOps
    int64_t line;
    int64_t lines;
    int64_t width;
    int64_t cells;
    int64_t begin, end;                  // positions to compute; begin is a multiple of kChunkAlign
    double pixel;                        // mm
};

// Chunks begin at multiples of this many positions, so that a block of lanes never straddles two chunks.
constexpr int64_t kChunkAlign = 16;

struct TileOps {
    const char* name;
    // accumulators per position in BackprojectTask::sums: 1, or 2 where lanes come in pairs (add them up)
    int sums_per_position;
    void (*project_parallel)(const ParallelSheet&, const ProjectTask&);
    void (*project_fan)(const FanSheet&, const ProjectTask&);
    void (*backproject_parallel)(const ParallelSheet&, const BackprojectTask&);
    void (*backproject_fan)(const FanSheet&, const BackprojectTask&);
};

const TileOps& portable_tile_ops();
#if defined(KERNELS_X86)
const TileOps& avx2_tile_ops();
const TileOps& avx512_tile_ops();
#endif
const TileOps& emulated512_tile_ops();

} // namespace kernels::ct
