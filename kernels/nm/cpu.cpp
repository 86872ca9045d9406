// What is the same on every machine: which tokens, rows and columns go together, and who computes them.
//
// Few tokens: blocks of sixteen rows are dealt to the threads, each reads its part of the weight once for every kFew
// tokens. Many tokens: they are cut into chunks of `vectors` vectors. A task is a chunk and a range of rows: panel by
// panel the chunk's inputs are transposed into the first-level cache, meet the weights of that panel, and add to outputs
// that lie transposed in the second-level cache until they are done.
//
// Many tokens in bfloat16 on a processor with tiles: a task is 32 rows and a chunk of tokens. Panel by panel the rows are
// spread out into the first-level cache and meet all tokens of the chunk.
#include "cpu.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../simd/isa.h"
#include "../simd/lines.h"

namespace kernels::nm {
namespace {

constexpr int64_t kSmall = 1 << 16; // multiplications that are not worth waking threads for

const RowOps& row_ops() {
    switch (current_lanes()) {
#if defined(KERNELS_X86)
    case Isa::avx2: return avx2_row_ops();
    case Isa::avx512: return avx512_row_ops();
#endif
    case Isa::emulated512: return emulated512_row_ops();
    default: return portable_row_ops();
    }
}

const MatrixOps* matrix_ops() { // null where there are no tiles
    switch (current_isa()) {
#if defined(KERNELS_AMX)
    case Isa::amx: return &amx_matrix_ops();
#endif
    case Isa::emulated_amx: return &emulated_amx_matrix_ops();
    default: return nullptr;
    }
}

int worth(int threads, int64_t work) { return work < kSmall ? 1 : threads; }

struct Range {
    int64_t first, last;
};

Range part_of(int64_t total, int64_t parts, int64_t part) {
    return {total * part / parts, total * (part + 1) / parts};
}

// Tokens that are computed together: `vectors` vectors, of which the first `count` lanes hold tokens.
struct Chunk {
    int64_t first, count;
    int vectors;
};

// The widest chunks that leave room in a panel for enough kept weights to pay for reading and writing their sums.
std::vector<Chunk> chunks_of(int64_t tokens, int64_t lanes) {
    std::vector<Chunk> chunks;
    for (int64_t first = 0; first < tokens;) {
        int vectors = kMostVectors;
        while (vectors > 1 && (vectors / 2) * lanes >= tokens - first) vectors /= 2;
        // three quarters empty lanes are dearer than another, narrower chunk
        while (vectors > 1 && vectors * lanes > tokens - first + vectors * lanes / 4) vectors /= 2;
        const int64_t count = std::min<int64_t>(tokens - first, vectors * lanes);
        chunks.push_back({first, count, vectors});
        first += count;
    }
    return chunks;
}

// Floats of a panel: three quarters of a first-level cache of 32 KiB where weights are many; more where they are
// few, so that reading and writing a row's sums pays.
int64_t panel_floats(const Packed& w) { return (8 * w.n > w.m ? 6 : 8) * 1024; }

// Up to as many tokens are taken a few at a time: with more, laying them along the lanes pays, sooner where weights are few.
int64_t few_tokens(const Packed& w) { return 8 * w.n >= w.m ? 16 : 8; }

// Tasks are chunks, cut into ranges of rows if there would be too few to keep all threads busy to the end.
int64_t parts_for(int64_t chunks, int threads) { return chunks % threads ? threads : 1; }

// [columns][width] of the chunk's tokens in x, which has `stride` floats a token; lanes without a token hold zeros.
void panel_of(const RowOps& ops, const float* x, int64_t stride, const Chunk& chunk, Range columns, float* panel) {
    const int64_t width = chunk.vectors * ops.lanes, size = columns.last - columns.first;
    if (chunk.count < width)
        for (int64_t column = 0; column < size; ++column)
            std::fill(panel + column * width + chunk.count, panel + (column + 1) * width, 0.0f);
    ops.transpose(x + chunk.first * stride + columns.first, stride, chunk.count, size, panel, width);
}

void few_forward(const RowOps& ops, const Packed& w, const float* x, int64_t tokens, const float* bias, float* y,
                 int threads) {
    Buffer inputs(tokens * w.columns() + kSlack);
    std::copy(x, x + tokens * w.columns(), inputs.data());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < w.blocks(); ++block) {
        float out[kFew * kBlock];
        const int64_t row = block * kBlock, count = std::min(kBlock, w.rows - row);
        for (int64_t token = 0; token < tokens; token += kFew) {
            const int taken = static_cast<int>(std::min<int64_t>(kFew, tokens - token));
            ops.few(w, block, inputs.data() + token * w.columns(), w.columns(), taken, out);
            for (int t = 0; t < taken; ++t)
                for (int64_t i = 0; i < count; ++i)
                    y[(token + t) * w.rows + row + i] = out[t * kBlock + i] + (bias ? bias[row + i] : 0.0f);
        }
    }
}

void many_forward(const RowOps& ops, const Packed& w, const float* x, int64_t tokens, const float* bias, float* y,
                  int threads) {
    const std::vector<Chunk> chunks = chunks_of(tokens, ops.lanes);
    const int64_t parts = parts_for(chunks.size(), threads), tasks = chunks.size() * parts;
#pragma omp parallel num_threads(threads)
    {
        Buffer panel, sums;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const Chunk& chunk = chunks[task / parts];
            const Range blocks = part_of(w.blocks(), parts, task % parts);
            const int64_t width = chunk.vectors * ops.lanes, count = (blocks.last - blocks.first) * kBlock;
            const int64_t groups = std::max<int64_t>(1, panel_floats(w) / width / w.m);
            panel.resize(groups * w.m * width);
            sums.resize(count * width);
            sums.zero();
            for (int64_t first = 0; first < w.groups; first += groups) {
                const int64_t last = std::min(w.groups, first + groups);
                panel_of(ops, x, w.columns(), chunk, {first * w.m, last * w.m}, panel.data());
                for (int64_t block = blocks.first; block < blocks.last; ++block)
                    ops.many(w, block, first, last, panel.data(), chunk.vectors,
                             sums.data() + (block - blocks.first) * kBlock * width);
            }
            const int64_t row = blocks.first * kBlock, rows = std::min(w.rows - row, count);
            if (bias)
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t t = 0; t < width; ++t) sums.data()[i * width + t] += bias[row + i];
            if (rows > 0) ops.transpose(sums.data(), width, rows, chunk.count, y + chunk.first * w.rows + row, w.rows);
        }
    }
}

