// The Python side of the gradients of chosen entries: types, sizes, the GIL. Bindings check and forward.
#include "bind.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kernels::masked_grad {
namespace {

template <class T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
// float32, or bfloat16 as its bits
template <size_t Dimensions>
using Any = nb::ndarray<nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Offsets = Array<const int16_t, 1>;
using Starts = Array<const int32_t, 1>;
using Floats = Array<float, 1>;
using Pair = std::array<int64_t, 2>;

void expect(const char* name, int64_t found, int64_t expected) {
    if (found != expected)
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(found) + "; expected " + std::to_string(expected));
}

template <class A>
void expect_size(const char* name, const A& array, int64_t expected) {
    expect((std::string("the size of ") + name).c_str(), static_cast<int64_t>(array.size()), expected);
}

Chosen chosen(const Offsets& offsets, const Starts& starts, int64_t rows, int64_t columns) {
    const Chosen w{offsets.data(), starts.data(), rows, columns};
    const int64_t tiles = w.down() * w.across();
    expect_size("starts", starts, tiles + 1);
    expect("the first start", starts.data()[0], 0);
    for (int64_t i = 0; i < tiles; ++i)
        if (starts.data()[i + 1] < starts.data()[i]) throw std::invalid_argument("starts: expected none below the one before");
    expect("the last start", starts.data()[tiles], static_cast<int64_t>(offsets.size()));
    return w;
}

// Calls body with a typed null pointer for what the array holds.
template <class A, class Body>
void typed(const char* name, const A& array, const Body& body) {
    if (array.dtype() == nb::dtype<float>()) body(static_cast<float*>(nullptr));
    else if (array.dtype() == nb::dtype<Bits>()) body(static_cast<Bits*>(nullptr));
    else throw std::invalid_argument(std::string(name) + ": expected float32 or 16 bits");
}

template <class T, class A>
const T* data(const char* name, const A& array) {
    if (array.dtype() != nb::dtype<T>()) throw std::invalid_argument(std::string(name) + ": expected the dtype of dy");
    return static_cast<const T*>(array.data());
}

int64_t scratch(int64_t rows, int64_t columns, int64_t groups, int threads) {
    return scratch_of({nullptr, nullptr, rows, columns}, groups, threads);
}

void check_room(const Chosen& w, int64_t groups, const Floats& scratch, const Offsets& offsets, const Floats& out, int threads) {
    if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + "; expected 1 or more");
    expect_size("scratch", scratch, scratch_of(w, groups, threads));
    expect_size("out", out, static_cast<int64_t>(offsets.size()));
}

void linear_gradient_into(const Any<2>& dy, const Any<2>& x, const Offsets& offsets, const Starts& starts, const Floats& scratch,
                          const Floats& out, int threads) {
    const int64_t tokens = static_cast<int64_t>(dy.shape(0));
    const Chosen w = chosen(offsets, starts, static_cast<int64_t>(dy.shape(1)), static_cast<int64_t>(x.shape(1)));
    expect("the number of tokens of x", static_cast<int64_t>(x.shape(0)), tokens);
    check_room(w, 1, scratch, offsets, out, threads);
    typed("dy", dy, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *from = data<T>("dy", dy), *given = data<T>("x", x);
        nb::gil_scoped_release release;
        linear_gradient(from, given, tokens, w, scratch.data(), out.data(), threads);
    });
}

void conv2d_gradient_into(const Any<4>& dy, const Any<4>& x, const Offsets& offsets, const Starts& starts, Pair size, Pair stride,
                          Pair padding, Pair dilation, int64_t groups, const Floats& scratch, const Floats& out, int threads) {
    auto of = [](const Any<4>& array, int i) { return static_cast<int64_t>(array.shape(i)); };
    if (groups < 1 || of(x, 1) % groups || of(dy, 1) % groups)
        throw std::invalid_argument("groups: expected a divisor of the channels of x and dy");
    const Convolution window{of(x, 0), groups, of(x, 1) / groups, of(x, 2), of(x, 3), of(dy, 2), of(dy, 3), size[0], size[1],
                             stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
    for (int i = 0; i < 2; ++i) {
        if (size[i] < 1 || stride[i] < 1 || padding[i] < 0 || dilation[i] < 1)
            throw std::invalid_argument("window: expected size, stride and dilation >= 1 and padding >= 0");
        const int64_t room = of(x, 2 + i) + 2 * padding[i] - dilation[i] * (size[i] - 1) - 1;
        expect("a side of dy", of(dy, 2 + i), room / stride[i] + 1);
    }
    const Chosen w = chosen(offsets, starts, of(dy, 1), window.channels * size[0] * size[1]);
    expect("the number of images of dy", of(dy, 0), of(x, 0));
    check_room(w, groups, scratch, offsets, out, threads);
    typed("dy", dy, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T *from = data<T>("dy", dy), *given = data<T>("x", x);
        nb::gil_scoped_release release;
        conv2d_gradient(from, given, window, w, scratch.data(), out.data(), threads);
    });
}

