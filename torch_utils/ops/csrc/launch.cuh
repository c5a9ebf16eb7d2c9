// What both kernels need to start: a grid size, a choice by stored type.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "api.h"
#include "scalar.h"

namespace di_refine {

// Enough blocks for `work` threads, but no more than keep every multiprocessor busy: kernels stride over the rest.
inline const char* grid_size(int64_t work, int threads, unsigned& blocks) {
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const int64_t needed = (work + threads - 1) / threads;
    blocks = static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(needed, 32LL * processors)));
    return nullptr;
}

inline const char* launch_status() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Call `run` with a value of the type that `dtype` names.
template <typename F> const char* by_dtype(DType dtype, F run) {
    switch (dtype) {
        case kHalf: return run(half_t());
        case kBFloat16: return run(bfloat16_t());
        case kFloat: return run(float());
        default: return run(double());
    }
}

}  // namespace di_refine
