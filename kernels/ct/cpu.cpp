// Planes, tiles, chunks and threads of the 2-D projector pair: everything around the tile kernels (tile.h).
//
// project: threads share out the groups of views. Each thread walks over tiles of kTileLines lines, copies the tile of
// every plane it needs into zero-padded buffers, and lets the tile kernel add the tile's share to the detector rows.
// backproject: threads share out the tiles. A tile of a plane is summed over all views in scratch, then written to the
// image (planes of rows) or to a transposed image (planes of columns), which is merged at the end. No two threads ever
// write the same number and the order of additions is fixed, hence equal results for any number of threads.
// Memory: image + sinogram + one transposed image (backproject only) + O(one block of lines) a thread.
//
// Provenance: own design after the projects's kernel notes (throw-away prototypes of 2026-11).
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../simd/isa.h"
#include "tile.h"

namespace kernels::ct {
namespace {

const TileOps& current_ops() {
    switch (current_lanes()) {
#if defined(KERNELS_X86)
    case Isa::avx2: return avx2_tile_ops();
    case Isa::avx512: return avx512_tile_ops();
#endif
    case Isa::emulated512: return emulated512_tile_ops();
    default: return portable_tile_ops();
    }
}

void call_project(const TileOps& ops, const ParallelSheet& sheet, const ProjectTask& task) {
    ops.project_parallel(sheet, task);
}
void call_project(const TileOps& ops, const FanSheet& sheet, const ProjectTask& task) { ops.project_fan(sheet, task); }
void call_backproject(const TileOps& ops, const ParallelSheet& sheet, const BackprojectTask& task) {
    ops.backproject_parallel(sheet, task);
}
void call_backproject(const TileOps& ops, const FanSheet& sheet, const BackprojectTask& task) {
    ops.backproject_fan(sheet, task);
}

template <class Body>
void run_threads(int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread) body(thread);
}

// Part `i` of `parts` equal parts of [0, count).
struct Part {
    int64_t begin, end;
};
Part part(int64_t count, int i, int parts) { return {count * i / parts, count * (i + 1) / parts}; }

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Groups on planes of one shape. A square image has one such pass, any other has one for rows and one for columns.
template <class SheetT>
struct Pass {
    int64_t lines, width;
    std::vector<Group<SheetT>> groups;
    bool uses[4]; // planes that occur
};

template <class SheetT>
std::vector<Pass<SheetT>> passes(std::vector<SheetT> all, const Shape& shape) {
    std::vector<std::vector<SheetT>> split(shape.height == shape.width ? 1 : 2);
    for (const SheetT& sheet : all) split[split.size() == 2 && is_columns(sheet.plane)].push_back(sheet);
    std::vector<Pass<SheetT>> out;
    for (size_t i = 0; i < split.size(); ++i) {
        if (split[i].empty()) continue;
        Pass<SheetT> pass{i ? shape.width : shape.height, i ? shape.height : shape.width, groups(std::move(split[i])), {}};
        for (const auto& group : pass.groups)
            for (const Member& member : group.members) pass.uses[member.plane] = true;
        out.push_back(std::move(pass));
    }
    return out;
}

// How many images of a batch go through a group together: enough to fill a tile call.
template <class SheetT>
int64_t images_together(const Pass<SheetT>& pass, int64_t batch) {
    size_t members = 1;
    for (const auto& group : pass.groups) members = std::max(members, group.members.size());
    return std::min<int64_t>(batch, kMaxMembers / static_cast<int64_t>(members));
}

// Copies lines [line, line + kTileLines) of a plane of the image; `tile` points at position 0 of the first line.
void load_tile(const float* image, const Shape& shape, Plane plane, int64_t line, float* tile, ptrdiff_t stride) {
    const int64_t lines = is_columns(plane) ? shape.width : shape.height;
    const int64_t width = is_columns(plane) ? shape.height : shape.width;
    const int64_t here = std::min<int64_t>(kTileLines, lines - line);
    for (int64_t i = here; i < kTileLines; ++i) std::fill_n(tile + i * stride, width, 0.0f);
    if (is_columns(plane)) {
        for (int64_t x = 0; x < width; ++x) {
            const float* row = image + x * shape.width + line;
            float* out = tile + (is_mirrored(plane) ? width - 1 - x : x);
            for (int64_t i = 0; i < here; ++i) out[i * stride] = row[i];
        }
        return;
    }
    for (int64_t i = 0; i < here; ++i) {
        const float* row = image + (line + i) * shape.width;
        if (is_mirrored(plane))
            std::reverse_copy(row, row + width, tile + i * stride);
        else
            std::copy_n(row, width, tile + i * stride);
    }
}

// Cells that meet positions [begin, end) of a tile's lines. Chunks share out the cells by where they cross the middle
// line; the outermost chunks take in whatever meets any line. Borders fall on multiples of kChunkAlign, so that chunks
// do not cut vectors.
template <class SheetT>
Part cells_of_chunk(const SheetT& sheet, int64_t line, int64_t lines, int64_t width, int64_t begin, int64_t end) {
    double top = static_cast<double>(line), bottom = static_cast<double>(line + lines - 1);
    if (sheet.forward() > 0) top = std::max(top, std::floor(sheet.source_line()) + 1);
    if (sheet.forward() < 0) bottom = std::min(bottom, std::ceil(sheet.source_line()) - 1);
    if (top > bottom) return {0, 0};
    const double low = static_cast<double>(sheet.first), high = static_cast<double>(sheet.last);
    auto cell_at = [&](double x, double l, double unseen) { return sheet.sees(x, l) ? sheet.cell_at(x, l) : unseen; };
    const double right = static_cast<double>(width);
    const double from = std::floor(std::min(cell_at(-1, top, low), cell_at(-1, bottom, low)));
    const double to = std::ceil(std::max(cell_at(right, top, high), cell_at(right, bottom, high)));
    // a sheet that misses the tile: aligning must not pull its cells in, their positions lie far outside the padding
    if (!(from < high && to > low)) return {0, 0};
    auto align = [&](double cell) {
        const int64_t down = static_cast<int64_t>(std::clamp(cell, low, high)) / kChunkAlign * kChunkAlign;
        return std::max(sheet.first, down);
    };
    auto border = [&](int64_t x) { return align(std::ceil(cell_at(static_cast<double>(x), 0.5 * (top + bottom), low))); };
    Part cells{begin == 0 ? align(from) : border(begin), border(end)};
    if (end >= width) cells.end = static_cast<int64_t>(std::clamp(to, low, high));
    return cells;
}

// Zeros on both sides of a tile's lines: the spread of positions over a tile's lines (|t| <= 1), over one aligned run
// of cells on either side, and one vector of slack.
template <class SheetT>
int64_t padding_of(const Pass<SheetT>& pass) {
    double spacing = 0;
    for (const auto& group : pass.groups)
        spacing = std::max({spacing, group.sheet.spacing_bound(0), group.sheet.spacing_bound(1.0 * pass.lines)});
    // a wider spacing than this never runs on vector tiles, and the portable ones need a single zero
    spacing = std::min(spacing, 16.0);
    return round_up(static_cast<int64_t>(2 * kTileLines + 2 * kChunkAlign * spacing) + 32, 16);
}

// Widths of chunks: with four members a chunk of 64 positions is 16 KB of tile.
int64_t chunk_width(int members) { return members >= 4 ? 64 : members >= 2 ? 128 : 256; }

// The (image, member) pairs of a group, handed out up to kMaxMembers at a time.
template <class SheetT, class Body>
void for_members(const Group<SheetT>& group, int64_t images, Body body) {
    const int64_t count = images * static_cast<int64_t>(group.members.size());
    for (int64_t begin = 0; begin < count; begin += kMaxMembers)
        body(begin, static_cast<int>(std::min<int64_t>(kMaxMembers, count - begin)));
}

template <class SheetT>
void project_pass(const TileOps& ops, const Pass<SheetT>& pass, const float* image, int64_t batch, const Shape& shape,
                  int64_t views, float* sinogram, int threads) {
    const int64_t padding = padding_of(pass), together = images_together(pass, batch);
    const ptrdiff_t stride = round_up(pass.width + 2 * padding, 16) + 16; // an odd number of cache lines
    const int64_t tile_floats = stride * kTileLines;
    std::vector<std::vector<float>> tiles(static_cast<size_t>(threads));
    for (auto& buffer : tiles) buffer.assign(static_cast<size_t>(4 * together * tile_floats), 0.0f);
    run_threads(threads, [&](int thread) {
        const Part mine = part(static_cast<int64_t>(pass.groups.size()), thread, threads);
        float* buffer = tiles[static_cast<size_t>(thread)].data();
        bool uses[4] = {};
        size_t most = 1;
        for (int64_t g = mine.begin; g < mine.end; ++g) {
            const auto& members = pass.groups[static_cast<size_t>(g)].members;
            most = std::max(most, members.size());
            for (const Member& member : members) uses[member.plane] = true;
        }
        const int64_t chunk = chunk_width(static_cast<int>(most) * static_cast<int>(together));
        for (int64_t b = 0; b < batch; b += together) {
            const int64_t images = std::min(together, batch - b);
            for (int64_t line = 0; line < pass.lines; line += kTileLines) {
                for (int64_t i = 0; i < images; ++i)
                    for (int plane = 0; plane < 4; ++plane)
                        if (uses[plane])
                            load_tile(image + (b + i) * shape.height * shape.width, shape, static_cast<Plane>(plane), line,
                                      buffer + (4 * i + plane) * tile_floats + padding, stride);
                ProjectTask task{};
                task.stride = stride;
                task.line = line;
                task.lines = std::min<int64_t>(kTileLines, pass.lines - line);
                task.width = pass.width;
                task.padding = padding;
                task.cells = shape.cells;
                for (int64_t begin = 0; begin < pass.width; begin += chunk) {
                    for (int64_t g = mine.begin; g < mine.end; ++g) {
                        const auto& group = pass.groups[static_cast<size_t>(g)];
                        const Part cells = cells_of_chunk(group.sheet, line, task.lines, pass.width, begin, begin + chunk);
                        if (cells.begin >= cells.end) continue;
                        task.begin = cells.begin;
                        task.end = cells.end;
                        for_members(group, images, [&](int64_t first, int count) {
                            task.members = count;
                            for (int m = 0; m < count; ++m) {
                                const int64_t size = static_cast<int64_t>(group.members.size());
                                const int64_t i = (first + m) / size;
                                const Member& member = group.members[static_cast<size_t>((first + m) % size)];
                                task.tiles[m] = buffer + (4 * i + member.plane) * tile_floats + padding;
                                task.rows[m] = sinogram + ((b + i) * views + member.view) * shape.cells;
                                task.reversed[m] = member.reversed;
                            }
                            call_project(ops, group.sheet, task);
                        });
                    }
                }
            }
        }
    });
}

// Adds a tile's sums to the image: lines of row planes are rows of `rows`, lines of column planes rows of `columns`.
void store_tile(const float* sums, int per_position, ptrdiff_t sum_stride, Plane plane, int64_t line, int64_t lines,
                int64_t width, float* rows, float* columns) {
    float* target = is_columns(plane) ? columns : rows;
    for (int64_t i = 0; i < lines; ++i) {
        const float* from = sums + i * sum_stride * per_position;
        float* to = target + (line + i) * width;
        for (int64_t x = 0; x < width; ++x) {
            const float sum = per_position == 2 ? from[2 * x] + from[2 * x + 1] : from[x];
            to[is_mirrored(plane) ? width - 1 - x : x] += sum;
        }
    }
}

template <class SheetT>
void backproject_pass(const TileOps& ops, const Pass<SheetT>& pass, const float* sinogram, int64_t batch, const Shape& shape,
                      int64_t views, double pixel, float* image, float* transposed, int threads) {
    // an odd number of cache lines from line to line: at a power of two all lines would share one cache set
    const ptrdiff_t sum_stride = round_up(pass.width, 16) + 8;
    const int64_t sum_floats = sum_stride * ops.sums_per_position * kTileLines;
    const int64_t pixels = shape.height * shape.width;
    const int64_t tiles = (pass.lines + kTileLines - 1) / kTileLines;
    std::vector<std::vector<float>> sums(static_cast<size_t>(threads));
    for (auto& buffer : sums) buffer.resize(static_cast<size_t>(4 * batch * sum_floats));
    size_t most = 1;
    for (const auto& group : pass.groups) most = std::max(most, group.members.size());
    const int64_t chunk = chunk_width(static_cast<int>(std::min<int64_t>(kMaxMembers, static_cast<int64_t>(most) * batch)));
    run_threads(threads, [&](int thread) {
        const Part mine = part(tiles, thread, threads);
        float* buffer = sums[static_cast<size_t>(thread)].data();
        for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
            std::fill_n(buffer, 4 * batch * sum_floats, 0.0f);
            BackprojectTask task{};
            task.sum_stride = sum_stride;
            task.sums_per_position = ops.sums_per_position;
            task.line = tile * kTileLines;
            task.lines = std::min<int64_t>(kTileLines, pass.lines - task.line);
            task.width = pass.width;
            task.cells = shape.cells;
            task.pixel = pixel;
            for (int64_t begin = 0; begin < pass.width; begin += chunk) {
                task.begin = begin;
                task.end = std::min(pass.width, begin + chunk);
                for (const auto& group : pass.groups) {
                    for_members(group, batch, [&](int64_t first, int count) {
                        task.members = count;
                        for (int m = 0; m < count; ++m) {
                            const int64_t size = static_cast<int64_t>(group.members.size());
                            const int64_t i = (first + m) / size;
                            const Member& member = group.members[static_cast<size_t>((first + m) % size)];
                            task.sums[m] = buffer + (4 * i + member.plane) * sum_floats;
                            task.rows[m] = sinogram + (i * views + member.view) * shape.cells;
                            task.reversed[m] = member.reversed;
                        }
                        call_backproject(ops, group.sheet, task);
                    });
                }
            }
            for (int64_t i = 0; i < batch; ++i)
                for (int plane = 0; plane < 4; ++plane)
                    if (pass.uses[plane])
                        store_tile(buffer + (4 * i + plane) * sum_floats, ops.sums_per_position, sum_stride,
                                   static_cast<Plane>(plane), task.line, task.lines, pass.width, image + i * pixels,
                                   transposed + i * pixels);
        }
    });
}

