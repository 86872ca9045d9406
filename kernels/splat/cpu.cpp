// Binning and the two passes over all tiles.
//
// Binning: one radix sort of the visible items by depth, then a counting scatter into the tiles, which keeps the order
// (5 passes over short arrays, where sorting (tile, depth) keys takes 8 over long ones). Threads take consecutive parts
// of the sorted items, and each knows where its part of each tile begins, so the result does not depend on their number.
//
// Gradients: every pair (item, tile) has a slot of its own, written by whoever has the tile; an item's slots are added up
// in order of its tiles. So results repeat bit for bit, and no two threads write one place.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../simd/isa.h"
#include "tile.h"

namespace kernels::splat {
namespace {

constexpr double kHalfLog2E = 0.72134752044448170;
constexpr int64_t kFew = 4096; // items that are not worth waking threads for

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

// Uninitialised memory: vectors would write it first.
template <class T>
std::unique_ptr<T[]> memory(int64_t count) {
    return std::unique_ptr<T[]>(new T[std::max<int64_t>(count, 1)]);
}

// The bits of a float, and an integer that sorts as the float does.
uint32_t pattern(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

uint32_t sort_key(float value) {
    const uint32_t bits = pattern(value + 0.0f); // -0 and 0 are equal
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Stable radix sort of items by key, 11 bits a pass. `items` and `keys` hold the result.
void sort_by_key(uint32_t* keys, int32_t* items, int64_t count, int threads) {
    constexpr int bits = 11, buckets = 1 << bits;
    const int parts = count < kFew ? 1 : threads;
    auto other_keys = memory<uint32_t>(count);
    auto other_items = memory<int32_t>(count);
    std::vector<int64_t> starts(parts * buckets);
    uint32_t *from_keys = keys, *to_keys = other_keys.get();
    int32_t *from_items = items, *to_items = other_items.get();
    for (int shift = 0; shift < 32; shift += bits) {
        std::fill(starts.begin(), starts.end(), 0);
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
        for (int part = 0; part < parts; ++part)
            for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i)
                ++starts[part * buckets + (from_keys[i] >> shift) % buckets];
        int64_t sum = 0;
        for (int bucket = 0; bucket < buckets; ++bucket)
            for (int part = 0; part < parts; ++part) {
                const int64_t here = starts[part * buckets + bucket];
                starts[part * buckets + bucket] = sum;
                sum += here;
            }
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
        for (int part = 0; part < parts; ++part)
            for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
                const int64_t to = starts[part * buckets + (from_keys[i] >> shift) % buckets]++;
                to_keys[to] = from_keys[i];
                to_items[to] = from_items[i];
            }
        std::swap(from_keys, to_keys);
        std::swap(from_items, to_items);
    }
    if (from_keys != keys) {
        std::copy(from_keys, from_keys + count, keys);
        std::copy(from_items, from_items + count, items);
    }
}

void bin_camera(const float* depths, const Box* boxes, int64_t begin, int64_t end, int64_t camera, int64_t camera_shift,
                const Size& size, int64_t base, int32_t* ids, int64_t* keys_out, int64_t* offsets, int threads) {
    auto keys = memory<uint32_t>(end - begin);
    auto items = memory<int32_t>(end - begin);
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i)
        if (boxes[i].columns > 0) {
            keys[count] = sort_key(depths[i]);
            items[count++] = static_cast<int32_t>(i);
        }
    sort_by_key(keys.get(), items.get(), count, threads);

    const int parts = count < kFew ? 1 : threads;
    const int64_t tiles = size.tiles(), columns = size.tile_columns();
    std::vector<int64_t> starts(parts * tiles);
    // pass 0 counts, pass 1 writes
    auto over_tiles = [&](int part, auto&& each) {
        for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
            const Box& box = boxes[items[i]];
            for (int64_t y = box.y; y < box.y + box.rows; ++y)
                for (int64_t x = box.x; x < box.x + box.columns; ++x) each(i, y * columns + x);
        }
    };
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; ++part)
        over_tiles(part, [&](int64_t, int64_t tile) { ++starts[part * tiles + tile]; });
    int64_t sum = base;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        offsets[tile] = sum;
        for (int part = 0; part < parts; ++part) {
            const int64_t here = starts[part * tiles + tile];
            starts[part * tiles + tile] = sum;
            sum += here;
        }
    }
    const int64_t high = camera << camera_shift;
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; ++part)
        over_tiles(part, [&](int64_t i, int64_t tile) {
            const int64_t to = starts[part * tiles + tile]++;
            ids[to] = items[i];
            keys_out[to] = (high | tile) << 32 | pattern(depths[items[i]]);
        });
}

