// What is the same on every machine: which tiles meet, who computes them, ragged ends and padding.
//
// A task is a row of tiles of one head. Its queries are transposed once, 64 at a time, and walk along the keys that the
// mask keeps, in runs of at most 64 that lie side by side in memory: blocks that touch are one run, padding ends one, so
// the products never meet a key that does not count. The gradients take the same walk twice, once for each row of tiles
// (dq) and once for each column (dk, dv): nothing is shared between tasks, and any number of threads gives the same bits.
//
// bfloat16 on a processor with tiles (but for the gradients): the present keys and values of some heads are packed into
// tiles, block by block, and then all their queries walk along those.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "../simd/isa.h"
#include "packed.h"
#include "tile.h"

#if defined(KERNELS_X86)
#include <xmmintrin.h>
#endif

namespace kernels::attention {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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

const MatrixOps* matrix_ops() { // null where there are no tiles
    switch (current_isa()) {
#if defined(KERNELS_AMX)
    case Isa::amx: return &amx_matrix_ops();
#endif
    case Isa::emulated_amx: return &emulated_amx_matrix_ops();
    default: return nullptr;
    }
}

// Weights far below one are subnormal numbers, and arithmetic with those is sixty times slower: they count as zero here.
class FlushSubnormals {
#if defined(KERNELS_X86)
public:
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;

private:
    unsigned before_;
#endif
};

uint16_t narrowed(float x) { // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rows [first, first + count) of a head, as floats: where they lie, or widened into `room` [64][depth].
const float* rows_of(const TileOps& ops, Array array, int64_t head, int64_t length, int depth, int64_t first, int count, float* room) {
    const int64_t at = (head * length + first) * depth;
    if (!array.half) return static_cast<const float*>(array.data) + at;
    ops.widen(static_cast<const uint16_t*>(array.data) + at, static_cast<int64_t>(count) * depth, room);
    return room;
}

// Keys that lie side by side, all present; block: that of the mask they belong to.
struct Run {
    int64_t first;
    int count;
    int64_t block;
};

// The present keys of [first, last), in runs of at most 64.
void append_runs(const uint8_t* present, int64_t first, int64_t last, int64_t block, std::vector<Run>& runs) {
    for (int64_t key = first; key < last;) {
        if (present && !present[key]) {
            ++key;
            continue;
        }
        int64_t end = key + 1;
        while (end < last && end - key < kTile && (!present || present[end])) ++end;
        runs.push_back({key, static_cast<int>(end - key), block});
        key = end;
    }
}

struct Row {
    int64_t batch, head, block; // of the problem's query blocks

    int64_t index(const Problem& p) const { return batch * p.heads + head; }
    int64_t key_head(const Problem& p) const { return batch * p.key_heads + head / (p.heads / p.key_heads); }
};

Row row_of(const Problem& p, int64_t task) {
    const int64_t head = task / p.query_blocks();
    return {head / p.heads, head % p.heads, task % p.query_blocks()};
}

// Which of the mask's heads serves this one.
int64_t mask_head(const Mask& mask, int64_t batch, int64_t head) {
    return (mask.batch == 1 ? 0 : batch) * mask.heads + (mask.heads == 1 ? 0 : head);
}

const uint8_t* present_of(const Problem& p, int64_t batch) { return p.present ? p.present + batch * p.keys : nullptr; }

// What a row of tiles attends to; neighbouring blocks are joined, for their border means nothing here.
void runs_of(const Problem& p, const Mask& mask, const Row& row, std::vector<Run>& runs) {
    runs.clear();
    const int64_t at = mask_head(mask, row.batch, row.head) * p.query_blocks() + row.block;
    const int32_t last = mask.starts[at + 1];
    for (int32_t i = mask.starts[at], next; i < last; i = next) {
        next = i + 1;
        while (next < last && mask.columns[next] == mask.columns[next - 1] + 1) ++next;
        append_runs(present_of(p, row.batch), static_cast<int64_t>(mask.columns[i]) * p.block,
                    std::min((mask.columns[next - 1] + int64_t{1}) * p.block, p.keys), mask.columns[i], runs);
    }
}

// All keys, block by block.
void all_runs(const Problem& p, int64_t batch, std::vector<Run>& runs) {
    runs.clear();
    for (int64_t block = 0; block < p.key_blocks(); ++block)
        append_runs(present_of(p, batch), block * p.block, std::min((block + 1) * p.block, p.keys), block, runs);
}

// A thread's buffers (see tile.h), and rows as floats.
struct Scratch {
    explicit Scratch(int depth)
        : query(depth * kTile), gradient(depth * kTile), out(round_up(depth, kStep) * kTile), second(depth * kTile), scores(kTile * kTile),
          slopes(kTile * kTile), keys(depth * kTile), values(depth * kTile), queries(round_up(depth, kStep) * kTile), weights(kTile * kTile) {}
    Buffer query, gradient, out, second, scores, slopes, keys, values;
    Halves queries, weights;
    alignas(64) float maximum[kTile], sum[kTile], factor[kTile], offset[kTile], shift[kTile];
    std::vector<Run> runs;
    std::vector<float> block_sums, block_maxima; // [runs][64]
};

// A thread's right to use tiles, if there are any.
class TileUse {
public:
    explicit TileUse(const MatrixOps* ops) : ops_(ops) {
        if (ops_) ops_->begin();
    }
    ~TileUse() {
        if (ops_) ops_->end();
    }
    TileUse(const TileUse&) = delete;

private:
    const MatrixOps* ops_;
};

struct Range {
    int64_t first, last;
};

// Calls body(scratch, task) for every task, in any order.
template <class Body>
void share(Range tasks, int depth, const MatrixOps* matrix, int threads, Body body) {
#pragma omp parallel num_threads(threads)
    {
        const FlushSubnormals flush;
        const TileUse use(matrix);
        Scratch scratch(depth);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = tasks.first; task < tasks.last; ++task) body(scratch, task);
    }
}

// Queries (or keys) of a tile: [first, first + count)
struct Side {
    int64_t first;
    int count;
};

// The tokens of a block, 64 at a time.
template <class Body>
void for_sides(int64_t block, int block_size, int64_t length, Body body) {
    const int64_t end = std::min((block + 1) * block_size, length);
    for (int64_t first = block * block_size; first < end; first += kTile)
        body(Side{first, static_cast<int>(std::min<int64_t>(kTile, end - first))});
}

// A side of a head along the lanes of a buffer [depth], times a factor.
void load(const TileOps& ops, Array array, int64_t head, int64_t length, int depth, const Side& side, float factor, Buffer& room, Buffer& buffer) {
    const float* rows = rows_of(ops, array, head, length, depth, side.first, side.count, room.data());
    ops.pack(rows, side.count, depth, factor, buffer.data());
}

// And back, each lane times its factor.
void store(const TileOps& ops, Buffer& buffer, const float* factor, ArrayOut array, int64_t head, int64_t length, int depth, const Side& side,
           Buffer& room) {
    const int64_t at = (head * length + side.first) * depth;
    float* rows = array.half ? room.data() : static_cast<float*>(array.data) + at;
    ops.unpack(buffer.data(), side.count, depth, factor, rows);
    if (!array.half) return;
    auto* bits = static_cast<uint16_t*>(array.data) + at;
    for (int64_t i = 0; i < static_cast<int64_t>(side.count) * depth; ++i) bits[i] = narrowed(rows[i]);
}

// Queries, keys and values as they lie in memory; bfloat16 is widened run by run.
struct Plain {
    const TileOps& lanes;
    const MatrixOps* matrix; // none
    const Problem& p;
    Array q, k, v;

