// Views of a 2-D scan as *sheets*: what a tile kernel needs to know about rays, and nothing about millimetres.
//
// A plane is the image in one of four orders: its rows as lines, its columns as lines, and both with the content of
// each line mirrored. A sheet is a view (fan beam: the part of a view with one dominant axis) on the plane where
// every ray crosses each line once and where the position of a ray on a line *grows* with its number. Two views whose
// sheets agree (quarter turns, mirror images of a centred scan) share positions and weights; Group collects them.
//
// Conventions (pixel (r, c) of an image [H, W], lengths in mm, angles in radians):
//   X = (c - (W-1)/2) pixel,  Y = ((H-1)/2 - r) pixel,  u_k = (k - (cells-1)/2) pitch + offset
//   parallel: X cos b + Y sin b + axis = u_k
//   fan:      (X cos b + Y sin b + axis) (R + D) / (R - (X sin b - Y cos b)) = u_k
// Joseph's weights: linear interpolation along each line, times the step pixel / |cos| between lines.
#pragma once
#include <cstdint>
#include <vector>

namespace kernels::ct {

struct Parallel {
    double pitch, pixel, offset, axis;
};

struct Fan {
    double source_axis, axis_detector, pitch, pixel, offset, axis;
};

struct Shape {
    int64_t height, width, cells;
};

enum Plane : int { kRows = 0, kRowsMirrored = 1, kColumns = 2, kColumnsMirrored = 3 };
inline bool is_mirrored(Plane plane) { return plane & 1; }
inline bool is_columns(Plane plane) { return plane & 2; }

// One ray bundle. Cell k of the sheet is cell k of the detector, or cells-1-k if `reversed`.
struct Sheet {
    int64_t view;
    Plane plane;
    bool reversed;
    int64_t first, last; // cells [first, last) of the sheet's own numbering belong to it
};

// x(k, l) = x0 + s k + t l in pixels; s > 0, |t| <= 1.
struct ParallelSheet : Sheet {
    double x0, s, t;

    // the fractional cell whose ray meets position x of line l
    double cell_at(double x, double l) const { return (x - x0 - t * l) / s; }
    // false where no ray of the scan can come from: behind the source
    bool sees(double, double) const { return true; }
    double spacing_bound(double) const { return s; }
    // lines beyond source_line() in this direction are the ones that rays reach; 0: all are
    int forward() const { return 0; }
    double source_line() const { return 0; }
};

// x(k, l) = xs + (p0 + p1 m) / (q0 + q1 m) (l - ls) with m = m0 + mu k: the source is pixel (xs, ls) of the plane.
// q > 0 on the sheet's cells; |p1 q0 - p0 q1| = 1; positions grow with k on the lines in front of the source.
struct FanSheet : Sheet {
    double xs, ls, p0, p1, q0, q1, m0, mu;
    int ahead; // rays leave the source towards growing (1) or falling (-1) line numbers
    int side;  // the sign that makes depth() positive on the image

    double tangent(double k) const { return m0 + mu * k; }
    double q(double k) const { return q0 + q1 * tangent(k); }
    double slope(double k) const { return (p0 + p1 * tangent(k)) / q(k); }
    // how far a pixel is from the source along the central ray, in pixels
    double depth(double x, double l) const { return side * (q1 * (x - xs) - p1 * (l - ls)); }
    bool sees(double x, double l) const { return depth(x, l) > 0; }
    // the fractional cell whose ray meets position x of line l
    double cell_at(double x, double l) const {
        return (side * (p0 * (l - ls) - q0 * (x - xs)) / depth(x, l) - m0) / mu;
    }
    // q^2 >= 1/2 on the sheet's own cells, so d x / d k = |mu (l - ls)| / q^2 stays below this
    double spacing_bound(double l) const {
        const double distance = l - ls;
        return 2 * (mu < 0 ? -mu : mu) * (distance < 0 ? -distance : distance);
    }
    int forward() const { return ahead; }
    double source_line() const { return ls; }
};

struct Member {
    int64_t view;
    Plane plane;
    bool reversed;
};

// Sheets of equal geometry on planes of equal shape: positions are computed once for all members (four at most).
template <class SheetT>
struct Group {
    SheetT sheet;
    std::vector<Member> members;
};

constexpr int kMaxMembers = 4;

std::vector<ParallelSheet> sheets(const Parallel& beam, const Shape& shape, const double* angles, int64_t views);
std::vector<FanSheet> sheets(const Fan& beam, const Shape& shape, const double* angles, int64_t views);

// Only planes of equal shape can share: pass the sheets of one plane shape at a time.
std::vector<Group<ParallelSheet>> groups(std::vector<ParallelSheet> sheets);
std::vector<Group<FanSheet>> groups(std::vector<FanSheet> sheets);

// Length of image that cell k of a view stands for on each line, mm: pixel / |cos| of its ray.
void steps(const Parallel& beam, double angle, int64_t cells, float* out);
void steps(const Fan& beam, double angle, int64_t cells, float* out);

// Throws std::invalid_argument with what, got, expected where the scan is not one we can compute.
void check(const Parallel& beam, const Shape& shape, const double* angles, int64_t views);
void check(const Fan& beam, const Shape& shape, const double* angles, int64_t views);

} // namespace kernels::ct