void write_record(const Scene& scene, int64_t item, float* record) {
    std::fill_n(record, record_floats(scene.channels), 0.0f);
    const float* conic = scene.conics + 3 * item;
    const double a = conic[0], b = conic[1], c = conic[2];
    const double r1 = std::sqrt(a * kHalfLog2E), s1 = std::sqrt((c - b * b / a) * kHalfLog2E);
    const float opacity = scene.opacities[item];
    if (!(opacity >= kMinAlpha && std::isfinite(opacity) && a > 0 && static_cast<float>(s1) > 0)) { // or not a number
        record[kLogOpacity] = kNever;
        return;
    }
    record[kLogOpacity] = std::log2(opacity);
    record[kX] = scene.means[2 * item];
    record[kY] = scene.means[2 * item + 1];
    record[kR1] = static_cast<float>(r1);
    record[kRatio] = static_cast<float>(b / a);
    record[kR2] = static_cast<float>(b / a * r1);
    record[kS1] = static_cast<float>(s1);
    record[kInverseR1] = static_cast<float>(1.0 / r1);
    const float* colors = scene.colors + item * scene.channels;
    std::copy(colors, colors + scene.channels, record + kColor);
}

struct Place {
    Tile tile;
    int64_t camera, pixel; // the camera's first pixel in the batch of images
};

Place place(const Scene& scene, int64_t index) {
    const Size& size = scene.size;
    const int64_t camera = index / size.tiles(), tile = index % size.tiles();
    Place out;
    out.camera = camera;
    out.pixel = camera * size.width * size.height;
    out.tile.ids = scene.ids + scene.offsets[index];
    out.tile.count = scene.offsets[index + 1] - scene.offsets[index];
    out.tile.x = static_cast<int>(tile % size.tile_columns() * kTile);
    out.tile.y = static_cast<int>(tile / size.tile_columns() * kTile);
    out.tile.columns = static_cast<int>(std::min<int64_t>(kTile, size.width - out.tile.x));
    out.tile.rows = static_cast<int>(std::min<int64_t>(kTile, size.height - out.tile.y));
    out.tile.width = size.width;
    return out;
}

// From sums in the coordinates of tile.h to the means, the conic and the opacity.
void finish(const Scene& scene, const float* record, const double* sums, int64_t item, const Gradients& out) {
    constexpr double ln2 = 0.69314718055994531;
    const double r1 = record[kR1], r2 = record[kR2], s1 = record[kS1], inverse = record[kInverseR1], ratio = record[kRatio];
    out.means[2 * item] = static_cast<float>(2 * ln2 * r1 * sums[kHu]);
    out.means[2 * item + 1] = static_cast<float>(2 * ln2 * (r2 * sums[kHu] + s1 * sums[kHv]));
    // dy = v / s1, dx = u / r1 - (b / a) dy
    const double yy = sums[kHvv] / (s1 * s1), uy = sums[kHuv] * inverse / s1;
    const double xy = uy - ratio * yy;
    const double xx = sums[kHuu] * inverse * inverse - 2 * ratio * uy + ratio * ratio * yy;
    out.conics[3 * item] = static_cast<float>(-0.5 * xx);
    out.conics[3 * item + 1] = static_cast<float>(-xy);
    out.conics[3 * item + 2] = static_cast<float>(-0.5 * yy);
    out.opacities[item] = static_cast<float>(sums[kH] / scene.opacities[item]);
    if (out.absolute) {
        out.absolute[2 * item] = static_cast<float>(2 * ln2 * r1 * sums[kAbsX]);
        out.absolute[2 * item + 1] = static_cast<float>(2 * ln2 * sums[kAbsY]);
    }
    for (int64_t c = 0; c < scene.channels; ++c)
        out.colors[item * scene.channels + c] = static_cast<float>(sums[kSumColor + c]);
}

void clear(const Scene& scene, int64_t item, const Gradients& out) {
    std::fill_n(out.means + 2 * item, 2, 0.0f);
    std::fill_n(out.conics + 3 * item, 3, 0.0f);
    out.opacities[item] = 0.0f;
    if (out.absolute) std::fill_n(out.absolute + 2 * item, 2, 0.0f);
    std::fill_n(out.colors + item * scene.channels, scene.channels, 0.0f);
}

} // namespace

int64_t Size::tile_columns() const { return (width + kTile - 1) / kTile; }
int64_t Size::tile_rows() const { return (height + kTile - 1) / kTile; }