constexpr int64_t kTile = kBlock * kSide; // entries of a tile
constexpr int64_t kPanelColumns = 512;     // 32 rows of so many are 32 KiB
constexpr int64_t kChunk = 1024;           // tokens: their sums with 32 rows are 128 KiB
constexpr int kMostSlots = 16;             // of a group

// [ceil(tokens / 16)][steps][16][32] of x [tokens][columns], with zeros behind its ends; an even number of sixteens.
Halves tiles_of(const uint16_t* x, int64_t tokens, int64_t columns, int64_t steps, int threads) {
    const int64_t sides = (tokens + kSide - 1) / kSide;
    Halves tiles(sides * 2 * steps * kTile);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < tokens; ++token) {
        uint16_t* to = tiles.data() + token / kBlock * steps * kTile + token % kBlock * kSide;
        for (int64_t column = 0; column < columns; column += kSide, to += kTile)
            std::copy_n(x + token * columns + column, std::min(kSide, columns - column), to);
    }
    return tiles;
}

// A thread's right to use tiles.
class TileUse {
public:
    explicit TileUse(const MatrixOps& ops) : ops_(ops) { ops_.begin(); }
    ~TileUse() { ops_.end(); }
    TileUse(const TileUse&) = delete;

private:
    const MatrixOps& ops_;
};

