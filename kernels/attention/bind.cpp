// The Python side of attention: types, sizes, the GIL. Bindings check and forward.
#include "bind.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu.h"
#include "tile.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kernels::attention {
namespace {

// bfloat16 travels as its bits
using Any4 = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;
template <class T, size_t Dimensions>
using Array_ = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Rows = Array_<const float, 3>;
using RowsOut = Array_<float, 3>;
using Present = std::optional<Array_<const uint8_t, 2>>;

template <class A>
void expect(const A& array, const char* name, int64_t expected) {
    if (static_cast<int64_t>(array.size()) != expected)
        throw std::invalid_argument(std::string(name) + " holds " + std::to_string(array.size()) + " entries; expected " +
                                    std::to_string(expected));
}

bool half(const Any4& array, const char* name) {
    if (array.dtype() == nb::dtype<float>()) return false;
    if (array.dtype() != nb::dtype<uint16_t>()) throw std::invalid_argument(std::string(name) + ": expected float32 or 16 bits");
    return true;
}

Array in(const Any4& array, const char* name) { return {array.data(), half(array, name)}; }
ArrayOut out(const Any4& array, const char* name) { return {array.data(), half(array, name)}; }

int64_t size(const Any4& array, int dim) { return static_cast<int64_t>(array.shape(dim)); }

Problem problem(const Any4& q, const Any4& k, int block, float scale, const Present& present, int threads) {
    Problem p{size(q, 0), size(q, 1), size(k, 1), size(q, 2), size(k, 2), static_cast<int>(q.shape(3)), block, scale, nullptr};
    if (size(k, 0) != p.batch || size(k, 3) != p.depth || p.key_heads < 1 || p.heads % p.key_heads)
        throw std::invalid_argument("k: expected the batch and head dim of q, and heads that divide its heads");
    if (p.depth < 1 || p.depth > kMostDepth) throw std::invalid_argument("head dim: expected 1 to 256");
    if (block < 1 || (block > kTile && block % kTile)) throw std::invalid_argument("block: expected up to 64, or a multiple of it");
    if (threads < 1) throw std::invalid_argument("threads: expected 1 or more");
    if (present) {
        expect(*present, "key_mask", p.batch * p.keys);
        p.present = present->data();
    }
    return p;
}

Mask mask_of(const Problem& p, const Array_<const int32_t, 1>& starts, const Array_<const uint16_t, 1>& columns, int64_t batch, int64_t heads) {
    if ((batch != 1 && batch != p.batch) || (heads != 1 && heads != p.heads)) throw std::invalid_argument("mask: expected 1 or all heads");
    expect(starts, "starts", batch * heads * p.query_blocks() + 1);
    for (size_t row = 0; row + 1 < starts.size(); ++row)
        if (starts.data()[row] > starts.data()[row + 1]) throw std::invalid_argument("starts: expected ascending numbers");
    if (starts.data()[0] != 0) throw std::invalid_argument("starts: expected 0 at first");
    expect(columns, "columns", starts.data()[starts.size() - 1]);
    for (size_t i = 0; i < columns.size(); ++i)
        if (columns.data()[i] >= p.key_blocks()) throw std::invalid_argument("columns: expected less than the number of key blocks");
    return {starts.data(), columns.data(), batch, heads};
}

void attention_into(const Any4& q, const Any4& k, const Any4& v, const Array_<const int32_t, 1>& starts, const Array_<const uint16_t, 1>& columns,
                    int64_t mask_batch, int64_t mask_heads, int block, float scale, const Present& present, const Any4& result,
                    const RowsOut& lse, int threads) {
    const Problem p = problem(q, k, block, scale, present, threads);
    const Mask mask = mask_of(p, starts, columns, mask_batch, mask_heads);
    expect(v, "v", k.size());
    expect(result, "out", q.size());
    expect(lse, "lse", p.batch * p.heads * p.queries);
    const Array query = in(q, "q"), key = in(k, "k"), value = in(v, "v");
    const ArrayOut to = out(result, "out");
    nb::gil_scoped_release release;
    attention(p, mask, query, key, value, to, lse.data(), threads);
}

void search_into(const Any4& q, const Any4& k, const Any4& v, int block, float scale, const Present& present, const Any4& result,
                 const RowsOut& lse, const Array_<float, 4>& scores, int threads) {
    const Problem p = problem(q, k, block, scale, present, threads);
    expect(v, "v", k.size());
    expect(result, "out", q.size());
    expect(lse, "lse", p.batch * p.heads * p.queries);
    expect(scores, "scores", p.batch * p.heads * p.query_blocks() * p.key_blocks());
    const Array query = in(q, "q"), key = in(k, "k"), value = in(v, "v");
    const ArrayOut to = out(result, "out");
    nb::gil_scoped_release release;
    search(p, query, key, value, to, lse.data(), scores.data(), threads);
}

void block_scores_into(const Any4& q, const Any4& k, const Rows& lse, int block, float scale, const Present& present,
                       const Array_<float, 4>& scores, int threads) {
    const Problem p = problem(q, k, block, scale, present, threads);
    expect(lse, "lse", p.batch * p.heads * p.queries);
    expect(scores, "scores", p.batch * p.heads * p.query_blocks() * p.key_blocks());
    const Array query = in(q, "q"), key = in(k, "k");
    nb::gil_scoped_release release;
    block_scores(p, query, key, lse.data(), scores.data(), threads);
}

void gradients_into(const Any4& d_out, const Rows& shift, const Any4& q, const Any4& k, const Any4& v, const Rows& lse,
                    const Array_<const int32_t, 1>& starts, const Array_<const uint16_t, 1>& columns, int64_t mask_batch, int64_t mask_heads,
                    int block, float scale, const Present& present, const Any4& dq, const Any4& dk, const Any4& dv, int threads) {
    const Problem p = problem(q, k, block, scale, present, threads);
    const Mask mask = mask_of(p, starts, columns, mask_batch, mask_heads);
    for (const auto& [array, name] : {std::pair{&d_out, "d_out"}, {&dq, "dq"}}) expect(*array, name, q.size());
    for (const auto& [array, name] : {std::pair{&v, "v"}, {&dk, "dk"}, {&dv, "dv"}}) expect(*array, name, k.size());
    expect(lse, "lse", p.batch * p.heads * p.queries);
    expect(shift, "shift", p.batch * p.heads * p.queries);
    const Array gradient = in(d_out, "d_out"), query = in(q, "q"), key = in(k, "k"), value = in(v, "v");
    const ArrayOut to_query = out(dq, "dq"), to_key = out(dk, "dk"), to_value = out(dv, "dv");
    nb::gil_scoped_release release;
    gradients(p, mask, gradient, shift.data(), query, key, value, lse.data(), to_query, to_key, to_value, threads);
}

} // namespace