void take_into(const Array<const float, 2>& panel, int64_t row, const Offsets& offsets, const Starts& starts, int64_t rows,
               const Floats& out, int threads) {
    const Chosen w = chosen(offsets, starts, rows, static_cast<int64_t>(panel.shape(1)));
    const int64_t count = static_cast<int64_t>(panel.shape(0));
    if (row < 0 || row + count > rows) throw std::invalid_argument("panel: expected rows of the weight");
    expect_size("out", out, static_cast<int64_t>(offsets.size()));
    nb::gil_scoped_release release;
    take(panel.data(), row, count, w, out.data(), threads);
}

void adamw_into(const Any<2>& weight, const Any<1>& gradient, const Offsets& offsets, const Starts& starts, const Floats& first,
                const Floats& second, const std::optional<Floats>& master, float scale, double beta1, double beta2, double keep,
                double rate, double root, double eps, int threads) {
    const int64_t count = static_cast<int64_t>(offsets.size());
    const Chosen w = chosen(offsets, starts, static_cast<int64_t>(weight.shape(0)), static_cast<int64_t>(weight.shape(1)));
    expect_size("gradient", gradient, count);
    expect_size("first", first, count);
    expect_size("second", second, count);
    if (master) expect_size("master", *master, count);
    auto single = [](double x) { return static_cast<float>(x); };
    const Step step{scale, single(1 - beta1), single(beta2), single(1 - beta2), single(keep), single(rate), single(root), single(eps)};
    typed("weight", weight, [&](auto* to) {
        typed("gradient", gradient, [&](auto* from) {
            using T = std::remove_pointer_t<decltype(to)>;
            using G = std::remove_pointer_t<decltype(from)>;
            T* held = static_cast<T*>(weight.data());
            const G* slope = static_cast<const G*>(gradient.data());
            nb::gil_scoped_release release;
            adamw(held, slope, w, step, first.data(), second.data(), master ? master->data() : nullptr, threads);
        });
    });
}

} // namespace

void bind(nb::module_& m) {
    m.def("masked_grad_scratch", &scratch, "rows"_a, "columns"_a, "groups"_a, "threads"_a, "Floats of scratch for the gradients below.");
    m.def("masked_grad_linear", &linear_gradient_into, "dy"_a.noconvert(), "x"_a.noconvert(), "offsets"_a.noconvert(),
          "starts"_a.noconvert(), "scratch"_a.noconvert(), "out"_a.noconvert(), "threads"_a,
          "Chosen entries of dy^T x; dy [T, O] and x [T, I] float32, or bfloat16 as bits.");
    m.def("masked_grad_conv2d", &conv2d_gradient_into, "dy"_a.noconvert(), "x"_a.noconvert(), "offsets"_a.noconvert(),
          "starts"_a.noconvert(), "size"_a, "stride"_a, "padding"_a, "dilation"_a, "groups"_a, "scratch"_a.noconvert(),
          "out"_a.noconvert(), "threads"_a, "The same of a convolution's weight; dy [N, O, H', W'], x [N, C, H, W].");
    m.def("masked_grad_take", &take_into, "panel"_a.noconvert(), "row"_a, "offsets"_a.noconvert(), "starts"_a.noconvert(), "rows"_a,
          "out"_a.noconvert(), "threads"_a, "Chosen entries of the rows from `row` on, which panel [count, I] holds.");
    m.def("masked_grad_adamw", &adamw_into, "weight"_a.noconvert(), "gradient"_a.noconvert(), "offsets"_a.noconvert(),
          "starts"_a.noconvert(), "first"_a.noconvert(), "second"_a.noconvert(), "master"_a.noconvert().none(), "scale"_a,
          "beta1"_a, "beta2"_a, "keep"_a, "rate"_a, "root"_a, "eps"_a, "threads"_a,
          "One step of AdamW on the chosen entries of weight [O, I], in place.");
}

} // namespace kernels::masked_grad
