// Rows in bands, one band a thread. A band streams over its rows: of each image it keeps the eleven rows that the window
// needs, of the derivatives likewise, so nothing of the image's size is stored but the gradient. The rows that two bands
// both need are computed by both, from the same numbers in the same order: bits do not depend on the number of bands.
#include "cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "../simd/isa.h"
#include "row.h"

namespace kernels::ssim {
namespace {

constexpr double kSigma = 1.5; // pixels
constexpr int64_t kFew = 1 << 14; // floats that are not worth waking threads for

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

std::array<float, kHalf + 1> window() {
    std::array<double, kHalf + 1> weights;
    double sum = 0;
    for (int k = 0; k <= kHalf; ++k) sum += (k ? 2 : 1) * (weights[k] = std::exp(-0.5 * (k / kSigma) * (k / kSigma)));
    std::array<float, kHalf + 1> out;
    for (int k = 0; k <= kHalf; ++k) out[k] = static_cast<float>(weights[k] / sum);
    return out;
}

// The last kWindow rows of an image, and zeros for those outside it. Row r lies in place r mod kWindow.
class Ring {
public:
    explicit Ring(int64_t size) : size_(size), rows_(kWindow * size), zeros_(size) {}

    float* at(int64_t row) { return rows_.data() + row % kWindow * size_; }

    // The rows around the middle one, as RowOps takes them.
    std::array<const float*, kWindow> around(int64_t middle, int64_t height) {
        std::array<const float*, kWindow> rows;
        for (int k = 0; k < kWindow; ++k) {
            const int64_t row = middle + k - kHalf;
            rows[k] = row < 0 || row >= height ? zeros_.data() : at(row);
        }
        return rows;
    }

private:
    int64_t size_;
    std::vector<float> rows_, zeros_;
};

// Calls body(first row, last row + 1) for `threads` bands.
template <class Body>
void in_bands(const Size& size, int threads, const Body& body) {
    const int bands = static_cast<int>(
        std::clamp<int64_t>(size.height * size.width * size.channels < kFew ? 1 : threads, 1, std::max<int64_t>(size.height, 1)));
#pragma omp parallel for schedule(static, 1) num_threads(bands) if (bands > 1)
    for (int band = 0; band < bands; ++band) body(size.height * band / bands, size.height * (band + 1) / bands);
}

// One band of `photometric`.
class Band {
public:
    Band(const float* render, const Photo& photo, const Size& size, const float* weights)
        : render_(render), photo_(photo), size_(size), row_{size.width * size.channels, size.channels, weights},
          room_(kept(row_.length)), x_(room_), y_(room_), by_mean_(room_), by_square_(room_), by_product_(room_),
          mean_(room_), variance_(room_, 1.0f), weight_(room_), out_(room_), scratch_(3 * padded(row_)) {
        std::fill_n(weight_.begin(), row_.length, 1.0f);
    }

    void run(int64_t first, int64_t end, float l1, float dssim, double* sums, float* gradient) {
        const RowOps& ops = row_ops();
        const int64_t halo = gradient ? kHalf : 0, height = size_.height;
        const int64_t begin = std::max<int64_t>(0, first - halo), stop = std::min(height, end + halo);
        int64_t read = std::max<int64_t>(0, begin - kHalf);
        for (int64_t r = begin; r < end + halo; ++r) {
            if (r < stop) {
                for (; read < std::min(height, r + kHalf + 1); ++read) {
                    copy(x_.at(read), render_, read);
                    copy(y_.at(read), photo_.image, read);
                }
                const Sums found = compare(ops, r);
                if (r >= first && r < end) sums[2 * r] = found.ssim, sums[2 * r + 1] = found.l1;
            }
            if (gradient && r - kHalf >= first && r - kHalf < end) {
                const int64_t q = r - kHalf; // the oldest row of render and photograph that their rings still hold
                ops.gradient(row_, by_mean_.around(q, height).data(), by_square_.around(q, height).data(),
                             by_product_.around(q, height).data(), x_.at(q), y_.at(q), l1, dssim, scratch_.data(), out_.data());
                std::memcpy(gradient + q * row_.length, out_.data(), row_.length * sizeof(float));
            }
        }
    }

private:
    Sums compare(const RowOps& ops, int64_t r) {
        copy(mean_.data(), photo_.mean, r);
        copy(variance_.data(), photo_.variance, r);
        if (photo_.weight)
            for (int64_t i = 0; i < row_.length; ++i) weight_[i] = photo_.weight[r * size_.width + i / row_.channels];
        return ops.compare(row_, x_.around(r, size_.height).data(), y_.around(r, size_.height).data(), mean_.data(), variance_.data(),
                           weight_.data(), scratch_.data(), {by_mean_.at(r), by_square_.at(r), by_product_.at(r)});
    }

    void copy(float* to, const float* image, int64_t row) const {
        std::memcpy(to, image + row * row_.length, row_.length * sizeof(float));
    }

    const float* render_;
    const Photo& photo_;
    const Size size_;
    const Row row_;
    const int64_t room_;
    Ring x_, y_, by_mean_, by_square_, by_product_;
    std::vector<float> mean_, variance_, weight_, out_, scratch_;
};

} // namespace

void photometric(const float* render, const Photo& photo, const Size& size, float l1, float dssim, double* rows,
                 float* gradient, int threads) {
    const auto weights = window();
    in_bands(size, threads, [&](int64_t first, int64_t end) {
        Band(render, photo, size, weights.data()).run(first, end, l1, dssim, rows, gradient);
    });
}

void window_mean(const float* image, const Size& size, float* out, int threads) {
    const auto weights = window();
    const Row row{size.width * size.channels, size.channels, weights.data()};
    const RowOps& ops = row_ops();
    in_bands(size, threads, [&](int64_t first, int64_t end) {
        Ring ring(kept(row.length));
        std::vector<float> scratch(padded(row)), result(kept(row.length));
        int64_t read = std::max<int64_t>(0, first - kHalf);
        for (int64_t r = first; r < end; ++r) {
            for (; read < std::min(size.height, r + kHalf + 1); ++read)
                std::memcpy(ring.at(read), image + read * row.length, row.length * sizeof(float));
            ops.mean(row, ring.around(r, size.height).data(), scratch.data(), result.data());
            std::memcpy(out + r * row.length, result.data(), row.length * sizeof(float));
        }
    });
}

} // namespace kernels::ssim