// image += transposed^T, in blocks that keep both sides in the cache
void merge(const float* transposed, const Shape& shape, float* image, int threads) {
    constexpr int64_t kBlock = 32;
    const int64_t blocks = (shape.height + kBlock - 1) / kBlock;
    run_threads(threads, [&](int thread) {
        const Part mine = part(blocks, thread, threads);
        const int64_t first = mine.begin * kBlock, last = std::min(shape.height, mine.end * kBlock);
        for (int64_t r0 = first; r0 < last; r0 += kBlock)
            for (int64_t c0 = 0; c0 < shape.width; c0 += kBlock)
                for (int64_t r = r0; r < std::min(last, r0 + kBlock); ++r)
                    for (int64_t c = c0; c < std::min(shape.width, c0 + kBlock); ++c)
                        image[r * shape.width + c] += transposed[c * shape.height + r];
    });
}

} // namespace

template <class Beam>
void project(const Beam& beam, const float* image, int64_t batch, const Shape& shape, const double* angles,
             int64_t views, float* sinogram, int threads) {
    check(beam, shape, angles, views);
    const int64_t rows = batch * views;
    std::fill_n(sinogram, rows * shape.cells, 0.0f);
    if (rows * shape.cells == 0 || shape.height * shape.width == 0) return;
    const TileOps& ops = current_ops();
    for (const auto& pass : passes(sheets(beam, shape, angles, views), shape))
        project_pass(ops, pass, image, batch, shape, views, sinogram, threads);
    std::vector<std::vector<float>> scale(static_cast<size_t>(threads));
    for (auto& buffer : scale) buffer.resize(static_cast<size_t>(shape.cells));
    run_threads(threads, [&](int thread) {
        float* step = scale[static_cast<size_t>(thread)].data();
        const Part mine = part(views, thread, threads);
        for (int64_t v = mine.begin; v < mine.end; ++v) {
            steps(beam, angles[v], shape.cells, step);
            for (int64_t b = 0; b < batch; ++b) {
                float* row = sinogram + (b * views + v) * shape.cells;
                for (int64_t k = 0; k < shape.cells; ++k) row[k] *= step[k];
            }
        }
    });
}

