// The seam between what is the same on every machine (cpu.cpp: sorting, binning, threads) and what is compiled once per
// instruction set (tile_*.cpp): the two passes over one tile of one image.
//
// A record holds what a tile needs of one projected Gaussian. With L = log2(e)/2 and the conic (a, b, c), the exponent
// of its opacity at a pixel centre, d = pixel - mean, is a difference of squares, so that it never comes out positive
// from cancellation:
//     log2(alpha) = kLogOpacity - u^2 - v^2,   u = kR1 dx + kR2 dy,   v = kS1 dy,
//     kR1 = sqrt(a L),   kR2 = kRatio kR1,   kRatio = b/a,   kS1 = sqrt((c - b^2/a) L).
#pragma once
#include <cstdint>

namespace kernels::splat {

constexpr int kTile = 16;          // pixels a side
constexpr int kPixels = kTile * kTile;
constexpr float kMinAlpha = 1.0f / 255.0f;
constexpr float kMinLogAlpha = -7.9943534f; // log2 of it
constexpr float kNever = -1e30f;           // log opacity of what is not to be drawn
constexpr float kMinTransmittance = 1e-4f;

enum Field { kX, kY, kR1, kR2, kS1, kLogOpacity, kInverseR1, kRatio, kColor };
inline int64_t record_floats(int64_t channels) { return kColor + (channels + 7) / 8 * 8; }

// The gradient of one Gaussian from one tile: sums over pixels of h = dL/dlog(alpha) times 1, u, v, u^2, uv, v^2; of
// |h u| and |h (kR2 u + kS1 v)|; and of w dL/dcolour.
enum Sum { kH, kHu, kHv, kHuu, kHuv, kHvv, kAbsX, kAbsY, kSumColor };
static_assert(int(kSumColor) == int(kColor), "a slot is as long as a record");

struct Tile {
    const int32_t* ids;      // [count] records in order of depth
    int64_t count;
    int x, y;                // of the first pixel
    int columns, rows;       // of the tile that lie in the image
    int64_t width;           // of the image
};

struct ForwardTask {
    Tile tile;
    const float* records;
    int64_t channels;
    const float* background; // [channels] or null
    float max_alpha;
    uint64_t* masks;         // out, [count]: the blocks of pixels that each Gaussian may touch; 0 once the tile is opaque
    float* render;           // out, image [height][width][channels]
    float* transmittance;    // out, image [height][width]
};

struct BackwardTask {
    Tile tile;
    const float* records;
    int64_t channels;
    float max_alpha;
    bool absolute;           // kAbsX, kAbsY too
    const uint64_t* masks;
    const float* render;
    const float* transmittance;
    const float* grad_render;
    const float* grad_alpha; // image [height][width]
    const int64_t* slots;    // [count]: where in `sums` each Gaussian's gradient goes, in slots
    float* sums;             // out, slots of record_floats(channels) floats
};

struct TileOps {
    const char* name;
    void (*forward)(const ForwardTask&);
    void (*backward)(const BackwardTask&);
};

const TileOps& portable_tile_ops();
#if defined(KERNELS_X86)
const TileOps& avx2_tile_ops();
const TileOps& avx512_tile_ops();
#endif
const TileOps& emulated512_tile_ops();

} // namespace kernels::splat
