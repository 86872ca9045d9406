// Projection of Gaussians to the image plane (EWA splatting) and colours from spherical harmonics, forward and backward.
// Scalar code in double precision: together a small part of what the pixels cost, and needles need the digits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu.h"
#include "tile.h"

namespace kernels::splat {
namespace {

constexpr int64_t kGroup = 256; // Gaussians whose camera gradients are added up together, whoever computes them

struct Vec {
    double x, y, z;
};

struct Mat { // row by row
    double m[3][3];
};

Vec operator*(const Mat& a, const Vec& v) {
    auto row = [&](int i) { return a.m[i][0] * v.x + a.m[i][1] * v.y + a.m[i][2] * v.z; };
    return {row(0), row(1), row(2)};
}

Vec transposed_times(const Mat& a, const Vec& v) {
    auto column = [&](int i) { return a.m[0][i] * v.x + a.m[1][i] * v.y + a.m[2][i] * v.z; };
    return {column(0), column(1), column(2)};
}

template <class Entry>
Mat matrix(Entry entry) {
    Mat out;
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) out.m[i][j] = entry(i, j);
    return out;
}

Mat operator*(const Mat& a, const Mat& b) {
    return matrix([&](int i, int j) { return a.m[i][0] * b.m[0][j] + a.m[i][1] * b.m[1][j] + a.m[i][2] * b.m[2][j]; });
}

Mat transposed(const Mat& a) {
    return matrix([&](int i, int j) { return a.m[j][i]; });
}

struct Rotation {
    double w, x, y, z, length;
    Mat matrix;
};

Rotation rotation(const float* quat) {
    Rotation q;
    q.length = std::sqrt(double(quat[0]) * quat[0] + double(quat[1]) * quat[1] + double(quat[2]) * quat[2] + double(quat[3]) * quat[3]);
    q.w = quat[0] / q.length, q.x = quat[1] / q.length, q.y = quat[2] / q.length, q.z = quat[3] / q.length;
    const double w = q.w, x = q.x, y = q.y, z = q.z;
    q.matrix = {{{1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)},
                 {2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)},
                 {2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)}}};
    return q;
}

// dL/dquat [4] from dL/dmatrix; a quaternion's length has no part in it.
void rotation_backward(const Rotation& q, const Mat& grad, float* out) {
    const auto& g = grad.m;
    const double w = q.w, x = q.x, y = q.y, z = q.z;
    const double d[4] = {
        2 * (x * (g[2][1] - g[1][2]) + y * (g[0][2] - g[2][0]) + z * (g[1][0] - g[0][1])),
        2 * (w * (g[2][1] - g[1][2]) - 2 * x * (g[1][1] + g[2][2]) + y * (g[0][1] + g[1][0]) + z * (g[0][2] + g[2][0])),
        2 * (w * (g[0][2] - g[2][0]) + x * (g[0][1] + g[1][0]) - 2 * y * (g[0][0] + g[2][2]) + z * (g[1][2] + g[2][1])),
        2 * (w * (g[1][0] - g[0][1]) + x * (g[0][2] + g[2][0]) + y * (g[1][2] + g[2][1]) - 2 * z * (g[0][0] + g[1][1]))};
    const double along = d[0] * w + d[1] * x + d[2] * y + d[3] * z;
    const double unit[4] = {w, x, y, z};
    for (int i = 0; i < 4; ++i) out[i] = static_cast<float>((d[i] - along * unit[i]) / q.length);
}

struct Shape { // of one Gaussian
    Rotation rotation;
    Mat half, covariance; // half = rotation diag(scales); covariance = half half^T
};

Shape shape(const Gaussians& gaussians, int64_t n) {
    Shape out;
    if (gaussians.covars) {
        const float* c = gaussians.covars + 9 * n;
        out.covariance = matrix([&](int i, int j) { return 0.5 * (double(c[3 * i + j]) + c[3 * j + i]); });
        return out;
    }
    out.rotation = rotation(gaussians.quats + 4 * n);
    const float* scale = gaussians.scales + 3 * n;
    out.half = matrix([&](int i, int j) { return out.rotation.matrix.m[i][j] * scale[j]; });
    out.covariance = out.half * transposed(out.half);
    return out;
}

struct View {
    Mat rotation;
    Vec translation;
    double fx, fy, cx, cy;
    double left, right, top, bottom; // limits of x/z and y/z in the Jacobian
};

