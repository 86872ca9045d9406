// Gaussian-splat rasterizer for the CPU: the entry points. See cpu.cpp and project.cpp for how they work, tile.h for the
// equations. All arrays are contiguous; results do not depend on `threads` (>= 1), bit for bit.
#pragma once
#include <cstdint>

namespace kernels::splat {

struct Size {
    int64_t width, height; // pixels
    int64_t tile_columns() const;
    int64_t tile_rows() const;
    int64_t tiles() const { return tile_columns() * tile_rows(); }
};

// The tiles an item's box touches, and the number of pairs (item, tile) of all items before it.
struct Box {
    int32_t x, y, columns, rows;
    int64_t first;
};

// Of items with means [items][2], radii [items][2] (0: culled) and depths [items]. Returns the number of pairs.
int64_t boxes(const float* means, const int32_t* radii, const float* depths, int64_t items, const Size& size, Box* out, int threads);

// The pairs in order of camera, tile, depth (ties: order of items). first [cameras + 1]: each camera's items.
// ids, keys [pairs]; offsets [cameras tiles + 1]. keys: camera and tile in the high half, bits of the depth in the low.
void bin(const float* depths, const Box* boxes, const int64_t* first, int64_t cameras, const Size& size, int32_t* ids,
         int64_t* keys, int64_t* offsets, int threads);

struct Scene {
    int64_t cameras, items, channels;
    Size size;
    const float* means;      // [items][2] pixels
    const float* conics;     // [items][3]
    const float* colors;     // [items][channels]
    const float* opacities;  // [items]
    const int32_t* ids;      // the pairs, see `bin`
    const int64_t* offsets;
    float max_alpha;
};

// records [items][record_floats(channels)] and masks [pairs] are for `backward`. backgrounds [cameras][channels] or null.
void forward(const Scene& scene, const float* backgrounds, float* records, uint64_t* masks, float* render,
             float* transmittance, int threads);

struct Gradients {
    float* means;     // [items][2]
    float* conics;    // [items][3]
    float* colors;    // [items][channels]
    float* opacities; // [items]
    float* absolute;  // [items][2]: the sum over pixels of |dL/dmean|; or null
};

// `scratch`: record_floats(channels) floats for each pair.
void backward(const Scene& scene, const Box* boxes, const float* records, const uint64_t* masks, const float* render,
              const float* transmittance, const float* grad_render, const float* grad_alpha, float* scratch,
              const Gradients& out, int threads);

struct Gaussians {
    int64_t count;
    const float* means;      // [count][3]
    const float* quats;      // [count][4] wxyz, any length, or null with covars
    const float* scales;     // [count][3]
    const float* covars;     // [count][3][3], or null
    const float* opacities;  // [count], or null: boxes of 3.33 standard deviations
};

struct Cameras {
    int64_t count;
    const float* viewmats; // [count][4][4] world to camera
    const float* intrinsics; // [count][3][3]
    Size size;
    float near_plane, far_plane, radius_clip, eps2d;
    bool antialiased;
};

struct Projected { // [cameras][count][...]
    int32_t* radii;       // 2
    float* means2d;       // 2
    float* depths;
    float* conics;        // 3
    float* compensations;
};

void project(const Gaussians& gaussians, const Cameras& cameras, const Projected& out, int threads);

struct ProjectedGrad {
    const int32_t* radii;
    const float* means2d;
    const float* depths;
    const float* conics;
    const float* compensations;
};

struct GaussiansGrad {
    float* means;
    float* quats;    // null with covars
    float* scales;   // null with covars
    float* covars;   // or null
    float* viewmats; // [count][4][4], or null: not wanted
};

void project_backward(const Gaussians& gaussians, const Cameras& cameras, const ProjectedGrad& grad,
                      const GaussiansGrad& out, int threads);

// Colours from spherical harmonics without the half: dirs [rows][count][3] of any length, coeffs [count][bases][3] (or
// [rows][count][bases][3] if not shared), visible [rows][count] or null, out [rows][count][3].
void harmonics(int degree, const float* dirs, const float* coeffs, bool shared, const uint8_t* visible, int64_t rows,
               int64_t count, int64_t bases, float* out, int threads);
void harmonics_backward(int degree, const float* dirs, const float* coeffs, bool shared, const uint8_t* visible,
                        int64_t rows, int64_t count, int64_t bases, const float* grad, float* grad_dirs,
                        float* grad_coeffs, int threads);

} // namespace kernels::splat
