// The Python side of the rasterizer: types, sizes, the GIL. Bindings check and forward. None stands for what is not there.
#include "bind.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "tile.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kernels::splat {
namespace {

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T>
using Maybe = std::optional<Array<T>>;

static_assert(sizeof(Box) == 3 * sizeof(int64_t), "boxes travel as three int64");

template <class T>
T* checked(const Array<T>& array, const char* name, int64_t expected) {
    if (static_cast<int64_t>(array.size()) != expected)
        throw std::invalid_argument(std::string(name) + " holds " + std::to_string(array.size()) + " numbers; expected " +
                                    std::to_string(expected));
    return array.data();
}

template <class T>
T* checked(const Maybe<T>& array, const char* name, int64_t expected) {
    return array ? checked(*array, name, expected) : nullptr;
}

template <class A>
int64_t length(const A& array, size_t axis = 0) {
    if (array.ndim() <= axis) throw std::invalid_argument("got an array of too few dimensions");
    return static_cast<int64_t>(array.shape(axis));
}

Size size(int64_t width, int64_t height) {
    if (width < 1 || height < 1 || width > (1 << 20) || height > (1 << 20))
        throw std::invalid_argument("image of " + std::to_string(width) + " x " + std::to_string(height) + "; expected 1..2^20 a side");
    return {width, height};
}

int64_t boxes_of(const Array<const float>& means, const Array<const int32_t>& radii, const Array<const float>& depths, int64_t width,
                 int64_t height, const Array<int64_t>& out, int threads) {
    const int64_t items = length(means);
    const float* m = checked(means, "means2d", 2 * items);
    const int32_t* r = checked(radii, "radii", 2 * items);
    const float* d = checked(depths, "depths", items);
    auto* b = reinterpret_cast<Box*>(checked(out, "boxes", 3 * items));
    nb::gil_scoped_release release;
    return boxes(m, r, d, items, size(width, height), b, threads);
}

void bin_into(const Array<const float>& depths, const Array<const int64_t>& boxes, const Array<const int64_t>& first, int64_t width,
              int64_t height, const Array<int32_t>& ids, const Array<int64_t>& keys, const Array<int64_t>& offsets, int threads) {
    const int64_t items = length(depths), cameras = length(first) - 1;
    const Size image = size(width, height);
    const auto* b = reinterpret_cast<const Box*>(checked(boxes, "boxes", 3 * items));
    checked(offsets, "offsets", cameras * image.tiles() + 1);
    checked(keys, "keys", length(ids));
    const int64_t* f = first.data();
    for (int64_t camera = 0; camera < cameras; ++camera)
        if (f[camera] > f[camera + 1]) throw std::invalid_argument("first is not in order");
    if (cameras < 0 || f[0] != 0 || f[cameras] != items) throw std::invalid_argument("first does not run from 0 to the number of items");
    const int64_t pairs = items ? b[items - 1].first + int64_t{b[items - 1].columns} * b[items - 1].rows : 0;
    checked(ids, "ids", pairs);
    nb::gil_scoped_release release;
    bin(depths.data(), b, f, cameras, image, ids.data(), keys.data(), offsets.data(), threads);
}

Scene scene(const Array<const float>& means, const Array<const float>& conics, const Array<const float>& colors,
            const Array<const float>& opacities, const Array<const int32_t>& ids, const Array<const int64_t>& offsets, int64_t width,
            int64_t height, float max_alpha) {
    const int64_t items = length(means), channels = length(colors, 1);
    const Size image = size(width, height);
    const int64_t cameras = (length(offsets) - 1) / image.tiles();
    return {cameras, items, channels, image, checked(means, "means2d", 2 * items), checked(conics, "conics", 3 * items),
            checked(colors, "colors", channels * items), checked(opacities, "opacities", items), ids.data(),
            checked(offsets, "offsets", cameras * image.tiles() + 1), max_alpha};
}

void forward_into(const Array<const float>& means, const Array<const float>& conics, const Array<const float>& colors,
                  const Array<const float>& opacities, const Array<const int32_t>& ids, const Array<const int64_t>& offsets,
                  const Maybe<const float>& backgrounds, int64_t width, int64_t height, float max_alpha, const Array<float>& records,
                  const Array<int64_t>& masks, const Array<float>& render, const Array<float>& transmittance, int threads) {
    const Scene s = scene(means, conics, colors, opacities, ids, offsets, width, height, max_alpha);
    const int64_t pixels = s.cameras * width * height;
    const float* b = checked(backgrounds, "backgrounds", s.cameras * s.channels);
    float* r = checked(records, "records", s.items * record_floats(s.channels));
    auto* m = reinterpret_cast<uint64_t*>(checked(masks, "masks", length(ids)));
    float *image = checked(render, "render", pixels * s.channels), *t = checked(transmittance, "transmittance", pixels);
    nb::gil_scoped_release release;
    forward(s, b, r, m, image, t, threads);
}

void backward_into(const Array<const float>& means, const Array<const float>& conics, const Array<const float>& colors,
                   const Array<const float>& opacities, const Array<const int32_t>& ids, const Array<const int64_t>& offsets,
                   int64_t width, int64_t height, float max_alpha, const Array<const int64_t>& boxes, const Array<const float>& records,
                   const Array<const int64_t>& masks, const Array<const float>& render, const Array<const float>& transmittance,
                   const Array<const float>& grad_render, const Array<const float>& grad_alpha, const Array<float>& scratch,
                   const Array<float>& grad_means, const Array<float>& grad_conics, const Array<float>& grad_colors,
                   const Array<float>& grad_opacities, const Maybe<float>& absolute, int threads) {
    const Scene s = scene(means, conics, colors, opacities, ids, offsets, width, height, max_alpha);
    const int64_t pixels = s.cameras * width * height, pairs = length(ids), stride = record_floats(s.channels);
    const auto* b = reinterpret_cast<const Box*>(checked(boxes, "boxes", 3 * s.items));
    const Gradients out{checked(grad_means, "grad_means", 2 * s.items), checked(grad_conics, "grad_conics", 3 * s.items),
                        checked(grad_colors, "grad_colors", s.channels * s.items), checked(grad_opacities, "grad_opacities", s.items),
                        checked(absolute, "absolute", 2 * s.items)};
    const float* r = checked(records, "records", s.items * stride);
    const auto* m = reinterpret_cast<const uint64_t*>(checked(masks, "masks", pairs));
    const float *image = checked(render, "render", pixels * s.channels), *t = checked(transmittance, "transmittance", pixels);
    const float *gr = checked(grad_render, "grad_render", pixels * s.channels), *ga = checked(grad_alpha, "grad_alpha", pixels);
    float* sums = checked(scratch, "scratch", pairs * stride);
    nb::gil_scoped_release release;
    backward(s, b, r, m, image, t, gr, ga, sums, out, threads);
}

Gaussians gaussians(const Array<const float>& means, const Maybe<const float>& quats, const Maybe<const float>& scales,
                    const Maybe<const float>& covars, const Maybe<const float>& opacities) {
    const int64_t n = length(means);
    if (!covars && !(quats && scales)) throw std::invalid_argument("neither covars nor quats and scales are given");
    return {n, checked(means, "means", 3 * n), checked(quats, "quats", 4 * n), checked(scales, "scales", 3 * n),
            checked(covars, "covars", 9 * n), checked(opacities, "opacities", n)};
}

Cameras cameras(const Array<const float>& viewmats, const Array<const float>& intrinsics, int64_t width, int64_t height, float near_plane,
                float far_plane, float radius_clip, float eps2d, bool antialiased) {
    const int64_t c = length(viewmats);
    return {c, checked(viewmats, "viewmats", 16 * c), checked(intrinsics, "Ks", 9 * c), size(width, height), near_plane, far_plane,
            radius_clip, eps2d, antialiased};
}

void project_into(const Array<const float>& means, const Maybe<const float>& quats, const Maybe<const float>& scales,
                  const Maybe<const float>& covars, const Maybe<const float>& opacities, const Array<const float>& viewmats,
                  const Array<const float>& Ks, int64_t width, int64_t height, float near_plane, float far_plane, float radius_clip,
                  float eps2d, bool antialiased, const Array<int32_t>& radii, const Array<float>& means2d, const Array<float>& depths,
                  const Array<float>& conics, const Array<float>& compensations, int threads) {
    const Gaussians g = gaussians(means, quats, scales, covars, opacities);
    const Cameras v = cameras(viewmats, Ks, width, height, near_plane, far_plane, radius_clip, eps2d, antialiased);
    const int64_t items = g.count * v.count;
    const Projected out{checked(radii, "radii", 2 * items), checked(means2d, "means2d", 2 * items), checked(depths, "depths", items),
                        checked(conics, "conics", 3 * items), checked(compensations, "compensations", items)};
    nb::gil_scoped_release release;
    project(g, v, out, threads);
}

void project_backward_into(const Array<const float>& means, const Maybe<const float>& quats, const Maybe<const float>& scales,
                           const Maybe<const float>& covars, const Array<const float>& viewmats, const Array<const float>& Ks,
                           int64_t width, int64_t height, float eps2d, bool antialiased, const Array<const int32_t>& radii,
                           const Array<const float>& grad_means2d, const Array<const float>& grad_depths,
                           const Array<const float>& grad_conics, const Array<const float>& grad_compensations,
                           const Array<float>& grad_means, const Maybe<float>& grad_quats, const Maybe<float>& grad_scales,
                           const Maybe<float>& grad_covars, const Maybe<float>& grad_viewmats, int threads) {
    const Gaussians g = gaussians(means, quats, scales, covars, std::nullopt);
    const Cameras v = cameras(viewmats, Ks, width, height, 0, 0, 0, eps2d, antialiased);
    const int64_t items = g.count * v.count;
    const ProjectedGrad grad{checked(radii, "radii", 2 * items), checked(grad_means2d, "grad_means2d", 2 * items),
                             checked(grad_depths, "grad_depths", items), checked(grad_conics, "grad_conics", 3 * items),
                             checked(grad_compensations, "grad_compensations", items)};
    const GaussiansGrad out{checked(grad_means, "grad_means", 3 * g.count), checked(grad_quats, "grad_quats", 4 * g.count),
                            checked(grad_scales, "grad_scales", 3 * g.count), checked(grad_covars, "grad_covars", 9 * g.count),
                            checked(grad_viewmats, "grad_viewmats", 16 * v.count)};
    if (g.count > 0 && (g.covars ? !out.covars : !(out.quats && out.scales)))
        throw std::invalid_argument("no room for the gradients of the shapes");
    nb::gil_scoped_release release;
    project_backward(g, v, grad, out, threads);
}

struct Harmonics {
    int64_t rows, count, bases;
    bool shared;
};

Harmonics harmonics_sizes(int degree, const Array<const float>& dirs, const Array<const float>& coeffs) {
    if (degree < 0 || degree > 3) throw std::invalid_argument("degree is " + std::to_string(degree) + "; expected 0 to 3");
    const bool shared = coeffs.ndim() == 3;
    const Harmonics h{length(dirs), length(dirs, 1), length(coeffs, shared ? 1 : 2), shared};
    checked(dirs, "dirs", h.rows * h.count * 3);
    checked(coeffs, "coeffs", (shared ? 1 : h.rows) * h.count * h.bases * 3);
    if (h.bases < (degree + 1) * (degree + 1)) throw std::invalid_argument("too few coefficients for the degree");
    return h;
}

void harmonics_into(int degree, const Array<const float>& dirs, const Array<const float>& coeffs, const Maybe<const uint8_t>& visible,
                    const Array<float>& out, int threads) {
    const Harmonics h = harmonics_sizes(degree, dirs, coeffs);
    const uint8_t* seen = checked(visible, "visible", h.rows * h.count);
    float* colors = checked(out, "out", h.rows * h.count * 3);
    nb::gil_scoped_release release;
    harmonics(degree, dirs.data(), coeffs.data(), h.shared, seen, h.rows, h.count, h.bases, colors, threads);
}

void harmonics_backward_into(int degree, const Array<const float>& dirs, const Array<const float>& coeffs,
                             const Maybe<const uint8_t>& visible, const Array<const float>& grad, const Array<float>& grad_dirs,
                             const Array<float>& grad_coeffs, int threads) {
    const Harmonics h = harmonics_sizes(degree, dirs, coeffs);
    const uint8_t* seen = checked(visible, "visible", h.rows * h.count);
    const float* g = checked(grad, "grad", h.rows * h.count * 3);
    float* to_dirs = checked(grad_dirs, "grad_dirs", static_cast<int64_t>(dirs.size()));
    float* to_coeffs = checked(grad_coeffs, "grad_coeffs", static_cast<int64_t>(coeffs.size()));
    nb::gil_scoped_release release;
    harmonics_backward(degree, dirs.data(), coeffs.data(), h.shared, seen, h.rows, h.count, h.bases, g, to_dirs, to_coeffs, threads);
}

} // namespace