View view(const Cameras& cameras, int64_t c) {
    const float *m = cameras.viewmats + 16 * c, *k = cameras.intrinsics + 9 * c;
    const double width = static_cast<double>(cameras.size.width), height = static_cast<double>(cameras.size.height);
    View v;
    v.rotation = matrix([&](int i, int j) { return m[4 * i + j]; });
    v.translation = {m[3], m[7], m[11]};
    v.fx = k[0], v.fy = k[4], v.cx = k[2], v.cy = k[5];
    const double beyond_x = 0.3 * width / (2 * v.fx), beyond_y = 0.3 * height / (2 * v.fy);
    v.left = -(v.cx / v.fx + beyond_x), v.right = (width - v.cx) / v.fx + beyond_x;
    v.top = -(v.cy / v.fy + beyond_y), v.bottom = (height - v.cy) / v.fy + beyond_y;
    return v;
}

// One Gaussian before one camera. With J the Jacobian of the projection and W the camera's rotation, the covariance on
// the image is (J W) covariance (J W)^T.
struct Splat {
    Vec mean;                // in camera coordinates
    double x, y;             // mean.x and mean.y, limited, as in the Jacobian
    bool limited_x, limited_y;
    double j00, j02, j11, j12;
    double jw[2][3], jwc[2][3]; // J W, and that times the covariance
    double xx, xy, yy;       // covariance on the image, blurred
    double determinant, compensation;
};

Splat splat(const Shape& shape, const float* mean, const View& v, double eps2d) {
    Splat s;
    s.mean = v.rotation * Vec{mean[0], mean[1], mean[2]};
    s.mean = {s.mean.x + v.translation.x, s.mean.y + v.translation.y, s.mean.z + v.translation.z};
    const double inverse = 1 / s.mean.z, tx = s.mean.x * inverse, ty = s.mean.y * inverse;
    s.limited_x = !(tx >= v.left && tx <= v.right), s.limited_y = !(ty >= v.top && ty <= v.bottom);
    const double limited_tx = std::min(std::max(tx, v.left), v.right), limited_ty = std::min(std::max(ty, v.top), v.bottom);
    s.x = s.mean.z * limited_tx, s.y = s.mean.z * limited_ty;
    s.j00 = v.fx * inverse, s.j02 = -s.j00 * limited_tx, s.j11 = v.fy * inverse, s.j12 = -s.j11 * limited_ty;
    const auto& w = v.rotation.m;
    const auto& c = shape.covariance.m;
    for (int k = 0; k < 3; ++k) {
        s.jw[0][k] = s.j00 * w[0][k] + s.j02 * w[2][k];
        s.jw[1][k] = s.j11 * w[1][k] + s.j12 * w[2][k];
    }
    auto row = [](const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; };
    for (int k = 0; k < 3; ++k) s.jwc[0][k] = row(s.jw[0], c[k]), s.jwc[1][k] = row(s.jw[1], c[k]);
    const double xx = row(s.jwc[0], s.jw[0]), xy = row(s.jwc[0], s.jw[1]), yy = row(s.jwc[1], s.jw[1]);
    s.xx = xx + eps2d, s.xy = xy, s.yy = yy + eps2d;
    s.determinant = s.xx * s.yy - xy * xy;
    s.compensation = std::sqrt(std::max(0.0, (xx * yy - xy * xy) / s.determinant));
    return s;
}

// Half the box in standard deviations: where the opacity falls to 1/255, 3.33 at most. Negative: nowhere visible.
double extent(const Gaussians& gaussians, int64_t n, double compensation) {
    if (!gaussians.opacities) return 3.33;
    const double opacity = gaussians.opacities[n] * compensation;
    if (!(opacity >= double(kMinAlpha) && std::isfinite(opacity))) return -1;
    return std::min(3.33, std::sqrt(2 * std::log(opacity * 255)));
}

void cull(const Projected& out, int64_t i) {
    out.radii[2 * i] = out.radii[2 * i + 1] = 0;
    out.means2d[2 * i] = out.means2d[2 * i + 1] = 0;
    out.conics[3 * i] = out.conics[3 * i + 1] = out.conics[3 * i + 2] = 0;
    out.depths[i] = out.compensations[i] = 0;
}

