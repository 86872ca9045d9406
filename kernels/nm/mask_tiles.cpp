// Masks that are n:m along both axes of a matrix, tile by tile. For m <= 4 all legal tiles are tried. A larger tile begins
// greedily, by magnitude; the rows and columns that greed leaves short are filled; then rows pass columns on to each other
// in circles as long as the sum of the kept magnitudes grows. When no circle is left, the sum is the largest there is: the
// condition is that of minimum-cost flow (Klein 1967), with rows and columns as sources and sinks.
// kernels/nm/reference.py does the same, step by step.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "mask_ops.h"

namespace kernels::nm {
namespace {

constexpr int64_t kFew = 1 << 12; // weights that are not worth waking threads for
constexpr int64_t kAtOnce = 64;   // tiles whose values are looked at together

// e with 2^(e-1) <= x < 2^e, for normal numbers; 2^e. (frexp and ldexp are calls, and this is done for each tile.)
int exponent_of(double x) {
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<int>(bits >> 52) - 1022;
}

double power_of_2(int e) {
    const int64_t bits = int64_t{e + 1023} << 52;
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Magnitudes of a tile as whole numbers up to 2^45: the largest of them is just below that, and sums of them are exact. One
// infinity outweighs all that is finite, one NaN all infinities. The value at (r, c) goes to out[(r m + c) step].
void values_of(const float* weight, int64_t stride, int64_t m, double* out, int64_t step) {
    constexpr int kBits = 45;
    constexpr double kRound = 4503599627370496.0; // 2^52: what is added to it loses its fraction, half to even
    int32_t largest = 0, top = 0; // of the finite ones, of all
    for (int64_t r = 0; r < m; ++r)
        for (int64_t c = 0; c < m; ++c) {
            const int32_t key = magnitude(weight[r * stride + c]);
            largest = std::max(largest, key < kInfinity ? key : 0);
            top = std::max(top, key);
        }
    const double more = 2.0 * static_cast<double>(m * m);
    const int above = top < kInfinity ? 0 : exponent_of(top == kNaN ? more * more : more);
    float x;
    std::memcpy(&x, &largest, sizeof x);
    const double unit = power_of_2(kBits - above), scale = power_of_2(kBits - above - (largest ? exponent_of(x) : 0));
    for (int64_t r = 0; r < m; ++r)
        for (int64_t c = 0; c < m; ++c)
            out[(r * m + c) * step] = static_cast<double>(std::fabs(weight[r * stride + c])) * scale + kRound - kRound;
    if (top < kInfinity) return;
    for (int64_t i = 0; i < m * m; ++i) {
        const int32_t key = magnitude(weight[i / m * stride + i % m]);
        if (key >= kInfinity) out[i * step] = key == kNaN ? more * more * unit : more * unit;
    }
}

// --- m <= 4: every legal tile

Templates templates_of(int n, int m) {
    Templates t{m, n, 0, 0, {}, {}};
    std::array<int, 6> bits{}; // of a pattern, column 0 the highest: 01, 02, 03, 12, ... is then descending
    for (int pattern = (1 << m) - 1; pattern > 0; --pattern) {
        if (__builtin_popcount(pattern) != n) continue;
        for (int c = 0, k = 0; c < m; ++c)
            if (pattern >> (m - 1 - c) & 1) t.columns[t.patterns][k++] = static_cast<uint8_t>(c);
        bits[t.patterns++] = pattern;
    }
    int choices = 1;
    for (int r = 0; r < m; ++r) choices *= t.patterns;
    for (int choice = 0; choice < choices; ++choice) {
        std::array<uint8_t, 4> rows{};
        std::array<int, 4> sums{};
        for (int r = m - 1, rest = choice; r >= 0; --r, rest /= t.patterns) {
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

    // The tiles side by side in m rows of `columns` weights.
    void row_of_tiles(const float* weight, int64_t columns, uint8_t* out) {
        for (int64_t first = 0; first < columns / m_; first += kAtOnce) {
            const int64_t tiles = std::min(kAtOnce, columns / m_ - first);
            const int64_t lanes = (tiles + kTileLanes - 1) / kTileLanes * kTileLanes; // those behind the last tile hold anything
            for (int64_t i = 0; i < tiles; ++i) values_of(weight + (first + i) * m_, columns, m_, values_.data() + i, lanes);
            mask_ops().best_template(templates_, values_.data(), lanes, best_.data());
            for (int64_t i = 0; i < tiles; ++i) write(templates_.rows[best_[i]], columns, out + (first + i) * m_);
        }
    }

private:
    void write(const uint8_t* patterns, int64_t columns, uint8_t* out) const {
        for (int64_t r = 0; r < m_; ++r, out += columns) {
            std::fill_n(out, m_, uint8_t{0});
            for (int k = 0; k < templates_.n; ++k) out[templates_.columns[patterns[r]][k]] = 1;
        }
    }

    const int64_t m_;
    const Templates templates_;
    std::vector<double> values_;
    std::vector<int64_t> best_;
};

// --- any m

class Flow {
public:
    Flow(int64_t n, int64_t m)
        : n_(static_cast<int>(n)), m_(static_cast<int>(m)), values_(m * m), order_(m * m), other_(m * m), rows_(m), in_row_(m),
          in_column_(m), gain_(m * m), column_(m * m), reach_(m), before_(m), visited_(m) {}

    void row_of_tiles(const float* weight, int64_t columns, uint8_t* out) {
        for (int64_t first = 0; first < columns; first += m_) {
            values_of(weight + first, columns, m_, values_.data(), 1);
            sort(weight + first, columns);
            take();
            fill_up();
            for (int r = 0; r < m_; ++r)
                for (int s = 0; s < m_; ++s) find_gain(r, s);
            while (circle()) {
            }
            for (int r = 0; r < m_; ++r)
                for (int c = 0; c < m_; ++c) out[r * columns + first + c] = kept(r, c);
        }
    }

private:
    struct Entry {
        int32_t key;
        int16_t row, column;
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
                order_[r * m_ + c] = {key, static_cast<int16_t>(r), static_cast<int16_t>(c)};
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
            const int r = entry.row, c = entry.column;
            if (in_row_[r] == n_ || in_column_[c] == n_) continue;
            rows_[r] |= uint64_t{1} << c;
            ++in_row_[r];
            ++in_column_[c];
        }
    }

    // A short row r and a short column c hold each other's place already, or greed would have taken it. So some (s, d) is
    // given up for (r, d) and (s, c). There is one: a row s that lacks c is full, and r keeps fewer columns than it does.
    void fill_up() {
        for (int r = 0; r < m_; ++r)
            while (in_row_[r] < n_) {
                int c = 0, s = -1, d = -1;
                while (in_column_[c] == n_) ++c;
                double most = 0;
                for (int i = 0; i < m_; ++i) {
                    if (kept(i, c)) continue;
                    for (uint64_t left = rows_[i] & ~rows_[r]; left; left &= left - 1) {
                        const int j = __builtin_ctzll(left);
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

    // What the sum gains when a row passes its best column on to another.
    void find_gain(int from, int to) {
        double most = -std::numeric_limits<double>::infinity();
        int column = 0;
        for (uint64_t left = rows_[from] & ~rows_[to]; left; left &= left - 1) {
            const int c = __builtin_ctzll(left);
            const double gain = value(to, c) - value(from, c);
            if (gain > most) most = gain, column = c;
        }
        gain_[from * m_ + to] = most;
        column_[from * m_ + to] = column;
    }

    // Finds a circle of rows that gain by passing a column on to the next and lets them do it; false if there is none. All
    // sums are exact: what is found does gain, so that no mask comes back and this ends.
    bool circle() {
        std::fill(reach_.begin(), reach_.end(), 0.0); // the gain of the best way found to here, from anywhere (Bellman-Ford)
        std::fill(before_.begin(), before_.end(), -1);
        for (;;) {
            bool changed = false;
            for (int r = 0; r < m_; ++r)
                for (int s = 0; s < m_; ++s) {
                    const double gain = reach_[r] + gain_[r * m_ + s];
                    if (gain > reach_[s]) reach_[s] = gain, before_[s] = r, changed = true;
                }
            if (!changed) return false;
            const int row = row_on_a_circle();
            if (row < 0) continue;
            int s = row;
            do { // each row loses one column and takes over another: the order does not matter
                const uint64_t column = uint64_t{1} << column_[before_[s] * m_ + s];
                rows_[before_[s]] ^= column;
                rows_[s] ^= column;
                s = before_[s];
            } while (s != row);
            do {
                for (int r = 0; r < m_; ++r) find_gain(r, s), find_gain(s, r);
                s = before_[s];
            } while (s != row);
            return true;
        }
    }

    int row_on_a_circle() {
        std::fill(visited_.begin(), visited_.end(), -1);
        for (int start = 0; start < m_; ++start) {
            int row = start;
            while (row >= 0 && visited_[row] < 0) visited_[row] = start, row = before_[row];
            if (row >= 0 && visited_[row] == start) return row;
        }
        return -1;
    }

    const int n_, m_;
    std::vector<double> values_;
    std::vector<Entry> order_, other_;
    std::vector<uint64_t> rows_; // bit c of rows_[r]: whether (r, c) is kept
    std::vector<int> in_row_, in_column_;
    std::vector<double> gain_; // [from][to], and the column that it is of
    std::vector<int> column_;
    std::vector<double> reach_;
    std::vector<int> before_, visited_;
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
        std::fill_n(out, size.batch * size.rows * size.columns, static_cast<uint8_t>(n > 0));
    else if (m <= 4)
        solve<Enumeration>(weight, size, n, m, out, threads);
    else
        solve<Flow>(weight, size, n, m, out, threads);
}

} // namespace kernels::nm