void bind(nb::module_& m) {
    m.def("attention", &attention_into, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "starts"_a.noconvert(),
          "columns"_a.noconvert(), "mask_batch"_a, "mask_heads"_a, "block"_a, "scale"_a, "key_mask"_a.noconvert().none(),
          "out"_a.noconvert(), "lse"_a.noconvert(), "threads"_a, "Attention over the kept tiles: out [B, H, L, D] and lse [B, H, L].");
    m.def("attention_search", &search_into, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "block"_a, "scale"_a,
          "key_mask"_a.noconvert().none(), "out"_a.noconvert(), "lse"_a.noconvert(), "scores"_a.noconvert(), "threads"_a,
          "Attention over all tiles, and the weight of each: scores [B, H, query blocks, key blocks].");
    m.def("attention_block_scores", &block_scores_into, "q"_a.noconvert(), "k"_a.noconvert(), "lse"_a.noconvert(), "block"_a,
          "scale"_a, "key_mask"_a.noconvert().none(), "scores"_a.noconvert(), "threads"_a, "Sums of exp(scale q k - lse) in each tile.");
    m.def("attention_gradients", &gradients_into, "d_out"_a.noconvert(), "shift"_a.noconvert(), "q"_a.noconvert(), "k"_a.noconvert(),
          "v"_a.noconvert(), "lse"_a.noconvert(), "starts"_a.noconvert(), "columns"_a.noconvert(), "mask_batch"_a, "mask_heads"_a,
          "block"_a, "scale"_a, "key_mask"_a.noconvert().none(), "dq"_a.noconvert(), "dk"_a.noconvert(), "dv"_a.noconvert(), "threads"_a,
          "Gradients of q, k and v; shift [B, H, L] = sum(d_out out) - d_lse.");
}

} // namespace kernels::attention
