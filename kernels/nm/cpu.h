// Products with a packed N:M weight on the CPU. See row.h for the format. All arrays are contiguous; results do not
// depend on `threads` (>= 1), bit for bit.
#pragma once
#include <cstdint>

#include "row.h"

namespace kernels::nm {

// values and places of `out` (sized by the caller) from weight [rows][columns], Value being float or bfloat16, and
// kept [rows][columns], 1 where the weight is kept. A group that keeps fewer than n is filled up with zeros, placed
// where the last one kept is. Returns whether every group keeps n at most; if not, what is written is of no use.
template <class Value>
bool pack(const Value* weight, const uint8_t* kept, const Packed& out, int threads);

// weight [rows][columns], with zeros where nothing is kept.
template <class Value>
void unpack(const Packed& w, Value* weight, int threads);

// y [tokens][rows] = x [tokens][columns] W^T + bias [rows] (or null).
void forward(const Packed& w, const float* x, int64_t tokens, const float* bias, float* y, int threads);

// The same in bfloat16, all but the bias, with sums in float32; for weights of bfloat16 where `takes_half` says so. The
// products meet all of x: a NaN or an infinity makes its whole token NaN.
void forward(const Packed& w, const uint16_t* x, int64_t tokens, const float* bias, uint16_t* y, int threads);

// Whether this processor has tiles, and they are worth it for n of m and so many tokens.
bool takes_half(int n, int m, int64_t tokens);

// dx [tokens][columns] = dy [tokens][rows] W.
void input_gradient(const Packed& w, const float* dy, int64_t tokens, float* dx, int threads);

// out [blocks][groups][n][16] = sum over tokens of dy [tokens][rows] times x [tokens][columns], at the kept places alone.
void weight_gradient(const Packed& w, const float* dy, const float* x, int64_t tokens, float* out, int threads);

} // namespace kernels::nm