// Two blocks of rows from `block` on, with a chunk of the tokens.
void half_task(const MatrixOps& ops, const Packed& w, int64_t block, const uint16_t* x, int64_t steps, int64_t tokens, const float* bias,
               uint16_t* y, Halves& panel, Buffer& sums) {
    const int64_t unit = kSide / std::gcd<int64_t>(kSide, w.m); // groups that fill whole steps
    const int64_t groups = std::max<int64_t>(1, kPanelColumns / w.m / unit) * unit;
    const int64_t stride = groups * w.m * kBlock, sides = (tokens + kSide - 1) / kSide;
    const int64_t rows = std::min(kSide, w.rows - block * kBlock);
    panel.resize(2 * stride);
    panel.zero(); // there may be no second block
    sums.resize(sides * kSide * kSide);
    for (int64_t first = 0; first < w.groups; first += groups) {
        const int64_t last = std::min(w.groups, first + groups);
        const int64_t from = first * w.m / kSide, taken = std::min(groups * w.m / kSide, steps - from);
        for (int64_t i = 0; i < 2 && block + i < w.blocks(); ++i) ops.spread(w, block + i, first, last, taken, panel.data() + i * stride);
        for (int64_t side = 0; side < sides; ++side)
            ops.multiply(x + (side * 2 * steps + from) * kTile, steps * kTile, panel.data(), stride, taken, first == 0,
                         sums.data() + side * kSide * kSide);
    }
    float added[kSide] = {};
    if (bias) std::copy_n(bias + block * kBlock, rows, added);
    for (int64_t token = 0; token < tokens; token += kSide)
        ops.finish(sums.data() + token * kSide, added, static_cast<int>(std::min(kSide, tokens - token)), static_cast<int>(rows),
                   y + token * w.rows + block * kBlock, w.rows);
}

// The kept weights by column, for panels of `panel_blocks` blocks.
struct ByColumn {
    int64_t panels, panel_blocks, columns;
    std::vector<Entry> entries;
    std::vector<int64_t> starts;

    const int64_t* starts_of(int64_t panel) const { return starts.data() + panel * (columns + 1); }
};

// Calls use(row, column, value) for each kept weight of a block, row counting within the block; zeros that fill up a
// group count too.
template <class Use>
void each_kept(const Packed& w, int64_t block, Use use) {
    const uint8_t* place = w.places + block * w.slots() * w.place_bytes();
    const auto* halves = static_cast<const uint16_t*>(w.values) + block * w.slots() * kBlock;
    const auto* floats = static_cast<const float*>(w.values) + block * w.slots() * kBlock;
    const bool nibbles = w.m <= kNibbles;
    for (int64_t group = 0; group < w.groups; ++group)
        for (int slot = 0; slot < w.n; ++slot, place += w.place_bytes(), halves += kBlock, floats += kBlock)
            for (int row = 0; row < kBlock; ++row) {
                const int at = nibbles ? (place[row & 7] >> (row < 8 ? 0 : 4)) & 15 : place[row];
                float value;
                if (w.half) {
                    const uint32_t bits = static_cast<uint32_t>(halves[row]) << 16;
                    std::memcpy(&value, &bits, sizeof value);
                } else {
                    value = floats[row];
                }
                use(row, group * w.m + at, value);
            }
}

ByColumn by_column(const Packed& w, int64_t panel_blocks, int threads) {
    ByColumn out{(w.blocks() + panel_blocks - 1) / panel_blocks, panel_blocks, w.columns(), {}, {}};
    out.entries.resize(w.blocks() * kBlock * w.slots());
    out.starts.assign(out.panels * (out.columns + 1), 0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < out.panels; ++panel) {
        const Range blocks{panel * panel_blocks, std::min(w.blocks(), (panel + 1) * panel_blocks)};
        int64_t* starts = out.starts.data() + panel * (out.columns + 1);
        for (int64_t block = blocks.first; block < blocks.last; ++block)
            each_kept(w, block, [&](int, int64_t column, float) { ++starts[column + 1]; });
        starts[0] = blocks.first * kBlock * w.slots();
        for (int64_t column = 0; column < out.columns; ++column) starts[column + 1] += starts[column];
        std::vector<int64_t> next(starts, starts + out.columns);
        for (int64_t block = blocks.first; block < blocks.last; ++block)
            each_kept(w, block, [&](int row, int64_t column, float value) {
                const int64_t at = (block - blocks.first) * kBlock + row;
                out.entries[next[column]++] = {value, static_cast<uint32_t>(at)};
            });
    }
    return out;
}

} // namespace

