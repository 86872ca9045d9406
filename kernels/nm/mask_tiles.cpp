// Masks that are n:m along both axes of a matrix. For m <= 4 all legal tiles are tried. For larger ones: greedy by
// magnitude; then the rows and columns that greed left short are filled; then pairs of rows exchange columns as long as
// the sum of the kept magnitudes grows. See kernels/nm/reference.py, which does the same step by step.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "mask_ops.h"

namespace kernels::nm {
namespace {

constexpr int64_t kFew = 1 << 12; // weights that are not worth waking threads for
constexpr int64_t kAtOnce = 64;   // tiles whose values are looked at together

// Magnitudes of a tile as numbers with finite sums: one infinity more outweighs all finite ones, one NaN all infinities.
// value (r m + c) goes to out[(r m + c) step].
void values_of(const float* weight, int64_t stride, int64_t m, double* out, int64_t step) {
    float largest = 0; // of the finite ones
    bool finite = true;
    for (int64_t r = 0; r < m; ++r)
        for (int64_t c = 0; c < m; ++c) {
            const float x = std::fabs(weight[r * stride + c]);
            const bool usual = magnitude(x) < kInfinity;
            finite &= usual;
            largest = usual && x > largest ? x : largest;
            out[(r * m + c) * step] = x;
        }
    if (finite) return;
    const double more = 2.0 * static_cast<double>(m * m), infinity = largest > 0 ? more * largest : 1.0;
    for (int64_t i = 0; i < m * m; ++i) {
        double& x = out[i * step];
        if (std::isnan(x))
            x = more * infinity;
        else if (std::isinf(x))
            x = infinity;
    }
}

// --- m <= 4: every legal tile

Templates templates_of(int n, int m) {
    Templates t{m, n, 0, 0, {}, {}};
    std::array<int, 6> bits{};
    // in the order of combinations: 01, 02, 03, 12, ...
    for (int a = (1 << m) - 1; a > 0; --a) {
        int reversed = 0, kept = 0;
        for (int c = 0; c < m; ++c)
            if (a >> (m - 1 - c) & 1) {
                reversed |= 1 << c;
                t.columns[t.patterns][kept < 3 ? kept : 2] = static_cast<uint8_t>(c);
                ++kept;
            }
        if (kept == n) bits[t.patterns++] = reversed;
    }
    std::array<uint8_t, 4> rows{};
    int all = 1;
    for (int r = 0; r < m; ++r) all *= t.patterns;
    for (int i = 0; i < all; ++i) {
        std::array<int, 4> sums{};
        for (int r = m - 1, rest = i; r >= 0; --r, rest /= t.patterns) {
            rows[r] = static_cast<uint8_t>(rest % t.patterns);
            for (int c = 0; c < m; ++c) sums[c] += bits[rows[r]] >> c & 1;
        }
        if (std::all_of(sums.begin(), sums.begin() + m, [&](int sum) { return sum == n; }))
            std::copy(rows.begin(), rows.end(), t.rows[t.count++]);
    }
    return t;
}

class Enumeration {
public:
    Enumeration(int64_t n, int64_t m)
        : m_(m), templates_(templates_of(static_cast<int>(n), static_cast<int>(m))), values_(m * m * kAtOnce), best_(kAtOnce) {}

    // The tiles side by side at weight, in rows of `columns`.
    void row_of_tiles(const float* weight, int64_t columns, uint8_t* out) {
        for (int64_t first = 0; first < columns / m_; first += kAtOnce) {
            const int64_t tiles = std::min(kAtOnce, columns / m_ - first);
            const int64_t lanes = (tiles + kTileLanes - 1) / kTileLanes * kTileLanes;
            for (int64_t i = 0; i < tiles; ++i) values_of(weight + (first + i) * m_, columns, m_, values_.data() + i, lanes);
            mask_ops().best_template(templates_, values_.data(), lanes, best_.data());
            for (int64_t i = 0; i < tiles; ++i) put(templates_.rows[best_[i]], columns, out + (first + i) * m_);
        }
    }

private:
    void put(const uint8_t* rows, int64_t columns, uint8_t* out) const {
        for (int64_t r = 0; r < m_; ++r) {
            std::fill_n(out + r * columns, m_, uint8_t{0});
            for (int k = 0; k < templates_.n; ++k) out[r * columns + templates_.columns[rows[r]][k]] = 1;
        }
    }

    const int64_t m_;
    const Templates templates_;
    std::vector<double> values_; // what is left over from earlier tiles, or zero, in the lanes behind the last tile
    std::vector<int64_t> best_;
};

// --- any m

class Greedy {
public:
    Greedy(int64_t n, int64_t m)
        : n_(static_cast<int>(n)), m_(static_cast<int>(m)), values_(m * m), order_(m * m), other_(m * m), rows_(m), in_row_(m),
          in_column_(m), row_changed_(m), pair_seen_(m * m) {}

    void row_of_tiles(const float* weight, int64_t columns, uint8_t* out) {
        for (int64_t first = 0; first < columns; first += m_) {
            values_of(weight + first, columns, m_, values_.data(), 1);
            sort(weight + first, columns);
            take();
            fill_up();
            exchange();
            for (int r = 0; r < m_; ++r)
                for (int c = 0; c < m_; ++c) out[r * columns + first + c] = kept(r, c);
        }
    }

private:
    struct Entry {
        int32_t key;
        int32_t place;
    };

    bool kept(int r, int c) const { return rows_[r] >> c & 1; }
    double value(int r, int c) const { return values_[r * m_ + c]; }

