// clamp(gain * act(x + b)) with its first and second derivative: the arithmetic of the CUDA and of the CPU form.
//
// A derivative comes from one saved tensor: the value y, or for swish, whose value does not determine its input, x.
#pragma once

#include "api.h"
#include "scalar.h"

namespace di_refine {

constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;

template <typename C> DR_INLINE C sigmoid(C x) { return C(1) / (C(1) + std::exp(-x)); }

// Linear, relu and lrelu are one formula with this slope below zero.
DR_INLINE bool is_smooth(Activation act) { return act > kLrelu; }
DR_INLINE double negative_slope(const BiasActParams& p) { return p.act == kLinear ? 1 : p.act == kRelu ? 0 : p.alpha; }

template <typename C> DR_INLINE C activate(Activation act, C x) {
    switch (act) {
        case kTanh: return std::tanh(x);
        case kSigmoid: return sigmoid(x);
        case kElu: return x > 0 ? x : std::expm1(x);
        case kSelu: return C(kSeluScale) * (x > 0 ? x : C(kSeluAlpha) * std::expm1(x));
        case kSoftplus: return x > 20 ? x : std::log1p(std::exp(x));
        case kSwish: return x / (C(1) + std::exp(-x));
        default: return x;
    }
}

// d act / d x as a function of u = act(x); for swish, of x.
template <typename C> DR_INLINE C slope(Activation act, C u) {
    switch (act) {
        case kTanh: return C(1) - u * u;
        case kSigmoid: return u * (C(1) - u);
        case kElu: return u > 0 ? C(1) : u + C(1);
        case kSelu: return u > 0 ? C(kSeluScale) : u + C(kSeluScale * kSeluAlpha);
        case kSoftplus: return u > 20 ? C(1) : -std::expm1(-u);
        case kSwish: { const C s = sigmoid(u); return s * (C(1) + u * (C(1) - s)); }
        default: return C(1);
    }
}

// d slope / d u.
template <typename C> DR_INLINE C slope_change(Activation act, C u) {
    switch (act) {
        case kTanh: return C(-2) * u;
        case kSigmoid: return C(1) - C(2) * u;
        case kElu: case kSelu: return u > 0 ? C(0) : C(1);
        case kSoftplus: return u > 20 ? C(0) : std::exp(-u);
        case kSwish: { const C s = sigmoid(u); return s * (C(1) - s) * (C(2) + u * (C(1) - C(2) * s)); }
        default: return C(0);
    }
}

// The numbers of a call in the type it computes in.
template <typename C> struct BiasActScalars {
    Activation act;
    C negative, gain, inverse_gain, clamp;
    DR_INLINE explicit BiasActScalars(const BiasActParams& p)
        : act(p.act), negative(C(negative_slope(p))), gain(C(p.gain)),
          inverse_gain(C(p.gain == 0 ? 0 : 1 / p.gain)), clamp(C(p.clamp)) {}
};

// One element. ORDER and the operands are those of BiasActParams; SMOOTH is is_smooth(act).
template <typename C, bool SMOOTH, int ORDER>
DR_INLINE C bias_act_element(const BiasActScalars<C>& s, C in, C bias, C ref, C dy) {
    if constexpr (ORDER == 0) {
        const C x = in + bias;
        C y;
        if constexpr (SMOOTH)
            y = activate(s.act, x);
        else  // minus infinity times zero is not relu's zero, and a NaN must stay one
            y = x > 0 ? x : (s.negative == 0 && x < 0) ? C(0) : x * s.negative;
        y *= s.gain;
        return s.clamp < 0 ? y : y > s.clamp ? s.clamp : y < -s.clamp ? -s.clamp : y;
    } else {
        const bool from_x = SMOOTH && s.act == kSwish;
        const C u = from_x ? ref + bias : ref * s.inverse_gain;
        const C y = from_x ? activate(s.act, u) * s.gain : ref;
        C result;
        if constexpr (ORDER == 1) {
            if constexpr (SMOOTH)
                result = in * slope(s.act, u) * s.gain;
            else
                result = in * (u > 0 ? C(1) : s.negative) * s.gain;
        } else {  // with respect to the saved tensor: for y the gain cancels
            result = in * dy * slope_change(s.act, u) * (from_x ? s.gain : C(1));
        }
        return s.clamp >= 0 && !(std::abs(y) < s.clamp) ? C(0) : result;
    }
}

// How a vector of V elements finds its bias.
enum BiasAccess : int { kNoBias, kOneBias, kBiasVector, kAnyBias };

template <typename T, int V> inline BiasAccess bias_access(const BiasActParams& p) {
    if (!p.b || (p.order > 0 && p.act != kSwish)) return kNoBias;
    if (p.b_stride % V == 0) return kOneBias;
    return p.b_stride == 1 && p.b_size % V == 0 && aligned(p.b, sizeof(T) * V) ? kBiasVector : kAnyBias;
}

// The U vectors of V elements number `first`, `first + step`, ...: all loads before the first use.
template <typename T, bool SMOOTH, int ORDER, int V, int U>
DR_INLINE void bias_act_vectors(const BiasActParams& p, BiasAccess access, int64_t first, int64_t step) {
    using C = compute_t<T>;
    using Pack = Vec<T, V>;
    const BiasActScalars<C> s(p);
    const int64_t count = p.numel / V;
    const T* b = static_cast<const T*>(p.b);
    const bool has_ref = ORDER > 0 && p.ref;
    Pack in[U], ref[U], dy[U], bias[U], out;
    DR_UNROLL
    for (int u = 0; u < U; u++) {
        const int64_t at = first + u * step;
        if (at >= count) break;
        in[u] = load<T, V>(static_cast<const T*>(p.in) + at * V);
        if (has_ref) ref[u] = load<T, V>(static_cast<const T*>(p.ref) + at * V);
        if constexpr (ORDER == 2) dy[u] = load<T, V>(static_cast<const T*>(p.dy) + at * V);
        int64_t index = at * V;
        if (access == kNoBias) continue;
        if (V == 1 || access == kOneBias) {
            split(index, p.b_stride);
            bias[u].v[0] = b[split(index, p.b_size)];
        } else if (access == kBiasVector) {
            bias[u] = load<T, V>(b + split(index, p.b_size));
        } else {
            for (int v = 0; v < V; v++) {
                index = at * V + v;
                split(index, p.b_stride);
                bias[u].v[v] = b[split(index, p.b_size)];
            }
        }
    }
    DR_UNROLL
    for (int u = 0; u < U; u++) {
        const int64_t at = first + u * step;
        if (at >= count) break;
        const bool one = V == 1 || access == kOneBias;
        const C shared_bias = access != kNoBias && one ? widen(bias[u].v[0]) : C(0);
        DR_UNROLL
        for (int v = 0; v < V; v++) {
            const C own_bias = access == kNoBias || one ? shared_bias : widen(bias[u].v[v]);
            C dy_v = 0;
            if constexpr (ORDER == 2) dy_v = widen(dy[u].v[v]);
            const C ref_v = has_ref ? widen(ref[u].v[v]) : C(0);
            narrow(bias_act_element<C, SMOOTH, ORDER>(s, widen(in[u].v[v]), own_bias, ref_v, dy_v), out.v[v]);
        }
        store(static_cast<T*>(p.out) + at * V, out);
    }
}

}  // namespace di_refine
