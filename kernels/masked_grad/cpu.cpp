// A block of columns at a time, and of it a chunk of tokens: the input's columns are transposed into a panel that fits into
// the second-level cache, and threads take strips of rows, whose gradient they transpose for themselves. An entry's
// sum grows chunk by chunk in the same order whoever computes it: bits do not depend on the number of threads.
#include "cpu.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../simd/isa.h"

namespace kernels::masked_grad {
namespace {

constexpr int64_t kBlock = 1024; // columns of a panel: with kChunk floats each 512 KiB
constexpr int64_t kStrip = 32; // rows that a thread takes; they lie within a tile
constexpr int64_t kBundle = 16; // columns that are transposed together, at least a cache line of the input
constexpr int64_t kFew = 1 << 14; // entries, or numbers read, that are not worth waking threads for

const TileOps& tile_ops() {
    switch (current_lanes()) {
#if defined(KERNELS_X86)
    case Isa::avx2: return avx2_tile_ops();
    case Isa::avx512: return avx512_tile_ops();
#endif
    case Isa::emulated512: return emulated512_tile_ops();
    default: return portable_tile_ops();
    }
}

float widened(float value) { return value; }
float widened(Bits bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}

void store(float value, float* to) { *to = value; }
void store(float value, Bits* to) { // to the nearest, of two the even one; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *to = static_cast<Bits>(std::isnan(value) ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void copy(const float* from, int64_t count, float* to) { std::memcpy(to, from, count * sizeof(float)); }
void copy(const Bits* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
}

int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
int64_t panel_of(int64_t columns) { return std::min(up(columns, kBundle), kBlock) * kChunk; }

struct Chunk {
    int64_t first, count;
    int64_t padded() const { return up(count, kMultiple); }
};

// Tokens from first on become rows of kChunk floats, filled up with zeros: [count][kChunk] = columns of in, transposed.
template <class T>
void transpose(const T* in, int64_t stride, int64_t column, int64_t count, const Chunk& chunk, float* out) {
    const TileOps& ops = tile_ops();
    in += chunk.first * stride + column;
    if constexpr (std::is_same_v<T, float>) {
        ops.transpose(in, stride, chunk.count, count, out, kChunk);
    } else {
        float wide[kChunk * kStrip];
        for (int64_t t = 0; t < chunk.count; ++t) copy(in + t * stride, count, wide + t * kStrip);
        ops.transpose(wide, kStrip, chunk.count, count, out, kChunk);
    }
    for (int64_t i = 0; i < count; ++i) std::fill(out + i * kChunk + chunk.count, out + i * kChunk + chunk.padded(), 0.0f);
}

// Where the factors of a linear layer come from: dy [tokens][rows], x [tokens][columns].
template <class T>
struct Tokens {
    const T *dy, *x;
    int64_t tokens, rows_stride, columns_stride;

    int64_t length() const { return tokens; }
    void rows(int64_t first, int64_t count, const Chunk& chunk, float* out) const {
        transpose(dy, rows_stride, first, count, chunk, out);
    }
    void columns(int64_t first, int64_t count, const Chunk& chunk, float* out) const {
        transpose(x, columns_stride, first, count, chunk, out);
    }
};

// And those of a group of a convolution: the pixels of all results, one image after the other, are the tokens.
template <class T>
struct Pixels {
    const T *dy, *x;
    const Convolution& w;
    int64_t all_rows, group;

    int64_t area() const { return w.out_height * w.out_width; }
    int64_t length() const { return w.images * area(); }

    void rows(int64_t first, int64_t count, const Chunk& chunk, float* out) const {
        for (int64_t r = 0; r < count; ++r, out += kChunk) {
            for (int64_t t = 0; t < chunk.count;) {
                const int64_t image = (chunk.first + t) / area(), at = (chunk.first + t) % area();
                const int64_t run = std::min(chunk.count - t, area() - at);
                copy(dy + (image * all_rows + first + r) * area() + at, run, out + t);
                t += run;
            }
            std::fill(out + chunk.count, out + chunk.padded(), 0.0f);
        }
    }

    void columns(int64_t first, int64_t count, const Chunk& chunk, float* out) const {
        const int64_t window = w.kernel_height * w.kernel_width;
        for (int64_t c = first; c < first + count; ++c, out += kChunk) {
            const int64_t place = c % window;
            shifted(c / window, place / w.kernel_width, place % w.kernel_width, chunk, out);
        }
    }

private:
    // What the window's pixel (u, v) sees of a channel as the window moves over the images.
    void shifted(int64_t channel, int64_t u, int64_t v, const Chunk& chunk, float* out) const {
        int64_t image = chunk.first / area(), y = chunk.first % area() / w.out_width, x0 = chunk.first % w.out_width;
        for (int64_t t = 0; t < chunk.count;) {
            const int64_t run = std::min(chunk.count - t, w.out_width - x0);
            const int64_t row = y * w.stride_y + u * w.dilation_y - w.padding_y;
            const int64_t column = x0 * w.stride_x + v * w.dilation_x - w.padding_x;
            const int64_t plane = (image * w.groups + group) * w.channels + channel;
            if (row < 0 || row >= w.height) std::fill_n(out + t, run, 0.0f);
            else line(x + (plane * w.height + row) * w.width, column, run, out + t);
            t += run, x0 = 0;
            if (++y == w.out_height) y = 0, ++image;
        }
        std::fill(out + chunk.count, out + chunk.padded(), 0.0f);
    }

    // Every stride_x-th pixel of a line from this column on, zeros outside it.
    void line(const T* in, int64_t column, int64_t run, float* out) const {
        const int64_t step = w.stride_x;
        const int64_t begin = column < 0 ? std::min((-column + step - 1) / step, run) : 0;
        const int64_t end = column < w.width ? std::clamp((w.width - column + step - 1) / step, begin, run) : begin;
        std::fill_n(out, begin, 0.0f);
        if (step == 1) copy(in + column + begin, end - begin, out + begin);
        else
            for (int64_t i = begin; i < end; ++i) out[i] = widened(in[column + i * step]);
        std::fill_n(out + end, run - end, 0.0f);
    }
};

// Entries of tile (down, across) in the rows from `row` of it on.
int64_t entry_of(const Chosen& w, int64_t down, int64_t across, int64_t row) {
    const int64_t tile = down * w.across() + across;
    const int16_t *begin = w.offsets + w.starts[tile], *end = w.offsets + w.starts[tile + 1];
    return std::lower_bound(begin, end, row * kTile, [](int64_t a, int64_t b) { return a < b; }) - w.offsets;
}

// Rows first .. last - 1 of the weight, for one of the sources above, added to out.
template <class Source>
void accumulate(const Source& source, const Chosen& w, int64_t first, int64_t last, float* panel, float* strips, float* out,
                int threads) {
    const TileOps& ops = tile_ops();
    if (source.length() * (last - first + w.columns) < kFew) threads = 1;
    const int64_t begin = first / kStrip, count = (last + kStrip - 1) / kStrip - begin, wide = kBlock / kTile;
    std::vector<int64_t> bounds(2 * count * wide); // entries of a strip in each tile of the block
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t left = 0; left < w.columns; left += kBlock) {
        const int64_t block = std::min(kBlock, w.columns - left), tiles = (block + kTile - 1) / kTile;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * tiles; ++i) {
            const int64_t strip = i / tiles, tile = i % tiles, from = std::max(first, (begin + strip) * kStrip);
            const int64_t to = std::min(last, (begin + strip + 1) * kStrip), down = from / kTile;
            int64_t* entries = bounds.data() + 2 * (strip * wide + tile);
            entries[0] = entry_of(w, down, left / kTile + tile, from % kTile);
            entries[1] = entry_of(w, down, left / kTile + tile, to - down * kTile);
        }
        for (int64_t start = 0; start < source.length(); start += kChunk) {
            const Chunk chunk{start, std::min(kChunk, source.length() - start)};
#pragma omp for schedule(static)
            for (int64_t c = 0; c < block; c += kBundle)
                source.columns(left + c, std::min(kBundle, block - c), chunk, panel + c * kChunk);
            float* rows = strips + omp_get_thread_num() * kStrip * kChunk;
#pragma omp for schedule(dynamic)
            for (int64_t strip = 0; strip < count; ++strip) {
                const int64_t *entries = bounds.data() + 2 * strip * wide, from = std::max(first, (begin + strip) * kStrip);
                int64_t most = 0;
                for (int64_t tile = 0; tile < tiles; ++tile) most = std::max(most, entries[2 * tile + 1] - entries[2 * tile]);
                if (!most) continue;
                source.rows(from, std::min(last, (begin + strip + 1) * kStrip) - from, chunk, rows);
                for (int64_t tile = 0; tile < tiles; ++tile)
                    ops.products(w.offsets + entries[2 * tile], entries[2 * tile + 1] - entries[2 * tile], rows,
                                 static_cast<int>(from % kTile), panel + tile * kTile * kChunk, chunk.padded(),
                                 out + entries[2 * tile]);
            }
        }
    }
}

int worth(const Chosen& w, int threads) { return w.starts[w.down() * w.across()] < kFew ? 1 : threads; }

} // namespace