    void runs(const Mask* mask, const Row& row, std::vector<Run>& found) const {
        if (mask) runs_of(p, *mask, row, found);
        else all_runs(p, row.batch, found);
    }
    void begin(const Row& row, const Side& side, Scratch& s) const {
        load(lanes, q, row.index(p), p.queries, p.depth, side, p.scale * kLog2E, s.keys, s.query);
    }
    void score(const Row& row, const Run& run, const Side& side, Scratch& s) const {
        const float* keys = rows_of(lanes, k, row.key_head(p), p.keys, p.depth, run.first, run.count, s.keys.data());
        lanes.product(keys, run.count, p.depth, s.query.data(), side.count, s.scores.data());
    }
    void weigh(const Run& run, const Side& side, float* block_sum, Scratch& s) const {
        lanes.weigh(s.scores.data(), run.count, side.count, s.maximum, s.sum, block_sum, s.out.data(), p.depth);
    }
    void accumulate(const Row& row, const Run& run, const Side& side, Scratch& s) const {
        const float* values = rows_of(lanes, v, row.key_head(p), p.keys, p.depth, run.first, run.count, s.values.data());
        lanes.accumulate(values, run.count, p.depth, s.scores.data(), side.count, s.out.data());
    }
    void raise(const Run& run, const Side& side, Scratch& s) const {
        lanes.raise_by_lane(s.scores.data(), run.count, side.count, s.offset, s.sum);
    }
};

// The same in tiles; a run counts in slots.
struct Tiled {
    const TileOps& lanes;
    const MatrixOps* matrix;
    const Problem& p;
    Array q;
    const PackedKeys& packed;

