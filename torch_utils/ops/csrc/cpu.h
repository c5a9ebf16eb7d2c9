// What both CPU forms share: PyTorch's threads, and the switch to the shapes of the CUDA form.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "api.h"
#include "scalar.h"

namespace di_refine {

// Set by `di_refine_cuda_shapes(1)`: work through the very vectors and tiles of the CUDA form, so that the test suite
// can check the kernels' arithmetic and indexing on a machine without a GPU.
extern bool cuda_shapes;

// Call `run(begin, end)` for parts of [0, count), on PyTorch's threads; a unit of work touches `elements` elements.
template <typename F> void in_parallel(int64_t count, int64_t elements, const F& run) {
    at::parallel_for(0, count, std::max<int64_t>(1, 32768 / elements), run);
}

}  // namespace di_refine
