// Colours from real spherical harmonics in the view direction, degrees 0 to 3, as 3-D Gaussian splatting orders them.
#include <algorithm>
#include <cmath>

#include "cpu.h"

namespace kernels::splat {
namespace {

constexpr double kSmallest = 1e-12; // a direction shorter than this has no derivative
constexpr int kMost = 16; // coefficients of a colour
constexpr int64_t kFew = 1024;      // Gaussians that are not worth waking threads for

// b [16] at the unit vector (x, y, z); with d [16][3], its derivatives too. Only the first (degree + 1)^2 are set.
void bases(int degree, double x, double y, double z, double* b, double (*d)[3]) {
    auto put = [&](int i, double value, double dx, double dy, double dz) {
        b[i] = value;
        if (d) d[i][0] = dx, d[i][1] = dy, d[i][2] = dz;
    };
    put(0, 0.28209479177387814, 0, 0, 0);
    if (degree < 1) return;
    constexpr double k1 = 0.48860251190291992;
    put(1, -k1 * y, 0, -k1, 0);
    put(2, k1 * z, 0, 0, k1);
    put(3, -k1 * x, -k1, 0, 0);
    if (degree < 2) return;
    constexpr double k2 = 1.0925484305920792, k20 = 0.94617469575756, k22 = 0.5462742152960396;
    put(4, k2 * x * y, k2 * y, k2 * x, 0);
    put(5, -k2 * y * z, 0, -k2 * z, -k2 * y);
    put(6, k20 * z * z - 0.31539156525252005, 0, 0, 2 * k20 * z);
    put(7, -k2 * x * z, -k2 * z, 0, -k2 * x);
    put(8, k22 * (x * x - y * y), 2 * k22 * x, -2 * k22 * y, 0);
    if (degree < 3) return;
    constexpr double k3 = 0.5900435899266435, k31 = 2.8906114426405543, k32 = 0.4570457994644658, k33 = 1.445305721320277;
    constexpr double k34 = 1.8658816629505769, k35 = 1.1195289977703462;
    const double zz = z * z, ring = k32 - 5 * k32 * zz;
    put(9, -k3 * y * (3 * x * x - y * y), -6 * k3 * x * y, -3 * k3 * (x * x - y * y), 0);
    put(10, k31 * x * y * z, k31 * y * z, k31 * x * z, k31 * x * y);
    put(11, y * ring, 0, ring, -10 * k32 * y * z);
    put(12, z * (k34 * zz - k35), 0, 0, 3 * k34 * zz - k35);
    put(13, x * ring, ring, 0, -10 * k32 * x * z);
    put(14, k33 * z * (x * x - y * y), 2 * k33 * x * z, -2 * k33 * y * z, k33 * (x * x - y * y));
    put(15, -k3 * x * (x * x - 3 * y * y), -3 * k3 * (x * x - y * y), 6 * k3 * x * y, 0);
}

// Each base three times in a row, as the coefficients of three colours are stored.
void spread(const double* b, int used, float* out) {
    for (int k = 0; k < used; ++k) out[3 * k] = out[3 * k + 1] = out[3 * k + 2] = static_cast<float>(b[k]);
}

struct Direction {
    double x, y, z, length;
};

Direction direction(const float* d) {
    const double length = std::sqrt(double(d[0]) * d[0] + double(d[1]) * d[1] + double(d[2]) * d[2]);
    const double by = 1 / std::max(length, kSmallest);
    return {d[0] * by, d[1] * by, d[2] * by, length};
}

} // namespace

void harmonics(int degree, const float* dirs, const float* coeffs, bool shared, const uint8_t* visible, int64_t rows,
               int64_t count, int64_t stored, float* out, int threads) {
    const int used = (degree + 1) * (degree + 1);
#pragma omp parallel for schedule(static) num_threads(threads) if (count > kFew)
    for (int64_t n = 0; n < count; ++n)
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = row * count + n;
            float* color = out + 3 * i;
            std::fill_n(color, 3, 0.0f);
            if (visible && !visible[i]) continue;
            const Direction d = direction(dirs + 3 * i);
            double b[kMost];
            bases(degree, d.x, d.y, d.z, b, nullptr);
            const float* coeff = coeffs + (shared ? n : i) * stored * 3;
            float each[3 * kMost];
            spread(b, used, each);
            for (int k = 0; k < 3 * used; ++k) each[k] *= coeff[k];
            for (int k = 0; k < 3 * used; k += 3)
                for (int c = 0; c < 3; ++c) color[c] += each[k + c];
        }
}

void harmonics_backward(int degree, const float* dirs, const float* coeffs, bool shared, const uint8_t* visible,
                        int64_t rows, int64_t count, int64_t stored, const float* grad, float* grad_dirs,
                        float* grad_coeffs, int threads) {
    const int used = (degree + 1) * (degree + 1);
#pragma omp parallel for schedule(static) num_threads(threads) if (count > kFew)
    for (int64_t n = 0; n < count; ++n)
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = row * count + n;
            float* to = grad_coeffs + (shared ? n : i) * stored * 3;
            if (!shared || row == 0) std::fill_n(to, 3 * stored, 0.0f);
            std::fill_n(grad_dirs + 3 * i, 3, 0.0f);
            if (visible && !visible[i]) continue;
            const Direction d = direction(dirs + 3 * i);
            double b[kMost], derivative[kMost][3];
            bases(degree, d.x, d.y, d.z, b, derivative);
            const float* coeff = coeffs + (shared ? n : i) * stored * 3;
            const float* g = grad + 3 * i;
            float each[3 * kMost], along[3 * kMost];
            spread(b, used, each);
            for (int k = 0; k < 3 * used; k += 3)
                for (int c = 0; c < 3; ++c) along[k + c] = g[c];
            for (int k = 0; k < 3 * used; ++k) to[k] += each[k] * along[k];
            for (int k = 0; k < 3 * used; ++k) along[k] *= coeff[k];
            double unit[3] = {}; // dL/d(unit direction)
            for (int k = 0; k < used; ++k) {
                const double sum = along[3 * k] + along[3 * k + 1] + along[3 * k + 2];
                for (int c = 0; c < 3; ++c) unit[c] += derivative[k][c] * sum;
            }
            if (d.length < kSmallest) continue;
            const double radial = unit[0] * d.x + unit[1] * d.y + unit[2] * d.z;
            const double at[3] = {d.x, d.y, d.z};
            for (int c = 0; c < 3; ++c) grad_dirs[3 * i + c] = static_cast<float>((unit[c] - radial * at[c]) / d.length);
        }
}

} // namespace kernels::splat
