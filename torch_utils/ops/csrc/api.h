// The plain C interface between the kernels and PyTorch's side: pointers, sizes, strides, a stream.
#pragma once

#include <cstdint>

namespace di_refine {

enum DType : int { kHalf, kBFloat16, kFloat, kDouble };

// The order is that of `activation_funcs` in bias_act.py.
enum Activation : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

// Tensors are dense and share one memory order, so that the kernel sees them as one-dimensional.
struct BiasActParams {
    int order;          // 0: the value; 1: its derivative times `in`; 2: the second derivative times `in` and `dy`
    DType dtype;        // of every tensor
    Activation act;
    const void* in;     // order 0: x; 1: the incoming gradient; 2: the gradient with respect to order 1's result
    const void* ref;    // orders 1, 2: the value y, or for swish the input x; null where the derivative is constant
    const void* dy;     // order 2: what was `in` in order 1
    const void* b;      // bias, or null; orders 1 and 2 read it for swish only
    void* out;
    int64_t numel;
    int64_t b_stride;   // element i has bias number (i / b_stride) % b_size
    int64_t b_size;
    double alpha, gain;
    double clamp;       // negative: none
};

struct Upfirdn2dParams {
    DType dtype;        // of x and y
    const void* x;
    void* y;
    const float* f;     // taps, row by row, or null for the single tap 1
    int fw, fh;
    bool outer;         // f holds max(fw, fh) taps, and tap (i, j) is f[i] * f[j]
    bool flip;          // true correlates, false convolves
    double gain;
    int up_x, up_y, down_x, down_y, pad_x0, pad_y0;
    int64_t n, c;
    int in_h, in_w, out_h, out_w;
    bool channels_last; // memory order of x and y, both dense: [n, h, w, c] instead of [n, c, h, w]
};

}  // namespace di_refine

// Both return null, or a sentence that says what went wrong. `stream` is a cudaStream_t; the CPU form ignores it.
extern "C" const char* di_refine_bias_act(const di_refine::BiasActParams* params, void* stream);
extern "C" const char* di_refine_upfirdn2d(const di_refine::Upfirdn2dParams* params, void* stream);
