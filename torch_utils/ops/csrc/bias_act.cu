// The CUDA form of bias_act: one read and one write of memory, 16 bytes at a time.

#include "bias_act.h"
#include "launch.cuh"

namespace di_refine {
namespace {

constexpr int kThreads = 256;
// Vectors a thread loads before it uses the first; the smooth functions need the registers themselves.
template <bool SMOOTH> constexpr int kInFlight = SMOOTH ? 1 : 2;

template <typename T, bool SMOOTH, int ORDER, int V>
__global__ void __launch_bounds__(kThreads) bias_act_kernel(const BiasActParams p, const BiasAccess access) {
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t me = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t vectors = p.numel / V;
    for (int64_t i = me; i < vectors; i += threads * kInFlight<SMOOTH>)
        bias_act_vectors<T, SMOOTH, ORDER, V, kInFlight<SMOOTH>>(p, access, i, threads);
    if constexpr (V > 1) {
        const BiasAccess single = access == kNoBias ? kNoBias : kOneBias;
        for (int64_t i = vectors * V + me; i < p.numel; i += threads)
            bias_act_vectors<T, SMOOTH, ORDER, 1, 1>(p, single, i, threads);
    }
}

template <typename T, bool SMOOTH, int ORDER, int V>
const char* launch(const BiasActParams& p, cudaStream_t stream) {
    unsigned blocks = 0;
    const int64_t work = (p.numel + V * kInFlight<SMOOTH> - 1) / (V * kInFlight<SMOOTH>);
    if (const char* error = grid_size(work, kThreads, blocks)) return error;
    bias_act_kernel<T, SMOOTH, ORDER, V><<<blocks, kThreads, 0, stream>>>(p, bias_access<T, V>(p));
    return launch_status();
}

template <typename T, bool SMOOTH, int ORDER> const char* by_alignment(const BiasActParams& p, cudaStream_t stream) {
    const bool wide = aligned(p.in, 16) && aligned(p.ref, 16) && aligned(p.dy, 16) && aligned(p.out, 16);
    return wide ? launch<T, SMOOTH, ORDER, kVec<T>>(p, stream) : launch<T, SMOOTH, ORDER, 1>(p, stream);
}

template <typename T> const char* by_order(const BiasActParams& p, cudaStream_t stream) {
    const bool smooth = is_smooth(p.act);
    if (p.order == 0) return smooth ? by_alignment<T, true, 0>(p, stream) : by_alignment<T, false, 0>(p, stream);
    if (p.order == 1) return smooth ? by_alignment<T, true, 1>(p, stream) : by_alignment<T, false, 1>(p, stream);
    return smooth ? by_alignment<T, true, 2>(p, stream) : "this activation has no second derivative";
}

}  // namespace
}  // namespace di_refine

extern "C" const char* di_refine_bias_act(const di_refine::BiasActParams* p, void* stream) {
    using namespace di_refine;
    if (p->numel == 0) return nullptr;
    return by_dtype(p->dtype, [&](auto t) { return by_order<decltype(t)>(*p, static_cast<cudaStream_t>(stream)); });
}
