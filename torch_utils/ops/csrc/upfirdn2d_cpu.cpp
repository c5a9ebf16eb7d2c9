// The CPU form of upfirdn2d, from the same header as the CUDA form.

#include "cpu.h"
#include "upfirdn2d.h"

namespace di_refine {

bool cuda_shapes = false;

namespace {

template <typename T, int UP, int DOWN, int TW, int TH, int V> void upfirdn2d_tiles(const Upfirdn2dParams& p) {
    using C = compute_t<T>;
    C taps[kTileTaps * kTileTaps];
    fill_taps(p, kTileTaps, kTileTaps, taps, 0, 1);
    in_parallel(TileGrid<UP, TW, TH, V>(p).count, TW * TH * V, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) upfirdn2d_tile<T, UP, DOWN, TW, TH, V>(p, taps, i);
    });
}

template <typename T> void upfirdn2d_pixels(const Upfirdn2dParams& p) {
    compute_t<T> taps[kMaxTaps * kMaxTaps];
    fill_taps(p, p.fh, p.fw, taps, 0, 1);
    in_parallel(p.n * p.c * p.out_h * p.out_w, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) upfirdn2d_pixel<T>(p, taps, i);
    });
}

template <typename T, int UP, int DOWN> const char* upfirdn2d_shaped(const Upfirdn2dParams& p) {
    using Nchw = CudaTile<T, UP, DOWN, false>;
    using Nhwc = CudaTile<T, UP, DOWN, true>;
    if (p.channels_last)
        upfirdn2d_tiles<T, UP, DOWN, Nhwc::W, Nhwc::H, Nhwc::V>(p);
    else if (cuda_shapes || sizeof(T) < 4)
        upfirdn2d_tiles<T, UP, DOWN, Nchw::W, Nchw::H, 1>(p);
    else if constexpr (sizeof(T) >= 4)
        upfirdn2d_tiles<T, UP, DOWN, 16, 4, 1>(p);
    return nullptr;
}

template <typename T> const char* upfirdn2d(const Upfirdn2dParams& p) {
    switch (p.channels_last ? (tiles_fit<T, kVec<T>>(p) ? path_of(p) : kPixels) : path_of(p)) {
        case kPlain: return upfirdn2d_shaped<T, 1, 1>(p);
        case kUp2: return upfirdn2d_shaped<T, 2, 1>(p);
        case kDown2: return upfirdn2d_shaped<T, 1, 2>(p);
        default: upfirdn2d_pixels<T>(p); return nullptr;
    }
}

}  // namespace
}  // namespace di_refine

extern "C" const char* di_refine_upfirdn2d(const di_refine::Upfirdn2dParams* p, void*) {
    using namespace di_refine;
    switch (p->dtype) {
        case kHalf: return upfirdn2d<half_t>(*p);
        case kBFloat16: return upfirdn2d<bfloat16_t>(*p);
        case kFloat: return upfirdn2d<float>(*p);
        default: return upfirdn2d<double>(*p);
    }
}

extern "C" __attribute__((visibility("default"))) void di_refine_cuda_shapes(int on) {
    di_refine::cuda_shapes = on != 0;
}
