// The Python side of the mask search: types, sizes, the GIL. Bindings check and forward.
#include "mask_bind.h"

#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "mask.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kernels::nm {
namespace {

using Weight = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void expect(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

void check(const Weight& weight, int64_t n, int64_t m, const Mask& out, int threads) {
    for (size_t i = 0; i < 3; ++i) expect(out.shape(i) == weight.shape(i), "out has another shape than weight");
    expect(m >= 1 && n >= 0 && n <= m, "pattern is " + std::to_string(n) + ":" + std::to_string(m) + "; expected 0 <= n <= m, m >= 1");
    expect(threads >= 1, "threads is " + std::to_string(threads) + "; expected 1 or more");
}

int64_t size(const Weight& weight, size_t i) { return static_cast<int64_t>(weight.shape(i)); }

void mask_into(const Weight& weight, int64_t n, int64_t m, const Mask& out, int threads) {
    check(weight, n, m, out, threads);
    expect(size(weight, 1) < int64_t{1} << 31, "the axis has 2^31 entries or more");
    nb::gil_scoped_release release;
    mask(weight.data(), {size(weight, 0), size(weight, 1), size(weight, 2)}, n, m, out.data(), threads);
}

void transposable_into(const Weight& weight, int64_t n, int64_t m, const Mask& out, int threads) {
    check(weight, n, m, out, threads);
    expect(m <= kLargestTile, "m is " + std::to_string(m) + "; expected " + std::to_string(kLargestTile) + " at most");
    expect(size(weight, 1) % m == 0 && size(weight, 2) % m == 0, "m does not divide the last two axes");
    nb::gil_scoped_release release;
    transposable_mask(weight.data(), {size(weight, 0), size(weight, 1), size(weight, 2)}, n, m, out.data(), threads);
}

} // namespace

void bind_mask(nb::module_& m) {
    m.def("nm_mask", &mask_into, "weight"_a.noconvert(), "n"_a, "m"_a, "out"_a.noconvert(), "threads"_a,
          "out [outer, size, inner] uint8: 1 at the n largest magnitudes of every m along the middle axis.");
    m.def("nm_transposable_mask", &transposable_into, "weight"_a.noconvert(), "n"_a, "m"_a, "out"_a.noconvert(), "threads"_a,
          "out [batch, rows, columns] uint8: n ones in every row and column of each m x m tile.");
}

} // namespace kernels::nm
