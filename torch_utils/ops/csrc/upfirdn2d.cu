// The CUDA form of upfirdn2d: a thread computes a tile of the result from samples that neighbours find in the L1 cache.

#include "launch.cuh"
#include "upfirdn2d.h"

namespace di_refine {
namespace {

constexpr int kThreads = 256;

template <typename T, int UP, int DOWN, int TW, int TH, int V>
__global__ void __launch_bounds__(kThreads) tile_kernel(const Upfirdn2dParams p, const int64_t count) {
    using C = compute_t<T>;
    constexpr int kTaps = kTileTaps * kTileTaps;
    __shared__ C shared_taps[kTaps];
    fill_taps(p, kTileTaps, kTileTaps, shared_taps, threadIdx.x, kThreads);
    __syncthreads();
    C taps[kTaps];
    DR_UNROLL
    for (int k = 0; k < kTaps; k++) taps[k] = shared_taps[k];
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
         i += static_cast<int64_t>(gridDim.x) * kThreads)
        upfirdn2d_tile<T, UP, DOWN, TW, TH, V>(p, taps, i);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pixel_kernel(const Upfirdn2dParams p, const int64_t count) {
    __shared__ compute_t<T> taps[kMaxTaps * kMaxTaps];
    fill_taps(p, p.fh, p.fw, taps, threadIdx.x, kThreads);
    __syncthreads();
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
         i += static_cast<int64_t>(gridDim.x) * kThreads)
        upfirdn2d_pixel<T>(p, taps, i);
}

template <typename T, int UP, int DOWN, bool CHANNELS_LAST>
const char* launch_tiles(const Upfirdn2dParams& p, cudaStream_t stream) {
    using Tile = CudaTile<T, UP, DOWN, CHANNELS_LAST>;
    const int64_t count = TileGrid<UP, Tile::W, Tile::H, Tile::V>(p).count;
    unsigned blocks = 0;
    if (const char* error = grid_size(count, kThreads, blocks)) return error;
    tile_kernel<T, UP, DOWN, Tile::W, Tile::H, Tile::V><<<blocks, kThreads, 0, stream>>>(p, count);
    return launch_status();
}

template <typename T> const char* launch_pixels(const Upfirdn2dParams& p, cudaStream_t stream) {
    const int64_t count = p.n * p.c * p.out_h * p.out_w;
    unsigned blocks = 0;
    if (const char* error = grid_size(count, kThreads, blocks)) return error;
    pixel_kernel<T><<<blocks, kThreads, 0, stream>>>(p, count);
    return launch_status();
}

template <typename T, bool CHANNELS_LAST> const char* by_path(const Upfirdn2dParams& p, cudaStream_t stream) {
    switch (tiles_fit<T, CHANNELS_LAST ? kVec<T> : 1>(p) ? path_of(p) : kPixels) {
        case kPlain: return launch_tiles<T, 1, 1, CHANNELS_LAST>(p, stream);
        case kUp2: return launch_tiles<T, 2, 1, CHANNELS_LAST>(p, stream);
        case kDown2: return launch_tiles<T, 1, 2, CHANNELS_LAST>(p, stream);
        default: return launch_pixels<T>(p, stream);
    }
}

}  // namespace
}  // namespace di_refine

extern "C" const char* di_refine_upfirdn2d(const di_refine::Upfirdn2dParams* p, void* stream) {
    using namespace di_refine;
    if (p->n * p->c == 0) return nullptr;
    const auto s = static_cast<cudaStream_t>(stream);
    return by_dtype(p->dtype, [&](auto t) {
        using T = decltype(t);
        return p->channels_last ? by_path<T, true>(*p, s) : by_path<T, false>(*p, s);
    });
}