void project_one(const Gaussians& gaussians, const Shape& shape, int64_t n, const Cameras& cameras, const View& v, int64_t i,
                 const Projected& out) {
    cull(out, i);
    const Splat s = splat(shape, gaussians.means + 3 * n, v, cameras.eps2d);
    if (!(s.mean.z > cameras.near_plane && s.mean.z < cameras.far_plane && s.determinant > 0)) return;
    const double compensation = cameras.antialiased ? s.compensation : 1.0;
    const double reach = extent(gaussians, n, compensation);
    const double rx = std::ceil(reach * std::sqrt(s.xx)), ry = std::ceil(reach * std::sqrt(s.yy));
    const double x = v.fx * s.mean.x / s.mean.z + v.cx, y = v.fy * s.mean.y / s.mean.z + v.cy;
    if (!(reach >= 0) || (rx <= cameras.radius_clip && ry <= cameras.radius_clip)) return;
    if (!(x + rx > 0 && x - rx < double(cameras.size.width) && y + ry > 0 && y - ry < double(cameras.size.height))) return;
    const double conic[3] = {s.yy / s.determinant, -s.xy / s.determinant, s.xx / s.determinant};
    // sizes that overflow single precision, and everything that is not a number, end here
    if (!(std::isfinite(float(s.xx)) && std::isfinite(float(s.yy)) && std::isfinite(float(s.determinant)) && std::isfinite(float(x)) &&
          std::isfinite(float(y)) && std::isfinite(conic[0] + conic[1] + conic[2]) && std::isfinite(compensation)))
        return;
    const double most = std::numeric_limits<int32_t>::max();
    out.radii[2 * i] = static_cast<int32_t>(std::min(rx, most)), out.radii[2 * i + 1] = static_cast<int32_t>(std::min(ry, most));
    out.means2d[2 * i] = static_cast<float>(x), out.means2d[2 * i + 1] = static_cast<float>(y);
    for (int k = 0; k < 3; ++k) out.conics[3 * i + k] = static_cast<float>(conic[k]);
    out.depths[i] = static_cast<float>(s.mean.z);
    out.compensations[i] = static_cast<float>(compensation);
}

struct ViewGrad {
    Mat rotation;
    Vec translation;
};

// dL/d(covariance on the image), a symmetric matrix [xx, xy, yy], from the conic (its b stands for both corners) and the
// compensation.
void image_covariance_grad(const Splat& s, const Cameras& cameras, const ProjectedGrad& grad, int64_t i, double out[3]) {
    const double a = s.yy / s.determinant, b = -s.xy / s.determinant, c = s.xx / s.determinant;
    const double ga = grad.conics[3 * i], gb = 0.5 * grad.conics[3 * i + 1], gc = grad.conics[3 * i + 2];
    const double left = a * ga + b * gb, right = a * gb + b * gc; // first row of P G
    const double low = b * ga + c * gb, last = b * gb + c * gc;   // second row
    out[0] = -(left * a + right * b);
    out[1] = -(left * b + right * c);
    out[2] = -(low * b + last * c);
    if (!cameras.antialiased || s.compensation == 0) return; // a root has no derivative at zero
    const double g = 0.5 * grad.compensations[i] / s.compensation, rest = 1 - s.compensation * s.compensation;
    const double eps = cameras.eps2d / s.determinant;
    out[0] += g * (rest * a - eps);
    out[1] += g * rest * b;
    out[2] += g * (rest * c - eps);
}

// Adds to the gradients of one Gaussian's mean and covariance (world) and of the camera.
void project_one_backward(const float* mean, const Shape& shape, const Cameras& cameras, const View& v, const ProjectedGrad& grad,
                          int64_t i, Vec& grad_mean, Mat& grad_covariance, ViewGrad& grad_view) {
    const Splat s = splat(shape, mean, v, cameras.eps2d);
    double g[3];
    image_covariance_grad(s, cameras, grad, i, g);
    double jw[2][3]; // dL/d(J W)
    for (int k = 0; k < 3; ++k) {
        jw[0][k] = 2 * (g[0] * s.jwc[0][k] + g[1] * s.jwc[1][k]);
        jw[1][k] = 2 * (g[1] * s.jwc[0][k] + g[2] * s.jwc[1][k]);
    }
    const auto& w = v.rotation.m;
    auto row = [](const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; };
    const double j00 = row(jw[0], w[0]), j02 = row(jw[0], w[2]), j11 = row(jw[1], w[1]), j12 = row(jw[1], w[2]);
    const double z = s.mean.z, z2 = z * z, z3 = z2 * z;
    const double gx = grad.means2d[2 * i], gy = grad.means2d[2 * i + 1];
    Vec d{v.fx / z * gx, v.fy / z * gy, grad.depths[i]};
    d.z -= (v.fx * (s.mean.x * gx + j00) + v.fy * (s.mean.y * gy + j11)) / z2;
    // a limited x is z times a constant, and J02 then falls with 1/z only
    d.x -= s.limited_x ? 0 : v.fx / z2 * j02;
    d.y -= s.limited_y ? 0 : v.fy / z2 * j12;
    d.z += ((s.limited_x ? 1 : 2) * v.fx * s.x * j02 + (s.limited_y ? 1 : 2) * v.fy * s.y * j12) / z3;

    const Vec world = transposed_times(v.rotation, d);
    grad_mean = {grad_mean.x + world.x, grad_mean.y + world.y, grad_mean.z + world.z};
    grad_view.translation = {grad_view.translation.x + d.x, grad_view.translation.y + d.y, grad_view.translation.z + d.z};
    const double moved[3] = {d.x, d.y, d.z};
    for (int b = 0; b < 3; ++b) {
        for (int a = 0; a < 3; ++a) {
            const double left = g[0] * s.jw[0][a] + g[1] * s.jw[1][a], right = g[1] * s.jw[0][a] + g[2] * s.jw[1][a];
            grad_covariance.m[a][b] += left * s.jw[0][b] + right * s.jw[1][b];
            grad_view.rotation.m[a][b] += moved[a] * mean[b];
        }
        grad_view.rotation.m[0][b] += s.j00 * jw[0][b];
        grad_view.rotation.m[1][b] += s.j11 * jw[1][b];
        grad_view.rotation.m[2][b] += s.j02 * jw[0][b] + s.j12 * jw[1][b];
    }
}