    void runs(const Mask* mask, const Row& row, std::vector<Run>& found) const {
        found.clear();
        if (!mask) {
            for (int64_t block = 0; block < p.key_blocks(); ++block) append(row.batch, block, found);
            return;
        }
        const int64_t at = mask_head(*mask, row.batch, row.head) * p.query_blocks() + row.block;
        for (int32_t i = mask->starts[at]; i < mask->starts[at + 1]; ++i) append(row.batch, mask->columns[i], found);
    }
    void append(int64_t batch, int64_t block, std::vector<Run>& found) const {
        const int count = packed.count(batch, block);
        for (int first = 0; first < count; first += kTile)
            found.push_back({packed.first_slot(block) + first, std::min(count - first, kTile), block});
    }
    void begin(const Row& row, const Side& side, Scratch& s) const {
        const int64_t at = (row.index(p) * p.queries + side.first) * p.depth;
        pack_queries(static_cast<const uint16_t*>(q.data) + at, side.count, p.depth, s.queries);
    }
    void score(const Row& row, const Run& run, const Side& side, Scratch& s) const {
        matrix->product(packed.keys(row.key_head(p), run.first), run.count, packed.depth(), s.queries.data(), side.count, s.scores.data());
    }
    void weigh(const Run& run, const Side& side, float* block_sum, Scratch& s) const {
        matrix->weigh(s.scores.data(), run.count, side.count, p.scale * kLog2E, s.maximum, s.sum, block_sum, s.out.data(), p.depth,
                      s.weights.data());
    }
    void accumulate(const Row& row, const Run& run, const Side& side, Scratch& s) const {
        matrix->accumulate(packed.values(row.key_head(p), run.first), run.count, packed.depth(), s.weights.data(), side.count, s.out.data());
    }
    void raise(const Run& run, const Side& side, Scratch& s) const {
        matrix->raise(s.scores.data(), run.count, side.count, p.scale * kLog2E, s.offset, s.sum);
    }
};

// Calls body(operands, tasks), the tasks being rows of tiles: all at once, or where keys and values (null: keys alone) are
// packed those of as many key heads as their copies have room for.
template <class Body>
void with_operands(const Problem& p, Array q, Array k, const Array* v, int threads, Body body) {
    constexpr int64_t kRoom = 1 << 25; // entries, 64 MiB
    const int64_t heads = p.batch * p.key_heads, rows = p.heads / p.key_heads * p.query_blocks();
    const MatrixOps* matrix = q.half && k.half && (!v || v->half) ? matrix_ops() : nullptr;
    if (!matrix) return body(Plain{tile_ops(), nullptr, p, q, k, v ? *v : Array{}}, Range{0, heads * rows});
    const int64_t head_entries = std::max<int64_t>(1, PackedKeys::entries(p) * (v ? 2 : 1));
    const int64_t at_once = std::max<int64_t>(1, kRoom / head_entries);
    for (int64_t first = 0; first < heads; first += at_once) {
        const int64_t last = std::min(heads, first + at_once);
        const PackedKeys packed(p, first, last, k, v, threads);
        body(Tiled{matrix->lanes, matrix, p, q, packed}, Range{first * rows, last * rows});
    }
}

// Softmax over the runs: out [depth] not yet divided, maxima and sums by lane.
template <class Operands>
void walk(const Operands& o, const Row& row, const Side& side, Scratch& s, bool remember) {
    std::fill(s.maximum, s.maximum + kTile, kNothing);
    std::fill(s.sum, s.sum + kTile, 0.0f);
    s.out.zero();
    o.begin(row, side, s);
    if (remember) {
        s.block_sums.resize(s.runs.size() * kTile);
        s.block_maxima.resize(s.runs.size() * kTile);
    }
    for (size_t i = 0; i < s.runs.size(); ++i) {
        o.score(row, s.runs[i], side, s);
        o.weigh(s.runs[i], side, remember ? s.block_sums.data() + i * kTile : nullptr, s);
        o.accumulate(row, s.runs[i], side, s);
        if (remember) std::copy(s.maximum, s.maximum + kTile, s.block_maxima.begin() + i * kTile);
    }
}

void finish(const TileOps& ops, const Problem& p, const Row& row, const Side& side, Scratch& s, ArrayOut out, float* lse) {
    for (int lane = 0; lane < side.count; ++lane) {
        const bool nothing = s.sum[lane] == 0.0f;
        s.factor[lane] = nothing ? 0.0f : 1.0f / s.sum[lane];
        lse[row.index(p) * p.queries + side.first + lane] =
            nothing ? -kInfinity : static_cast<float>((s.maximum[lane] + std::log2(static_cast<double>(s.sum[lane]))) * kLn2);
    }
    store(ops, s.out, s.factor, out, row.index(p), p.queries, p.depth, side, s.keys);
}

// offset [64] of a tile's lanes in powers of two; +inf for -inf, so that nothing is left of the lane
void offsets(const float* lse, int count, float* out) {
    for (int lane = 0; lane < kTile; ++lane)
        out[lane] = lane >= count || lse[lane] == -kInfinity ? kInfinity : lse[lane] * kLog2E;
}

float* scores_of(const Problem& p, const Row& row, float* scores) {
    return scores + (row.index(p) * p.query_blocks() + row.block) * p.key_blocks();
}

} // namespace