int64_t scratch_of(const Chosen& w, int64_t groups, int threads) {
    return panel_of(w.columns) * (groups > 1 ? threads : 1) + threads * kStrip * kChunk;
}

template <class T>
void linear_gradient(const T* dy, const T* x, int64_t tokens, const Chosen& w, float* scratch, float* out, int threads) {
    std::fill_n(out, w.starts[w.down() * w.across()], 0.0f);
    const Tokens<T> source{dy, x, tokens, w.rows, w.columns};
    accumulate(source, w, 0, w.rows, scratch, scratch + panel_of(w.columns), out, threads);
}

template <class T>
void conv2d_gradient(const T* dy, const T* x, const Convolution& window, const Chosen& w, float* scratch, float* out, int threads) {
    std::fill_n(out, w.starts[w.down() * w.across()], 0.0f);
    const int64_t rows = w.rows / window.groups, size = panel_of(w.columns);
    if (window.groups == 1) {
        accumulate(Pixels<T>{dy, x, window, w.rows, 0}, w, 0, rows, scratch, scratch + size, out, threads);
        return;
    }
    float* strips = scratch + threads * size;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t group = 0; group < window.groups; ++group) { // a thread takes a whole one
        const int64_t me = omp_get_thread_num();
        accumulate(Pixels<T>{dy, x, window, w.rows, group}, w, group * rows, (group + 1) * rows, scratch + me * size,
                   strips + me * kStrip * kChunk, out, 1);
    }
}