void shape_backward(const Gaussians& gaussians, int64_t n, const Shape& shape, const Mat& grad, const GaussiansGrad& out) {
    if (gaussians.covars) {
        for (int i = 0; i < 9; ++i) out.covars[9 * n + i] = static_cast<float>(grad.m[i / 3][i % 3]);
        return;
    }
    const Mat product = grad * shape.half;
    const Mat half = matrix([&](int i, int j) { return 2 * product.m[i][j]; }); // dL/dhalf, as grad is symmetric
    const auto& r = shape.rotation.matrix.m;
    const float* scale = gaussians.scales + 3 * n;
    for (int k = 0; k < 3; ++k)
        out.scales[3 * n + k] = static_cast<float>(r[0][k] * half.m[0][k] + r[1][k] * half.m[1][k] + r[2][k] * half.m[2][k]);
    rotation_backward(shape.rotation, matrix([&](int i, int j) { return half.m[i][j] * scale[j]; }), out.quats + 4 * n);
}

std::vector<View> views(const Cameras& cameras) {
    std::vector<View> out(cameras.count);
    for (int64_t c = 0; c < cameras.count; ++c) out[c] = view(cameras, c);
    return out;
}

} // namespace

void project(const Gaussians& gaussians, const Cameras& cameras, const Projected& out, int threads) {
    const std::vector<View> all = views(cameras);
#pragma omp parallel for schedule(static) num_threads(threads) if (gaussians.count > kGroup)
    for (int64_t n = 0; n < gaussians.count; ++n) {
        const Shape one = shape(gaussians, n);
        for (int64_t c = 0; c < cameras.count; ++c)
            project_one(gaussians, one, n, cameras, all[c], c * gaussians.count + n, out);
    }
}

void project_backward(const Gaussians& gaussians, const Cameras& cameras, const ProjectedGrad& grad, const GaussiansGrad& out,
                      int threads) {
    const std::vector<View> all = views(cameras);
    const int64_t groups = (gaussians.count + kGroup - 1) / kGroup;
    std::vector<ViewGrad> views_grad(groups * cameras.count, ViewGrad{});
#pragma omp parallel for schedule(static) num_threads(threads) if (groups > 1)
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t n = group * kGroup; n < std::min(gaussians.count, (group + 1) * kGroup); ++n) {
            Vec mean{};
            Mat covariance{};
            bool seen = false;
            Shape one;
            for (int64_t c = 0; c < cameras.count; ++c) {
                const int64_t i = c * gaussians.count + n;
                if (grad.radii[2 * i] == 0) continue;
                if (!seen) one = shape(gaussians, n);
                seen = true;
                project_one_backward(gaussians.means + 3 * n, one, cameras, all[c], grad, i, mean, covariance,
                                     views_grad[group * cameras.count + c]);
            }
            const double means[3] = {mean.x, mean.y, mean.z};
            for (int k = 0; k < 3; ++k) out.means[3 * n + k] = static_cast<float>(means[k]);
            if (seen) {
                shape_backward(gaussians, n, one, covariance, out);
            } else if (gaussians.covars) {
                std::fill_n(out.covars + 9 * n, 9, 0.0f);
            } else {
                std::fill_n(out.quats + 4 * n, 4, 0.0f);
                std::fill_n(out.scales + 3 * n, 3, 0.0f);
            }
        }
    for (int64_t c = 0; out.viewmats && c < cameras.count; ++c) {
        double sum[16] = {};
        for (int64_t group = 0; group < groups; ++group) {
            const ViewGrad& part = views_grad[group * cameras.count + c];
            const double translation[3] = {part.translation.x, part.translation.y, part.translation.z};
            for (int a = 0; a < 3; ++a) {
                for (int b = 0; b < 3; ++b) sum[4 * a + b] += part.rotation.m[a][b];
                sum[4 * a + 3] += translation[a];
            }
        }
        for (int k = 0; k < 16; ++k) out.viewmats[16 * c + k] = static_cast<float>(sum[k]);
    }
}

} // namespace kernels::splat
