// The CPU form of bias_act, from the same header as the CUDA form.

#include "bias_act.h"
#include "cpu.h"

namespace di_refine {
namespace {

// Neighbours `begin` to `end`, whose bias is `b[0]`, or `b[0]`, `b[1]`, ... where EACH.
template <typename T, bool SMOOTH, int ORDER, bool EACH>
void bias_act_run(const BiasActParams& p, const BiasActScalars<compute_t<T>>& s, const T* b, int64_t begin, int64_t end) {
    using C = compute_t<T>;
    const T *in = static_cast<const T*>(p.in), *ref = static_cast<const T*>(p.ref), *dy = static_cast<const T*>(p.dy);
    if (ORDER > 0 && !ref) ref = in;  // any number will do where the derivative is constant
    T* out = static_cast<T*>(p.out);
    const C bias = b ? widen(b[0]) : C(0);
    DR_LANES
    for (int64_t i = begin; i < end; i++) {
        const C own_bias = EACH ? widen(b[i - begin]) : bias;
        const C ref_i = ORDER > 0 ? widen(ref[i]) : C(0), dy_i = ORDER == 2 ? widen(dy[i]) : C(0);
        narrow(bias_act_element<C, SMOOTH, ORDER>(s, widen(in[i]), own_bias, ref_i, dy_i), out[i]);
    }
}

template <typename T, bool SMOOTH, int ORDER> void bias_act_runs(const BiasActParams& p) {
    const BiasActScalars<compute_t<T>> s(p);
    const T* b = bias_access<T, 1>(p) == kNoBias ? nullptr : static_cast<const T*>(p.b);
    const bool each = b && p.b_stride == 1;  // a run then is one round of all biases
    const int64_t length = !b ? std::min<int64_t>(std::max<int64_t>(p.numel, 1), 4096) : each ? p.b_size : p.b_stride;
    in_parallel((p.numel + length - 1) / length, length, [&](int64_t first, int64_t last) {
        for (int64_t run = first; run < last; run++) {
            const int64_t begin = run * length, end = std::min(begin + length, p.numel);
            if (each)
                bias_act_run<T, SMOOTH, ORDER, true>(p, s, b, begin, end);
            else
                bias_act_run<T, SMOOTH, ORDER, false>(p, s, b ? b + run % p.b_size : nullptr, begin, end);
        }
    });
}

// As the threads of the CUDA kernel do it, one after another.
template <typename T, bool SMOOTH, int ORDER> void bias_act_like_cuda(const BiasActParams& p) {
    constexpr int V = kVec<T>, U = SMOOTH ? 1 : 2;
    const BiasAccess access = bias_access<T, V>(p);
    const int64_t vectors = p.numel / V, threads = 32;
    for (int64_t me = 0; me < threads; me++)
        for (int64_t i = me; i < vectors; i += threads * U)
            bias_act_vectors<T, SMOOTH, ORDER, V, U>(p, access, i, threads);
    const BiasAccess single = access == kNoBias ? kNoBias : kOneBias;
    for (int64_t i = vectors * V; i < p.numel; i++) bias_act_vectors<T, SMOOTH, ORDER, 1, 1>(p, single, i, 1);
}

template <typename T, bool SMOOTH, int ORDER> void bias_act_typed(const BiasActParams& p) {
    const bool wide = aligned(p.in, 16) && aligned(p.ref, 16) && aligned(p.dy, 16) && aligned(p.out, 16);
    cuda_shapes && wide ? bias_act_like_cuda<T, SMOOTH, ORDER>(p) : bias_act_runs<T, SMOOTH, ORDER>(p);
}

template <typename T> const char* bias_act(const BiasActParams& p) {
    const bool smooth = is_smooth(p.act);
    if (p.order == 0)
        smooth ? bias_act_typed<T, true, 0>(p) : bias_act_typed<T, false, 0>(p);
    else if (p.order == 1)
        smooth ? bias_act_typed<T, true, 1>(p) : bias_act_typed<T, false, 1>(p);
    else if (smooth)
        bias_act_typed<T, true, 2>(p);
    else
        return "this activation has no second derivative";
    return nullptr;
}

}  // namespace
}  // namespace di_refine

extern "C" const char* di_refine_bias_act(const di_refine::BiasActParams* p, void*) {
    using namespace di_refine;
    switch (p->dtype) {
        case kHalf: return bias_act<half_t>(*p);
        case kBFloat16: return bias_act<bfloat16_t>(*p);
        case kFloat: return bias_act<float>(*p);
        default: return bias_act<double>(*p);
    }
}