int64_t boxes(const float* means, const int32_t* radii, const float* depths, int64_t items, const Size& size, Box* out, int threads) {
    const double columns = static_cast<double>(size.tile_columns()), rows = static_cast<double>(size.tile_rows());
    auto clamp = [](double value, double most) { return value > 0 ? std::min(value, most) : 0.0; };
#pragma omp parallel for schedule(static) num_threads(threads) if (items >= kFew)
    for (int64_t i = 0; i < items; ++i) {
        const double x = means[2 * i], y = means[2 * i + 1], rx = radii[2 * i], ry = radii[2 * i + 1];
        Box box{0, 0, 0, 0, 0};
        if (rx > 0 && ry > 0 && std::isfinite(x) && std::isfinite(y) && std::isfinite(depths[i])) {
            const double left = clamp(std::floor((x - rx) / kTile), columns), right = clamp(std::ceil((x + rx) / kTile), columns);
            const double top = clamp(std::floor((y - ry) / kTile), rows), bottom = clamp(std::ceil((y + ry) / kTile), rows);
            if (right > left && bottom > top)
                box = {static_cast<int32_t>(left), static_cast<int32_t>(top), static_cast<int32_t>(right - left),
                       static_cast<int32_t>(bottom - top), 0};
        }
        out[i] = box;
    }
    int64_t pairs = 0;
    for (int64_t i = 0; i < items; ++i) {
        out[i].first = pairs;
        pairs += int64_t{out[i].columns} * out[i].rows;
    }
    return pairs;
}

void bin(const float* depths, const Box* boxes, const int64_t* first, int64_t cameras, const Size& size, int32_t* ids,
         int64_t* keys, int64_t* offsets, int threads) {
    int64_t camera_shift = 0; // bits of a tile's number, as gsplat counts them
    while (size.tiles() >> camera_shift) ++camera_shift;
    int64_t base = 0;
    for (int64_t camera = 0; camera < cameras; ++camera) {
        const int64_t begin = first[camera], end = first[camera + 1];
        bin_camera(depths, boxes, begin, end, camera, camera_shift, size, base, ids, keys, offsets + camera * size.tiles(), threads);
        if (end > begin) base = boxes[end - 1].first + int64_t{boxes[end - 1].columns} * boxes[end - 1].rows;
    }
    offsets[cameras * size.tiles()] = base;
}

void forward(const Scene& scene, const float* backgrounds, float* records, uint64_t* masks, float* render,
             float* transmittance, int threads) {
    const TileOps& ops = tile_ops();
    const int64_t stride = record_floats(scene.channels), tiles = scene.cameras * scene.size.tiles();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < scene.items; ++item) write_record(scene, item, records + item * stride);
#pragma omp for schedule(dynamic, 4)
        for (int64_t index = 0; index < tiles; ++index) {
            const Place at = place(scene, index);
            ops.forward({at.tile, records, scene.channels, backgrounds ? backgrounds + at.camera * scene.channels : nullptr,
                         scene.max_alpha, masks + scene.offsets[index], render + at.pixel * scene.channels,
                         transmittance + at.pixel});
        }
    }
}

void backward(const Scene& scene, const Box* boxes, const float* records, const uint64_t* masks, const float* render,
              const float* transmittance, const float* grad_render, const float* grad_alpha, float* scratch,
              const Gradients& out, int threads) {
    const TileOps& ops = tile_ops();
    const int64_t stride = record_floats(scene.channels), tiles = scene.cameras * scene.size.tiles();
#pragma omp parallel num_threads(threads)
    {
        std::vector<int64_t> slots;
#pragma omp for schedule(dynamic, 4)
        for (int64_t index = 0; index < tiles; ++index) {
            const Place at = place(scene, index);
            slots.resize(at.tile.count);
            for (int64_t i = 0; i < at.tile.count; ++i) {
                const Box& box = boxes[at.tile.ids[i]];
                slots[i] = box.first + (at.tile.y / kTile - box.y) * int64_t{box.columns} + (at.tile.x / kTile - box.x);
            }
            ops.backward({at.tile, records, scene.channels, scene.max_alpha, out.absolute != nullptr,
                          masks + scene.offsets[index], render + at.pixel * scene.channels, transmittance + at.pixel,
                          grad_render + at.pixel * scene.channels, grad_alpha + at.pixel, slots.data(), scratch});
        }
        std::vector<double> sums(stride);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < scene.items; ++item) {
            const int64_t pairs = int64_t{boxes[item].columns} * boxes[item].rows;
            const float* record = records + item * stride;
            if (pairs == 0 || record[kLogOpacity] == kNever) {
                clear(scene, item, out);
                continue;
            }
            std::fill(sums.begin(), sums.end(), 0.0);
            for (int64_t pair = 0; pair < pairs; ++pair)
                for (int64_t i = 0; i < stride; ++i) sums[i] += scratch[(boxes[item].first + pair) * stride + i];
            finish(scene, record, sums.data(), item, out);
        }
    }
}

} // namespace kernels::splat