void take(const float* panel, int64_t row, int64_t count, const Chosen& w, float* out, int threads) {
    const int64_t first = row / kTile, tiles = ((row + count + kTile - 1) / kTile - first) * w.across();
#pragma omp parallel for num_threads(worth(w, threads)) schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t down = first + i / w.across(), across = i % w.across(), top = down * kTile;
        const int64_t begin = entry_of(w, down, across, std::max<int64_t>(0, row - top));
        const int64_t end = entry_of(w, down, across, std::min<int64_t>(kTile, row + count - top));
        for (int64_t e = begin; e < end; ++e)
            out[e] = panel[(top - row + w.offsets[e] / kTile) * w.columns + across * kTile + w.offsets[e] % kTile];
    }
}

template <class T, class G>
void adamw(T* weight, const G* gradient, const Chosen& w, const Step& step, float* first, float* second, float* master,
           int threads) {
    constexpr int64_t kAtOnce = 256;
    const TileOps& ops = tile_ops();
#pragma omp parallel for num_threads(worth(w, threads)) schedule(dynamic, 8)
    for (int64_t tile = 0; tile < w.down() * w.across(); ++tile) {
        T* corner = weight + tile / w.across() * kTile * w.columns + tile % w.across() * kTile;
        float slope[kAtOnce], room[kAtOnce];
        for (int64_t e = w.starts[tile]; e < w.starts[tile + 1]; e += kAtOnce) {
            const int64_t count = std::min<int64_t>(kAtOnce, w.starts[tile + 1] - e);
            const int16_t* offsets = w.offsets + e;
            auto at = [&](int64_t i) { return corner + offsets[i] / kTile * w.columns + offsets[i] % kTile; };
            float* value = master ? master + e : room;
            if (!master)
                for (int64_t i = 0; i < count; ++i) value[i] = widened(*at(i));
            copy(gradient + e, count, slope);
            ops.adamw(step, count, slope, first + e, second + e, value);
            for (int64_t i = 0; i < count; ++i) store(value[i], at(i));
        }
    }
}

template void linear_gradient(const float*, const float*, int64_t, const Chosen&, float*, float*, int);
template void linear_gradient(const Bits*, const Bits*, int64_t, const Chosen&, float*, float*, int);
template void conv2d_gradient(const float*, const float*, const Convolution&, const Chosen&, float*, float*, int);
template void conv2d_gradient(const Bits*, const Bits*, const Convolution&, const Chosen&, float*, float*, int);
template void adamw(float*, const float*, const Chosen&, const Step&, float*, float*, float*, int);
template void adamw(float*, const Bits*, const Chosen&, const Step&, float*, float*, float*, int);
template void adamw(Bits*, const float*, const Chosen&, const Step&, float*, float*, float*, int);
template void adamw(Bits*, const Bits*, const Chosen&, const Step&, float*, float*, float*, int);

} // namespace kernels::masked_grad
