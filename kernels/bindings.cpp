// The Python side of the compiled kernels: types, shapes, the GIL. Bindings check and forward; kernels compute.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "attention/bind.h"
#include "ct/cpu.h"
#include "masked_grad/bind.h"
#include "nm/bind.h"
#include "nm/mask_bind.h"
#include "simd/isa.h"
#include "splat/bind.h"
#include "ssim/bind.h"
#include "stamp.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kernels {
namespace {

using Image = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using ImageOut = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Angles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::string shape_of(size_t a, size_t b, size_t c) {
    return "[" + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + "]";
}

struct Scan {
    int64_t batch, views;
    ct::Shape shape;
};

template <class A, class B>
Scan scan(const A& image, const Angles& angles, const B& sinogram, int threads) {
    if (image.shape(0) != sinogram.shape(0) || angles.shape(0) != sinogram.shape(1))
        throw std::invalid_argument("sinogram is " + shape_of(sinogram.shape(0), sinogram.shape(1), sinogram.shape(2)) +
                                    "; expected [batch, views, cells] with batch " + std::to_string(image.shape(0)) +
                                    " of the image and views " + std::to_string(angles.shape(0)) + " of the angles");
    if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + "; expected 1 or more");
    auto size = [](size_t n) { return static_cast<int64_t>(n); };
    return {size(image.shape(0)), size(angles.shape(0)),
            {size(image.shape(1)), size(image.shape(2)), size(sinogram.shape(2))}};
}

template <class Beam>
void project(const Beam& beam, const Image& image, const Angles& angles, const ImageOut& out, int threads) {
    const Scan s = scan(image, angles, out, threads);
    nb::gil_scoped_release release;
    ct::project(beam, image.data(), s.batch, s.shape, angles.data(), s.views, out.data(), threads);
}

template <class Beam>
void backproject(const Beam& beam, const Image& sinogram, const Angles& angles, const ImageOut& out, int threads) {
    const Scan s = scan(out, angles, sinogram, threads);
    nb::gil_scoped_release release;
    ct::backproject(beam, sinogram.data(), s.batch, s.shape, angles.data(), s.views, out.data(), threads);
}

void parallel_project(const Image& image, const Angles& angles, const ImageOut& out, double pitch, double pixel, double offset,
                      double axis, int threads) {
    project(ct::Parallel{pitch, pixel, offset, axis}, image, angles, out, threads);
}

void parallel_backproject(const Image& sinogram, const Angles& angles, const ImageOut& out, double pitch, double pixel,
                          double offset, double axis, int threads) {
    backproject(ct::Parallel{pitch, pixel, offset, axis}, sinogram, angles, out, threads);
}

void fan_project(const Image& image, const Angles& angles, const ImageOut& out, double source_axis, double axis_detector,
                 double pitch, double pixel, double offset, double axis, int threads) {
    project(ct::Fan{source_axis, axis_detector, pitch, pixel, offset, axis}, image, angles, out, threads);
}

void fan_backproject(const Image& sinogram, const Angles& angles, const ImageOut& out, double source_axis,
                     double axis_detector, double pitch, double pixel, double offset, double axis, int threads) {
    backproject(ct::Fan{source_axis, axis_detector, pitch, pixel, offset, axis}, sinogram, angles, out, threads);
}

nb::dict info() {
    nb::list compiled;
    for (Isa isa : compiled_isas()) compiled.append(name(isa));
    nb::dict out;
    out["isa"] = name(current_isa());
    out["isas_compiled"] = compiled;
    out["compiler"] = KERNELS_COMPILER;
    out["stamp"] = KERNELS_STAMP;
    out["openmp"] = _OPENMP;
    out["sanitized"] = bool(KERNELS_SANITIZED);
    return out;
}

} // namespace
} // namespace kernels

NB_MODULE(_native, m) {
    m.doc() = "Compiled kernels; use them through kernels.ct and its siblings.";
    m.attr("stamp") = KERNELS_STAMP;
    m.def("info", &kernels::info, "Instruction set in use and compiled, compiler, stamp of the sources, OpenMP version.");
    m.def("ct_parallel_project", &kernels::parallel_project, "image"_a.noconvert(), "angles"_a.noconvert(),
          "out"_a.noconvert(), "pitch"_a, "pixel"_a, "offset"_a, "axis"_a, "threads"_a,
          "image [B, H, W] float32 -> out [B, V, K] float32; angles [V] float64 rad; lengths in mm.");
    m.def("ct_parallel_backproject", &kernels::parallel_backproject, "sinogram"_a.noconvert(), "angles"_a.noconvert(),
          "out"_a.noconvert(), "pitch"_a, "pixel"_a, "offset"_a, "axis"_a, "threads"_a,
          "The exact adjoint: sinogram [B, V, K] float32 -> out [B, H, W] float32.");
    m.def("ct_fan_project", &kernels::fan_project, "image"_a.noconvert(), "angles"_a.noconvert(), "out"_a.noconvert(),
          "source_axis"_a, "axis_detector"_a, "pitch"_a, "pixel"_a, "offset"_a, "axis"_a, "threads"_a,
          "Flat-detector fan beam: image [B, H, W] float32 -> out [B, V, K] float32.");
    m.def("ct_fan_backproject", &kernels::fan_backproject, "sinogram"_a.noconvert(), "angles"_a.noconvert(),
          "out"_a.noconvert(), "source_axis"_a, "axis_detector"_a, "pitch"_a, "pixel"_a, "offset"_a, "axis"_a, "threads"_a,
          "The exact adjoint: sinogram [B, V, K] float32 -> out [B, H, W] float32.");
    kernels::attention::bind(m);
    kernels::masked_grad::bind(m);
    kernels::nm::bind(m);
    kernels::nm::bind_mask(m);
    kernels::splat::bind(m);
    kernels::ssim::bind(m);
}
