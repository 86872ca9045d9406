// The Python side of the photometric loss: types, sizes, the GIL. Bindings check and forward.
#include "bind.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kernels::ssim {
namespace {

template <class T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Image = Array<const float, 3>;
using ImageOut = Array<float, 3>;

Size size_of(const Image& image) {
    return {static_cast<int64_t>(image.shape(0)), static_cast<int64_t>(image.shape(1)), static_cast<int64_t>(image.shape(2))};
}

template <class A>
void expect(const A& array, const char* name, size_t expected) {
    if (array.size() != expected)
        throw std::invalid_argument(std::string(name) + " holds " + std::to_string(array.size()) + " numbers; expected " +
                                    std::to_string(expected));
}

void photometric_into(const Image& render, const Image& photo, const Image& mean, const Image& variance,
                      const std::optional<Array<const float, 2>>& weight, float l1, float dssim, const Array<double, 2>& rows,
                      const std::optional<ImageOut>& gradient, int threads) {
    const Size size = size_of(render);
    expect(photo, "photo", render.size());
    expect(mean, "mean", render.size());
    expect(variance, "variance", render.size());
    if (weight) expect(*weight, "weight", render.shape(0) * render.shape(1));
    expect(rows, "rows", 2 * render.shape(0));
    if (gradient) expect(*gradient, "gradient", render.size());
    const Photo against{photo.data(), mean.data(), variance.data(), weight ? weight->data() : nullptr};
    nb::gil_scoped_release release;
    photometric(render.data(), against, size, l1, dssim, rows.data(), gradient ? gradient->data() : nullptr, threads);
}

void window_mean_into(const Image& image, const ImageOut& out, int threads) {
    expect(out, "out", image.size());
    nb::gil_scoped_release release;
    window_mean(image.data(), size_of(image), out.data(), threads);
}

} // namespace

void bind(nb::module_& m) {
    m.def("ssim_photometric", &photometric_into, "render"_a.noconvert(), "photo"_a.noconvert(), "mean"_a.noconvert(),
          "variance"_a.noconvert(), "weight"_a.noconvert().none(), "l1"_a, "dssim"_a, "rows"_a.noconvert(),
          "gradient"_a.noconvert().none(), "threads"_a, "Sums over rows [H, 2] of SSIM and |render - photo|, and the gradient.");
    m.def("ssim_window_mean", &window_mean_into, "image"_a.noconvert(), "out"_a.noconvert(), "threads"_a,
          "Gaussian window means of [H, W, C] with zeros around.");
}

} // namespace kernels::ssim