void attention(const Problem& p, const Mask& mask, Array q, Array k, Array v, ArrayOut out, float* lse, int threads) {
    with_operands(p, q, k, &v, threads, [&](const auto& operands, Range tasks) {
        share(tasks, p.depth, operands.matrix, threads, [&](Scratch& s, int64_t task) {
            const Row row = row_of(p, task);
            operands.runs(&mask, row, s.runs);
            for_sides(row.block, p.block, p.queries, [&](const Side& side) {
                walk(operands, row, side, s, false);
                finish(operands.lanes, p, row, side, s, out, lse);
            });
        });
    });
}

void search(const Problem& p, Array q, Array k, Array v, ArrayOut out, float* lse, float* scores, int threads) {
    with_operands(p, q, k, &v, threads, [&](const auto& operands, Range tasks) {
        share(tasks, p.depth, operands.matrix, threads, [&](Scratch& s, int64_t task) {
            const Row row = row_of(p, task);
            float* found = scores_of(p, row, scores);
            std::fill(found, found + p.key_blocks(), 0.0f);
            operands.runs(nullptr, row, s.runs);
            for_sides(row.block, p.block, p.queries, [&](const Side& side) {
                walk(operands, row, side, s, true);
                finish(operands.lanes, p, row, side, s, out, lse);
                // each run's sum was taken at the maximum of its time
                for (int lane = 0; lane < kTile; ++lane) s.offset[lane] = s.maximum[lane] + std::log2(s.sum[lane]);
                for (size_t i = 0; i < s.runs.size(); ++i) {
                    float* at = s.block_maxima.data() + i * kTile;
                    operands.lanes.raise(at, s.offset);
                    found[s.runs[i].block] += std::inner_product(at, at + side.count, s.block_sums.begin() + i * kTile, 0.0f);
                }
            });
        });
    });
}

