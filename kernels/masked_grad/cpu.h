// Gradients of the chosen entries of a weight, and their update. Definitions in cpu.cpp.
#pragma once
#include <cstdint>

#include "tile.h"

namespace kernels::masked_grad {

// float, or bfloat16 as its bits: what tensors hold. Sums and moments are float.
using Bits = uint16_t;

// Which entries of a weight [rows][columns] are chosen: see selection.py.
struct Chosen {
    const int16_t* offsets;
    const int32_t* starts;
    int64_t rows, columns;
    int64_t down() const { return (rows + kTile - 1) / kTile; }
    int64_t across() const { return (columns + kTile - 1) / kTile; }
};

// Images x [images][groups * channels][height][width], dy [images][rows of the weight][out_height][out_width];
// columns of the weight are [channels][kernel_height][kernel_width].
struct Convolution {
    int64_t images, groups, channels, height, width, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

// Floats of scratch that the gradients below need on so many threads.
int64_t scratch_of(const Chosen& chosen, int64_t groups, int threads);

// out[e] = sum over tokens of dy[token][row of e] x[token][column of e]; dy [tokens][rows], x [tokens][columns].
template <class T>
void linear_gradient(const T* dy, const T* x, int64_t tokens, const Chosen& chosen, float* scratch, float* out, int threads);

// The same for the weight of a convolution.
template <class T>
void conv2d_gradient(const T* dy, const T* x, const Convolution& window, const Chosen& chosen, float* scratch, float* out,
                     int threads);

// out[e] = the entry of panel, which holds the rows from `row` on, `count` of them.
void take(const float* panel, int64_t row, int64_t count, const Chosen& chosen, float* out, int threads);

// One step on the chosen entries of weight [rows][columns]; gradient, moments and master (or null) one number an entry.
template <class T, class G>
void adamw(T* weight, const G* gradient, const Chosen& chosen, const Step& step, float* first, float* second, float* master,
           int threads);

} // namespace kernels::masked_grad
