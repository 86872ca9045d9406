// The Python side of the packed products: types, sizes, the GIL. Bindings check and forward.
#include "bind.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kernels::nm {
namespace {

template <class T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Matrix = Array<const float, 2>;
using MatrixOut = Array<float, 2>;
// bfloat16 travels as its bits
using Values = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Places = Array<uint8_t, 4>;

template <class A>
void expect(const A& array, const char* name, int64_t expected) {
    if (static_cast<int64_t>(array.size()) != expected)
        throw std::invalid_argument(std::string(name) + " holds " + std::to_string(array.size()) + " entries; expected " +
                                    std::to_string(expected));
}

// places [blocks, groups, n, 8 or 16] and values [blocks, groups, n, 16] say all but the numbers of rows and m.
Packed packed(const Values& values, const Places& places, int64_t rows, int m) {
    const bool half = values.dtype() == nb::dtype<uint16_t>();
    if (!half && values.dtype() != nb::dtype<float>()) throw std::invalid_argument("values: expected float32 or 16 bits");
    Packed w{values.data(), places.data(), rows, static_cast<int64_t>(values.shape(1)), static_cast<int>(values.shape(2)), m, half};
    if (m < 1 || m > 256 || w.n < 1 || w.n > m) throw std::invalid_argument("n and m: expected 1 <= n <= m <= 256");
    expect(values, "values", w.blocks() * w.slots() * kBlock);
    expect(places, "places", w.blocks() * w.slots() * w.place_bytes());
    return w;
}

bool pack_into(const nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>& weight, const Array<const uint8_t, 2>& kept, int m,
               const Values& values, const Places& places, int threads) {
    const Packed w = packed(values, places, weight.shape(0), m);
    expect(weight, "weight", w.rows * w.columns());
    expect(kept, "kept", w.rows * w.columns());
    if (weight.dtype() != values.dtype()) throw std::invalid_argument("weight and values: expected one dtype");
    nb::gil_scoped_release release;
    return w.half ? pack(static_cast<const uint16_t*>(weight.data()), kept.data(), w, threads)
                  : pack(static_cast<const float*>(weight.data()), kept.data(), w, threads);
}

void unpack_into(const Values& values, const Places& places, int m, const nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>& weight,
                 int threads) {
    const Packed w = packed(values, places, weight.shape(0), m);
    expect(weight, "weight", w.rows * w.columns());
    if (weight.dtype() != values.dtype()) throw std::invalid_argument("weight and values: expected one dtype");
    nb::gil_scoped_release release;
    if (w.half) unpack(w, static_cast<uint16_t*>(weight.data()), threads);
    else unpack(w, static_cast<float*>(weight.data()), threads);
}

// Value: float, or bfloat16 as its bits
template <class Value>
void linear_into(const Array<const Value, 2>& x, const Values& values, const Places& places, int m,
                 const std::optional<Array<const float, 1>>& bias, const Array<Value, 2>& y, int threads) {
    const Packed w = packed(values, places, y.shape(1), m);
    expect(x, "x", y.shape(0) * w.columns());
    if (bias) expect(*bias, "bias", w.rows);
    if (std::is_same_v<Value, uint16_t> && !(w.half && takes_half(w.n, m, y.shape(0))))
        throw std::invalid_argument("x of 16 bits: expected values of 16 bits, and what nm_takes_bfloat16 allows");
    nb::gil_scoped_release release;
    forward(w, x.data(), y.shape(0), bias ? bias->data() : nullptr, y.data(), threads);
}

void input_gradient_into(const Matrix& dy, const Values& values, const Places& places, int m, const MatrixOut& dx, int threads) {
    const Packed w = packed(values, places, dy.shape(1), m);
    expect(dx, "dx", dy.shape(0) * w.columns());
    nb::gil_scoped_release release;
    input_gradient(w, dy.data(), dy.shape(0), dx.data(), threads);
}

void weight_gradient_into(const Matrix& dy, const Matrix& x, const Values& values, const Places& places, int m,
                          const Array<float, 4>& out, int threads) {
    const Packed w = packed(values, places, dy.shape(1), m);
    expect(x, "x", dy.shape(0) * w.columns());
    expect(out, "out", values.size());
    nb::gil_scoped_release release;
    weight_gradient(w, dy.data(), x.data(), dy.shape(0), out.data(), threads);
}

} // namespace

void bind(nb::module_& m) {
    m.def("nm_pack", &pack_into, "weight"_a.noconvert(), "kept"_a.noconvert(), "m"_a, "values"_a.noconvert(), "places"_a.noconvert(),
          "threads"_a, "Fills values [B, K/m, n, 16] and places from weight [O, K]; false if a group keeps more than n.");
    m.def("nm_unpack", &unpack_into, "values"_a.noconvert(), "places"_a.noconvert(), "m"_a, "weight"_a.noconvert(), "threads"_a,
          "The dense weight [O, K].");
    m.def("nm_linear", &linear_into<float>, "x"_a.noconvert(), "values"_a.noconvert(), "places"_a.noconvert(), "m"_a,
          "bias"_a.noconvert().none(), "y"_a.noconvert(), "threads"_a, "y [T, O] = x [T, K] W^T + bias.");
    m.def("nm_linear", &linear_into<uint16_t>, "x"_a.noconvert(), "values"_a.noconvert(), "places"_a.noconvert(), "m"_a,
          "bias"_a.noconvert().none(), "y"_a.noconvert(), "threads"_a, "The same in bfloat16, with sums in float32.");
    m.def("nm_takes_bfloat16", &takes_half, "n"_a, "m"_a, "tokens"_a, "Whether nm_linear takes x in bfloat16 here.");
    m.def("nm_input_gradient", &input_gradient_into, "dy"_a.noconvert(), "values"_a.noconvert(), "places"_a.noconvert(), "m"_a,
          "dx"_a.noconvert(), "threads"_a, "dx [T, K] = dy [T, O] W.");
    m.def("nm_weight_gradient", &weight_gradient_into, "dy"_a.noconvert(), "x"_a.noconvert(), "values"_a.noconvert(),
          "places"_a.noconvert(), "m"_a, "out"_a.noconvert(), "threads"_a, "Gradients of the kept values, laid out as they are.");
}

} // namespace kernels::nm