template <class Beam>
void backproject(const Beam& beam, const float* sinogram, int64_t batch, const Shape& shape, const double* angles,
                 int64_t views, float* image, int threads) {
    check(beam, shape, angles, views);
    const int64_t pixels = shape.height * shape.width;
    std::fill_n(image, batch * pixels, 0.0f);
    if (batch * views * shape.cells == 0 || pixels == 0) return;
    const TileOps& ops = current_ops();
    const auto all = passes(sheets(beam, shape, angles, views), shape);
    bool columns = false;
    int64_t together = 1;
    for (const auto& pass : all) {
        columns = columns || pass.uses[kColumns] || pass.uses[kColumnsMirrored];
        together = std::max(together, images_together(pass, batch));
    }
    std::vector<float> transposed(columns ? static_cast<size_t>(together * pixels) : 0);
    for (int64_t b = 0; b < batch; b += together) {
        const int64_t images = std::min(together, batch - b);
        std::fill(transposed.begin(), transposed.end(), 0.0f);
        for (const auto& pass : all)
            backproject_pass(ops, pass, sinogram + b * views * shape.cells, images, shape, views, beam.pixel,
                             image + b * pixels, transposed.data(), threads);
        if (!columns) continue;
        for (int64_t i = 0; i < images; ++i)
            merge(transposed.data() + i * pixels, shape, image + (b + i) * pixels, threads);
    }
}

template void project(const Parallel&, const float*, int64_t, const Shape&, const double*, int64_t, float*, int);
template void project(const Fan&, const float*, int64_t, const Shape&, const double*, int64_t, float*, int);
template void backproject(const Parallel&, const float*, int64_t, const Shape&, const double*, int64_t, float*, int);
template void backproject(const Fan&, const float*, int64_t, const Shape&, const double*, int64_t, float*, int);

} // namespace kernels::ct