template <class Value>
bool pack(const Value* weight, const uint8_t* kept, const Packed& out, int threads) {
    auto* values = static_cast<Value*>(const_cast<void*>(out.values));
    auto* places = const_cast<uint8_t*>(out.places);
    const bool nibbles = out.m <= kNibbles;
    const int64_t columns = out.columns(), bytes = out.place_bytes();
    bool fits = true;
#pragma omp parallel for num_threads(worth(threads, out.rows * columns)) schedule(static) reduction(&& : fits)
    for (int64_t block = 0; block < out.blocks(); ++block) {
        Value* value = values + block * out.slots() * kBlock;
        uint8_t* place = places + block * out.slots() * bytes;
        std::fill(value, value + out.slots() * kBlock, Value{});
        std::fill(place, place + out.slots() * bytes, uint8_t{});
        const int64_t rows = std::min(kBlock, out.rows - block * kBlock);
        for (int64_t group = 0; group < out.groups; ++group, value += out.n * kBlock, place += out.n * bytes)
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t start = (block * kBlock + row) * columns + group * out.m;
                int slot = 0, last = 0;
                const auto put = [&](int at) {
                    uint8_t& byte = place[slot * bytes + (nibbles ? row & 7 : row)];
                    byte = static_cast<uint8_t>(byte | at << (nibbles && row >= 8 ? 4 : 0));
                };
                for (int at = 0; at < out.m; ++at) {
                    if (!kept[start + at]) continue;
                    if (slot == out.n) {
                        fits = false;
                        break;
                    }
                    value[slot * kBlock + row] = weight[start + at];
                    put(last = at);
                    ++slot;
                }
                for (; slot < out.n; ++slot) put(last);
            }
    }
    return fits;
}

template <class Value>
void unpack(const Packed& w, Value* weight, int threads) {
    const auto* values = static_cast<const Value*>(w.values);
    const bool nibbles = w.m <= kNibbles;
    const int64_t columns = w.columns(), bytes = w.place_bytes();
#pragma omp parallel for num_threads(worth(threads, w.rows * columns)) schedule(static)
    for (int64_t block = 0; block < w.blocks(); ++block) {
        const Value* value = values + block * w.slots() * kBlock;
        const uint8_t* place = w.places + block * w.slots() * bytes;
        const int64_t rows = std::min(kBlock, w.rows - block * kBlock);
        std::fill(weight + block * kBlock * columns, weight + (block * kBlock + rows) * columns, Value{});
        for (int64_t group = 0; group < w.groups; ++group)
            for (int slot = 0; slot < w.n; ++slot, value += kBlock, place += bytes)
                for (int64_t row = 0; row < rows; ++row) {
                    const int at = nibbles ? (place[row & 7] >> (row < 8 ? 0 : 4)) & 15 : place[row];
                    if (value[row] != Value{}) weight[(block * kBlock + row) * columns + group * w.m + at] = value[row];
                }
    }
}

template bool pack(const float*, const uint8_t*, const Packed&, int);
template bool pack(const uint16_t*, const uint8_t*, const Packed&, int);
template void unpack(const Packed&, float*, int);
template void unpack(const Packed&, uint16_t*, int);

void forward(const Packed& w, const float* x, int64_t tokens, const float* bias, float* y, int threads) {
    threads = worth(threads, tokens * w.rows * w.slots());
    if (tokens <= few_tokens(w)) few_forward(row_ops(), w, x, tokens, bias, y, threads);
    else many_forward(row_ops(), w, x, tokens, bias, y, threads);
}

// Tiles multiply 512 pairs a cycle at best, float32 vectors 32 and only what is kept: below 1 in 16 the tiles lose, and
// half of that margin goes into loads. Many slots in a group take longer to spread out than the products of few tokens.
bool takes_half(int n, int m, int64_t tokens) { return matrix_ops() && tokens >= kBlock && 8 * n >= m && n <= kMostSlots; }