    // By magnitude, the largest first; of equals the first. Eight bits at a time from the lowest, each pass stable.
    void sort(const float* weight, int64_t columns) {
        constexpr int kDigits = 4, kValues = 256;
        int32_t counts[kDigits][kValues] = {};
        for (int r = 0; r < m_; ++r)
            for (int c = 0; c < m_; ++c) {
                const int32_t key = kNaN - magnitude(weight[r * columns + c]); // ascending order of this one
                order_[r * m_ + c] = {key, r * m_ + c};
                for (int d = 0; d < kDigits; ++d) ++counts[d][key >> 8 * d & (kValues - 1)];
            }
        for (int d = 0; d < kDigits; ++d) {
            int32_t start = 0;
            for (int v = 0; v < kValues; ++v) start += std::exchange(counts[d][v], start);
            for (const Entry& entry : order_) other_[counts[d][entry.key >> 8 * d & (kValues - 1)]++] = entry;
            order_.swap(other_);
        }
    }

    void take() {
        std::fill(rows_.begin(), rows_.end(), 0);
        std::fill(in_row_.begin(), in_row_.end(), 0);
        std::fill(in_column_.begin(), in_column_.end(), 0);
        for (const Entry& entry : order_) {
            const int r = entry.place / m_, c = entry.place % m_;
            if (in_row_[r] == n_ || in_column_[c] == n_) continue;
            rows_[r] |= uint64_t{1} << c;
            ++in_row_[r];
            ++in_column_[c];
        }
    }

    // A short row r and a short column c hold each other's place already, or greed would have taken it. So some (s, d) is
    // given up for (r, d) and (s, c). There is one: a row that lacks c is full, and r keeps fewer columns than it.
    void fill_up() {
        for (int r = 0; r < m_; ++r)
            while (in_row_[r] < n_) {
                const int c = static_cast<int>(std::find_if(in_column_.begin(), in_column_.end(), [&](int k) { return k < n_; }) -
                                               in_column_.begin());
                double most = 0;
                int s = -1, d = -1;
                for (int i = 0; i < m_; ++i) {
                    if (kept(i, c)) continue;
                    for (int j = 0; j < m_; ++j) {
                        if (!kept(i, j) || kept(r, j)) continue;
                        const double gain = value(r, j) + value(i, c) - value(i, j);
                        if (s < 0 || gain > most) most = gain, s = i, d = j;
                    }
                }
                rows_[s] ^= uint64_t{1} << d | uint64_t{1} << c;
                rows_[r] |= uint64_t{1} << d;
                ++in_row_[r];
                ++in_column_[c];
            }
    }

    // Sweeps over all pairs of rows until one changes nothing. A pair neither of whose rows has changed since it was looked
    // at need not be looked at again.
    void exchange() {
        std::fill(row_changed_.begin(), row_changed_.end(), 0);
        std::fill(pair_seen_.begin(), pair_seen_.end(), -1);
        int64_t now = 0;
        for (bool changed = true; changed;) {
            changed = false;
            for (int r = 0; r < m_; ++r)
                for (int s = r + 1; s < m_; ++s) {
                    int64_t& seen = pair_seen_[r * m_ + s];
                    if (seen >= std::max(row_changed_[r], row_changed_[s])) continue;
                    while (swap(r, s)) row_changed_[r] = row_changed_[s] = ++now, changed = true;
                    seen = now;
                }
        }
    }

    // Of the columns that only r keeps, the one that it gains least by, for the one of s that it would gain most by. A swap
    // makes the sum larger even before rounding, so that no mask comes back.
    bool swap(int r, int s) {
        int out = -1, in = -1;
        double least = 0, most = 0;
        for (uint64_t left = rows_[r] & ~rows_[s]; left; left &= left - 1) {
            const int c = __builtin_ctzll(left);
            const double more = value(r, c) - value(s, c);
            if (out < 0 || more < least) least = more, out = c;
        }
        for (uint64_t left = rows_[s] & ~rows_[r]; left; left &= left - 1) {
            const int c = __builtin_ctzll(left);
            const double more = value(r, c) - value(s, c);
            if (in < 0 || more > most) most = more, in = c;
        }
        if (in < 0 || !(most > least)) return false;
        const uint64_t both = uint64_t{1} << out | uint64_t{1} << in;
        rows_[r] ^= both;
        rows_[s] ^= both;
        return true;
    }

    const int n_, m_;
    std::vector<double> values_;
    std::vector<Entry> order_, other_;
    std::vector<uint64_t> rows_; // bit c of rows_[r]: whether (r, c) is kept
    std::vector<int> in_row_, in_column_;
    std::vector<int64_t> row_changed_, pair_seen_;
};

template <class Solver>
void solve(const float* weight, const Matrices& size, int64_t n, int64_t m, uint8_t* out, int threads) {
    const int64_t rows = size.batch * (size.rows / m), step = m * size.columns;
    const bool many = threads > 1 && rows * step >= kFew;
#pragma omp parallel num_threads(threads) if (many)
    {
        Solver solver(n, m);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) solver.row_of_tiles(weight + row * step, size.columns, out + row * step);
    }
}

} // namespace

void transposable_mask(const float* weight, const Matrices& size, int64_t n, int64_t m, uint8_t* out, int threads) {
    if (n == 0 || n == m)
        std::memset(out, n > 0, size.batch * size.rows * size.columns);
    else if (m <= 4)
        solve<Enumeration>(weight, size, n, m, out, threads);
    else
        solve<Greedy>(weight, size, n, m, out, threads);
}

} // namespace kernels::nm