void block_scores(const Problem& p, Array q, Array k, const float* lse, float* scores, int threads) {
    with_operands(p, q, k, nullptr, threads, [&](const auto& operands, Range tasks) {
        share(tasks, p.depth, operands.matrix, threads, [&](Scratch& s, int64_t task) {
            const Row row = row_of(p, task);
            float* found = scores_of(p, row, scores);
            std::fill(found, found + p.key_blocks(), 0.0f);
            operands.runs(nullptr, row, s.runs);
            for_sides(row.block, p.block, p.queries, [&](const Side& side) {
                operands.begin(row, side, s);
                offsets(lse + row.index(p) * p.queries + side.first, side.count, s.offset);
                for (const Run& run : s.runs) {
                    operands.score(row, run, side, s);
                    operands.raise(run, side, s);
                    found[run.block] += std::accumulate(s.sum, s.sum + side.count, 0.0f);
                }
            });
        });
    });
}

namespace {

// The mask by columns: rows[starts[head key_blocks + c]] and on are the query blocks of a mask's head that keep column c.
struct Columns {
    std::vector<int64_t> starts;
    std::vector<int32_t> rows;
};

Columns columns_of(const Problem& p, const Mask& mask) {
    const int64_t heads = mask.batch * mask.heads, blocks = p.query_blocks(), width = p.key_blocks();
    Columns found{std::vector<int64_t>(heads * width + 1), std::vector<int32_t>(mask.starts[heads * blocks])};
    for (int64_t row = 0; row < heads * blocks; ++row)
        for (int32_t i = mask.starts[row]; i < mask.starts[row + 1]; ++i) ++found.starts[row / blocks * width + mask.columns[i] + 1];
    std::partial_sum(found.starts.begin(), found.starts.end(), found.starts.begin());
    std::vector<int64_t> next(found.starts.begin(), found.starts.end() - 1);
    for (int64_t row = 0; row < heads * blocks; ++row)
        for (int32_t i = mask.starts[row]; i < mask.starts[row + 1]; ++i)
            found.rows[next[row / blocks * width + mask.columns[i]]++] = static_cast<int32_t>(row % blocks);
    return found;
}

// What the gradients are made of.
struct Given {
    Array d_out;
    const float* shift;
    Array q, k, v;
    const float* lse;
};

// dq of a tile: queries along the lanes.
void query_gradient(const TileOps& ops, const Problem& p, const Row& row, const Side& side, const Given& g, Scratch& s, ArrayOut dq) {
    const int64_t at = row.index(p) * p.queries + side.first;
    load(ops, g.q, row.index(p), p.queries, p.depth, side, p.scale * kLog2E, s.keys, s.query);
    load(ops, g.d_out, row.index(p), p.queries, p.depth, side, 1.0f, s.keys, s.gradient);
    offsets(g.lse + at, side.count, s.offset);
    for (int lane = 0; lane < kTile; ++lane) s.shift[lane] = lane < side.count ? g.shift[at + lane] : 0.0f;
    std::fill(s.out.data(), s.out.data() + p.depth * kTile, 0.0f);
    for (const Run& run : s.runs) {
        const float* keys = rows_of(ops, g.k, row.key_head(p), p.keys, p.depth, run.first, run.count, s.keys.data());
        const float* values = rows_of(ops, g.v, row.key_head(p), p.keys, p.depth, run.first, run.count, s.values.data());
        ops.product(keys, run.count, p.depth, s.query.data(), side.count, s.scores.data());
        ops.raise_by_lane(s.scores.data(), run.count, side.count, s.offset, nullptr);
        ops.product(values, run.count, p.depth, s.gradient.data(), side.count, s.slopes.data());
        ops.slope_by_lane(s.slopes.data(), s.scores.data(), run.count, side.count, s.shift);
        ops.accumulate(keys, run.count, p.depth, s.slopes.data(), side.count, s.out.data());
    }
    std::fill(s.factor, s.factor + kTile, p.scale);
    store(ops, s.out, s.factor, dq, row.index(p), p.queries, p.depth, side, s.keys);
}

// Adds to a tile's dk and dv, keys along the lanes, what the queries of one block have to say.
void add_queries(const TileOps& ops, const Problem& p, int64_t head, int64_t block, const Side& side, const Given& g, Scratch& s) {
    for_sides(block, p.block, p.queries, [&](const Side& from) {
        const int64_t at = head * p.queries + from.first;
        const float* queries = rows_of(ops, g.q, head, p.queries, p.depth, from.first, from.count, s.keys.data());
        const float* d_out = rows_of(ops, g.d_out, head, p.queries, p.depth, from.first, from.count, s.values.data());
        offsets(g.lse + at, from.count, s.offset);
        ops.product(queries, from.count, p.depth, s.query.data(), side.count, s.scores.data());
        ops.raise_by_row(s.scores.data(), from.count, side.count, s.offset);
        ops.accumulate(d_out, from.count, p.depth, s.scores.data(), side.count, s.second.data());
        ops.product(d_out, from.count, p.depth, s.gradient.data(), side.count, s.slopes.data());
        ops.slope_by_row(s.slopes.data(), s.scores.data(), from.count, side.count, g.shift + at);
        ops.accumulate(queries, from.count, p.depth, s.slopes.data(), side.count, s.out.data());
    });
}

// dk and dv of a tile: keys along the lanes, `head` the keys' own.
void key_gradients(const TileOps& ops, const Problem& p, const Mask& mask, const Columns& columns, int64_t batch, int64_t head, int64_t block,
                   const Side& side, const Given& g, Scratch& s, ArrayOut dk, ArrayOut dv) {
    const int64_t at = batch * p.key_heads + head, group = p.heads / p.key_heads;
    load(ops, g.k, at, p.keys, p.depth, side, p.scale * kLog2E, s.keys, s.query);
    load(ops, g.v, at, p.keys, p.depth, side, 1.0f, s.keys, s.gradient);
    std::fill(s.out.data(), s.out.data() + p.depth * kTile, 0.0f);
    std::fill(s.second.data(), s.second.data() + p.depth * kTile, 0.0f);
    for (int64_t query_head = head * group; query_head < (head + 1) * group; ++query_head) {
        const int64_t column = mask_head(mask, batch, query_head) * p.key_blocks() + block;
        for (int64_t i = columns.starts[column]; i < columns.starts[column + 1]; ++i)
            add_queries(ops, p, batch * p.heads + query_head, columns.rows[i], side, g, s);
    }
    const uint8_t* present = present_of(p, batch);
    for (int lane = 0; lane < side.count; ++lane) s.factor[lane] = !present || present[side.first + lane] ? 1.0f : 0.0f;
    store(ops, s.second, s.factor, dv, at, p.keys, p.depth, side, s.keys);
    for (int lane = 0; lane < side.count; ++lane) s.factor[lane] *= p.scale;
    store(ops, s.out, s.factor, dk, at, p.keys, p.depth, side, s.keys);
}

} // namespace

void gradients(const Problem& p, const Mask& mask, Array d_out, const float* shift, Array q, Array k, Array v, const float* lse, ArrayOut dq,
               ArrayOut dk, ArrayOut dv, int threads) {
    const TileOps& ops = tile_ops();
    const Given g{d_out, shift, q, k, v, lse};
    share({0, p.batch * p.heads * p.query_blocks()}, p.depth, nullptr, threads, [&](Scratch& s, int64_t task) {
        const Row row = row_of(p, task);
        runs_of(p, mask, row, s.runs);
        for_sides(row.block, p.block, p.queries, [&](const Side& side) { query_gradient(ops, p, row, side, g, s, dq); });
    });
    const Columns columns = columns_of(p, mask);
    share({0, p.batch * p.key_heads * p.key_blocks()}, p.depth, nullptr, threads, [&](Scratch& s, int64_t task) {
        const int64_t block = task % p.key_blocks(), head = task / p.key_blocks();
        for_sides(block, p.block, p.keys, [&](const Side& side) {
            key_gradients(ops, p, mask, columns, head / p.key_heads, head % p.key_heads, block, side, g, s, dk, dv);
        });
    });
}

} // namespace kernels::attention