void forward(const Packed& w, const uint16_t* x, int64_t tokens, const float* bias, uint16_t* y, int threads) {
    const MatrixOps& ops = *matrix_ops();
    threads = worth(threads, tokens * w.rows * w.slots());
    const int64_t steps = (w.columns() + kSide - 1) / kSide, pairs = (w.blocks() + 1) / 2;
    const int64_t tasks = pairs * ((tokens + kChunk - 1) / kChunk);
    Halves inputs = tiles_of(x, tokens, w.columns(), steps, threads);
#pragma omp parallel num_threads(threads)
    {
        const TileUse use(ops);
        Halves panel;
        Buffer sums;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t token = task / pairs * kChunk;
            half_task(ops, w, task % pairs * 2, inputs.data() + token * steps * kSide, steps, std::min(kChunk, tokens - token), bias,
                      y + token * w.rows, panel, sums);
        }
    }
}

void input_gradient(const Packed& w, const float* dy, int64_t tokens, float* dx, int threads) {
    const RowOps& ops = row_ops();
    threads = worth(threads, tokens * w.rows * w.slots());
    const std::vector<Chunk> chunks = chunks_of(tokens, ops.lanes);
    if (chunks.empty()) return;
    const int64_t panel_blocks = std::max<int64_t>(1, panel_floats(w) / (chunks[0].vectors * ops.lanes) / kBlock);
    const ByColumn lists = by_column(w, panel_blocks, threads);
    const int64_t parts = parts_for(chunks.size(), threads), tasks = chunks.size() * parts;
#pragma omp parallel num_threads(threads)
    {
        Buffer panel, sums;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const Chunk& chunk = chunks[task / parts];
            const Range columns = part_of(w.columns(), parts, task % parts);
            const int64_t width = chunk.vectors * ops.lanes, count = columns.last - columns.first;
            panel.resize(panel_blocks * kBlock * width);
            sums.resize(count * width);
            sums.zero();
            for (int64_t p = 0; p < lists.panels; ++p) {
                const int64_t first = p * panel_blocks * kBlock, last = std::min(w.rows, first + panel_blocks * kBlock);
                panel_of(ops, dy, w.rows, chunk, {first, last}, panel.data());
                // rows behind the last one hold zeros, which meet whatever the panel holds there: finite, please
                std::fill(panel.data() + (last - first) * width, panel.data() + panel_blocks * kBlock * width, 0.0f);
                ops.listed(lists.entries.data(), lists.starts_of(p) + columns.first, count, panel.data(), chunk.vectors,
                           sums.data());
            }
            ops.transpose(sums.data(), width, count, chunk.count, dx + chunk.first * w.columns() + columns.first, w.columns());
        }
    }
}

void weight_gradient(const Packed& w, const float* dy, const float* x, int64_t tokens, float* out, int threads) {
    const RowOps& ops = row_ops();
    threads = worth(threads, tokens * w.rows * w.slots());
    std::fill(out, out + w.blocks() * w.slots() * kBlock, 0.0f);
    Buffer inputs;
    for (const Chunk& chunk : chunks_of(tokens, ops.lanes)) {
        const int64_t width = chunk.vectors * ops.lanes;
        const int64_t groups = std::max<int64_t>(1, panel_floats(w) / width / w.m);
        inputs.resize(w.columns() * width);
#pragma omp parallel num_threads(threads)
        {
            Buffer slopes;
#pragma omp for schedule(static)
            for (int64_t group = 0; group < w.groups; ++group)
                panel_of(ops, x, w.columns(), chunk, {group * w.m, (group + 1) * w.m}, inputs.data() + group * w.m * width);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < w.blocks(); ++block) {
                const Range rows{block * kBlock, std::min(w.rows, (block + 1) * kBlock)};
                slopes.resize(kBlock * width);
                slopes.zero();
                panel_of(ops, dy, w.rows, chunk, rows, slopes.data());
                for (int64_t first = 0; first < w.groups; first += groups)
                    ops.sampled(w, block, first, std::min(w.groups, first + groups), slopes.data(),
                                inputs.data() + first * w.m * width, chunk.vectors,
                                out + (block * w.slots() + first * w.n) * kBlock);
            }
        }
    }
}

} // namespace kernels::nm