void bind(nb::module_& m) {
    m.def("splat_record_floats", &record_floats, "channels"_a, "Floats of a record, and of a pair's slot in the scratch memory.");
    m.def("splat_boxes", &boxes_of, "means2d"_a.noconvert(), "radii"_a.noconvert(), "depths"_a.noconvert(), "width"_a, "height"_a, "boxes"_a.noconvert(), "threads"_a,
          "Fills boxes [M, 3] int64 (opaque); returns the number of pairs (item, tile).");
    m.def("splat_bin", &bin_into, "depths"_a.noconvert(), "boxes"_a.noconvert(), "first"_a.noconvert(), "width"_a, "height"_a,
          "ids"_a.noconvert(), "keys"_a.noconvert(), "offsets"_a.noconvert(), "threads"_a, "The pairs by camera, tile and depth.");
    m.def("splat_forward", &forward_into, "means2d"_a.noconvert(), "conics"_a.noconvert(), "colors"_a.noconvert(), "opacities"_a.noconvert(),
          "ids"_a.noconvert(), "offsets"_a.noconvert(), "backgrounds"_a.noconvert().none(), "width"_a, "height"_a, "max_alpha"_a,
          "records"_a.noconvert(), "masks"_a.noconvert(), "render"_a.noconvert(), "transmittance"_a.noconvert(), "threads"_a,
          "Images [C, H, W, D] and transmittances [C, H, W]; records and masks are for splat_backward.");
    m.def("splat_backward", &backward_into, "means2d"_a.noconvert(), "conics"_a.noconvert(), "colors"_a.noconvert(),
          "opacities"_a.noconvert(), "ids"_a.noconvert(), "offsets"_a.noconvert(), "width"_a, "height"_a, "max_alpha"_a,
          "boxes"_a.noconvert(), "records"_a.noconvert(), "masks"_a.noconvert(), "render"_a.noconvert(), "transmittance"_a.noconvert(),
          "grad_render"_a.noconvert(), "grad_alpha"_a.noconvert(), "scratch"_a.noconvert(), "grad_means2d"_a.noconvert(),
          "grad_conics"_a.noconvert(), "grad_colors"_a.noconvert(), "grad_opacities"_a.noconvert(), "absolute"_a.noconvert().none(),
          "threads"_a, "Gradients of splat_forward's images.");
    m.def("splat_project", &project_into, "means"_a.noconvert(), "quats"_a.noconvert().none(), "scales"_a.noconvert().none(),
          "covars"_a.noconvert().none(), "opacities"_a.noconvert().none(), "viewmats"_a.noconvert(), "Ks"_a.noconvert(), "width"_a,
          "height"_a, "near_plane"_a, "far_plane"_a, "radius_clip"_a, "eps2d"_a, "antialiased"_a, "radii"_a.noconvert(),
          "means2d"_a.noconvert(), "depths"_a.noconvert(), "conics"_a.noconvert(), "compensations"_a.noconvert(), "threads"_a,
          "Gaussians [N] before cameras [C] -> [C, N, ...].");
    m.def("splat_project_backward", &project_backward_into, "means"_a.noconvert(), "quats"_a.noconvert().none(),
          "scales"_a.noconvert().none(), "covars"_a.noconvert().none(), "viewmats"_a.noconvert(), "Ks"_a.noconvert(), "width"_a, "height"_a,
          "eps2d"_a, "antialiased"_a, "radii"_a.noconvert(), "grad_means2d"_a.noconvert(), "grad_depths"_a.noconvert(),
          "grad_conics"_a.noconvert(), "grad_compensations"_a.noconvert(), "grad_means"_a.noconvert(), "grad_quats"_a.noconvert().none(),
          "grad_scales"_a.noconvert().none(), "grad_covars"_a.noconvert().none(), "grad_viewmats"_a.noconvert().none(), "threads"_a,
          "Gradients of splat_project.");
    m.def("splat_harmonics", &harmonics_into, "degree"_a, "dirs"_a.noconvert(), "coeffs"_a.noconvert(), "visible"_a.noconvert().none(),
          "out"_a.noconvert(), "threads"_a, "dirs [R, N, 3], coeffs [N, K, 3] or [R, N, K, 3] -> out [R, N, 3].");
    m.def("splat_harmonics_backward", &harmonics_backward_into, "degree"_a, "dirs"_a.noconvert(), "coeffs"_a.noconvert(),
          "visible"_a.noconvert().none(), "grad"_a.noconvert(), "grad_dirs"_a.noconvert(), "grad_coeffs"_a.noconvert(), "threads"_a,
          "Gradients of splat_harmonics.");
}

} // namespace kernels::splat
