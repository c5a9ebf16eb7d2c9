// The operators as PyTorch knows them: tensors to pointers, and derivatives of any order.
//
// Their schemas and shapes without data are in compiled.py. This file is built twice, for CPU and with DI_REFINE_CUDA.

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#ifdef DI_REFINE_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

#include "api.h"

namespace di_refine {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

void* current_stream() {
#ifdef DI_REFINE_CUDA
    return c10::cuda::getCurrentCUDAStream().stream();
#else
    return nullptr;
#endif
}

DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kHalf: return kHalf;
        case at::kBFloat16: return kBFloat16;
        case at::kFloat: return kFloat;
        case at::kDouble: return kDouble;
        default: TORCH_CHECK_VALUE(false, "the compiled operators take float16 to float64, not ", t.scalar_type());
    }
}

void check(const char* error, const char* op) { TORCH_CHECK(!error, op, ": ", error); }

// ---------------------------------------------------------------------------------------------------------------------
// bias_act

// `t` in the memory order of `like`, which is dense.
Tensor in_order_of(const Tensor& like, const Tensor& t) {
    return t.strides() == like.strides() ? t : at::empty_like(like).copy_(t);
}

Tensor run_bias_act(int order, const Tensor& in, const OptionalTensor& ref, const OptionalTensor& dy,
                    const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
    const c10::DeviceGuard guard(in.device());
    const Tensor out = at::empty_like(ref ? *ref : in);
    const Tensor dense_in = in_order_of(out, in);
    const Tensor dense_ref = ref ? in_order_of(out, *ref) : Tensor();
    const Tensor dense_dy = dy ? in_order_of(out, *dy) : Tensor();
    const Tensor dense_b = b ? b->contiguous() : Tensor();
    BiasActParams p{};
    p.order = order;
    p.dtype = dtype_of(in);
    p.act = static_cast<Activation>(act);
    p.in = dense_in.const_data_ptr();
    p.ref = ref ? dense_ref.const_data_ptr() : nullptr;
    p.dy = dy ? dense_dy.const_data_ptr() : nullptr;
    p.b = b ? dense_b.const_data_ptr() : nullptr;
    p.out = out.mutable_data_ptr();
    p.numel = out.numel();
    p.b_stride = b ? std::max<int64_t>(1, out.stride(dim)) : 1;
    p.b_size = b ? std::max<int64_t>(1, b->numel()) : 1;
    p.alpha = alpha;
    p.gain = gain;
    p.clamp = clamp;
    if (p.numel > 0) check(di_refine_bias_act(&p, current_stream()), "bias_act");
    return out;
}

Tensor bias_act(const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain,
                double clamp) {
    return run_bias_act(0, x, {}, {}, b, dim, act, alpha, gain, clamp);
}

Tensor bias_act_grad(const Tensor& dy, const OptionalTensor& ref, const OptionalTensor& b, int64_t dim, int64_t act,
                     double alpha, double gain, double clamp) {
    return run_bias_act(1, dy, ref, {}, b, dim, act, alpha, gain, clamp);
}

Tensor bias_act_grad2(const Tensor& v, const Tensor& dy, const Tensor& ref, const OptionalTensor& b, int64_t dim,
                      int64_t act, double alpha, double gain, double clamp) {
    return run_bias_act(2, v, ref, dy, b, dim, act, alpha, gain, clamp);
}

template <typename F> c10::TypedOperatorHandle<F> find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

Tensor call_bias_act(const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain,
                     double clamp) {
    static const auto op = find<decltype(bias_act)>("di_refine::bias_act");
    return op.call(x, b, dim, act, alpha, gain, clamp);
}

Tensor call_bias_act_grad(const Tensor& dy, const OptionalTensor& ref, const OptionalTensor& b, int64_t dim,
                          int64_t act, double alpha, double gain, double clamp) {
    static const auto op = find<decltype(bias_act_grad)>("di_refine::bias_act_grad");
    return op.call(dy, ref, b, dim, act, alpha, gain, clamp);
}

Tensor call_bias_act_grad2(const Tensor& v, const Tensor& dy, const Tensor& ref, const OptionalTensor& b, int64_t dim,
                           int64_t act, double alpha, double gain, double clamp) {
    static const auto op = find<decltype(bias_act_grad2)>("di_refine::bias_act_grad2");
    return op.call(v, dy, ref, b, dim, act, alpha, gain, clamp);
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

Tensor sum_to_bias(const Tensor& dx, int64_t dim) {
    std::vector<int64_t> others;
    for (int64_t axis = 0; axis < dx.dim(); axis++)
        if (axis != dim) others.push_back(axis);
    return others.empty() ? dx : dx.sum(others);
}

// The numbers of a call, as autograd keeps them between its passes.
struct Settings {
    int64_t dim, act;
    double alpha, gain, clamp;

    void save(AutogradContext* ctx) const {
        ctx->saved_data["dim"] = dim;
        ctx->saved_data["act"] = act;
        ctx->saved_data["alpha"] = alpha;
        ctx->saved_data["gain"] = gain;
        ctx->saved_data["clamp"] = clamp;
    }
    explicit Settings(AutogradContext* ctx)
        : Settings(ctx->saved_data["dim"].toInt(), ctx->saved_data["act"].toInt(),
                   ctx->saved_data["alpha"].toDouble(), ctx->saved_data["gain"].toDouble(),
                   ctx->saved_data["clamp"].toDouble()) {}
    Settings(int64_t dim, int64_t act, double alpha, double gain, double clamp)
        : dim(dim), act(act), alpha(alpha), gain(gain), clamp(clamp) {}
    bool smooth() const { return act > kLrelu; }
    bool constant_slope() const { return act == kLinear && clamp < 0; }
};

// dx = slope(ref) * dy: linear in dy, and through the saved tensor a function of x, which autograd follows by itself
// where the saved tensor is y.
struct BiasActGrad : torch::autograd::Function<BiasActGrad> {
    static Tensor forward(AutogradContext* ctx, const Tensor& dy, const OptionalTensor& ref, const OptionalTensor& b,
                          int64_t dim, int64_t act, double alpha, double gain, double clamp) {
        Settings(dim, act, alpha, gain, clamp).save(ctx);
        ctx->save_for_backward({dy, ref.value_or(Tensor()), b.value_or(Tensor())});
        const at::AutoDispatchBelowADInplaceOrView below;
        return call_bias_act_grad(dy, ref, b, dim, act, alpha, gain, clamp);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &v = grads[0], &dy = saved[0], &ref = saved[1];
        const OptionalTensor b = optional(saved[2]);
        const Settings s(ctx);
        Tensor d_dy, d_ref, d_b;
        // Optional tensors that are absent are not counted; ref is present for every smooth function.
        const bool wants_ref = s.smooth() && ctx->needs_input_grad(1), wants_b = b && ctx->needs_input_grad(2);
        if (ctx->needs_input_grad(0))
            d_dy = call_bias_act_grad(v, optional(ref), b, s.dim, s.act, s.alpha, s.gain, s.clamp);
        if (wants_ref || wants_b) {
            d_ref = call_bias_act_grad2(v, dy, ref, b, s.dim, s.act, s.alpha, s.gain, s.clamp);
            if (wants_b) d_b = sum_to_bias(d_ref, s.dim);
        }
        return {d_dy, d_ref, d_b, {}, {}, {}, {}, {}};
    }
};

struct BiasAct : torch::autograd::Function<BiasAct> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act,
                          double alpha, double gain, double clamp) {
        const Settings s(dim, act, alpha, gain, clamp);
        s.save(ctx);
        ctx->saved_data["has_b"] = b.has_value();
        Tensor y;
        {
            const at::AutoDispatchBelowADInplaceOrView below;
            y = call_bias_act(x, b, dim, act, alpha, gain, clamp);
        }
        if (act == kSwish)
            ctx->save_for_backward({x, b.value_or(Tensor())});
        else
            ctx->save_for_backward({s.constant_slope() ? Tensor() : y, Tensor()});
        return y;
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Settings s(ctx);
        const Tensor dx = call_bias_act_grad(grads[0], optional(saved[0]), optional(saved[1]), s.dim, s.act, s.alpha,
                                             s.gain, s.clamp);
        const bool wants_b = ctx->saved_data["has_b"].toBool() && ctx->needs_input_grad(1);
        return {dx, wants_b ? sum_to_bias(dx, s.dim) : Tensor(), {}, {}, {}, {}, {}};
    }
};

Tensor bias_act_autograd(const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain,
                         double clamp) {
    return BiasAct::apply(x, b, dim, act, alpha, gain, clamp);
}

Tensor bias_act_grad_autograd(const Tensor& dy, const OptionalTensor& ref, const OptionalTensor& b, int64_t dim,
                              int64_t act, double alpha, double gain, double clamp) {
    return BiasActGrad::apply(dy, ref, b, dim, act, alpha, gain, clamp);
}

// The second derivative from PyTorch's own operators, for those who differentiate a third time.
Tensor composed_grad2(const Tensor& v, const Tensor& dy, const Tensor& ref, const OptionalTensor& b, const Settings& s) {
    Tensor change, y = ref;
    const Tensor u = s.act == kSwish || s.gain == 0 ? ref : ref / s.gain;
    switch (s.act) {
        case kTanh: change = -2 * u; break;
        case kSigmoid: change = 1 - 2 * u; break;
        case kElu: case kSelu: change = at::where(u > 0, at::zeros_like(u), at::zeros_like(u) + 1); break;
        case kSoftplus: change = at::where(u > 20, at::zeros_like(u), at::exp(-u)); break;
        default: {
            std::vector<int64_t> shape(ref.dim(), 1);
            shape[s.dim] = -1;
            const Tensor z = b ? ref + b->reshape(shape) : ref;
            const Tensor sigmoid = at::sigmoid(z);
            y = z * sigmoid * s.gain;
            change = sigmoid * (1 - sigmoid) * (2 + z * (1 - 2 * sigmoid)) * s.gain;
        }
    }
    const Tensor result = v * dy * change;
    return s.clamp < 0 ? result : at::where(y.abs() < s.clamp, result, at::zeros_like(result));
}

Tensor bias_act_grad2_autograd(const Tensor& v, const Tensor& dy, const Tensor& ref, const OptionalTensor& b,
                               int64_t dim, int64_t act, double alpha, double gain, double clamp) {
    const bool differentiated = v.requires_grad() || dy.requires_grad() || ref.requires_grad() || (b && b->requires_grad());
    if (at::GradMode::is_enabled() && differentiated)
        return composed_grad2(v, dy, ref, b, Settings(dim, act, alpha, gain, clamp));
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_bias_act_grad2(v, dy, ref, b, dim, act, alpha, gain, clamp);
}

// ---------------------------------------------------------------------------------------------------------------------
// upfirdn2d

int checked_int(int64_t v) {
    TORCH_CHECK_VALUE(v >= INT32_MIN && v <= INT32_MAX, "upfirdn2d: an image side or padding of ", v, " is too large");
    return static_cast<int>(v);
}

// One pass with a filter [fh, fw], or with [taps] along both axes at once.
Tensor upfirdn2d_pass(const Tensor& x, const OptionalTensor& f, at::IntArrayRef up, at::IntArrayRef down,
                      at::IntArrayRef padding, bool flip, double gain) {
    Upfirdn2dParams p{};
    p.fw = f ? checked_int(f->size(-1)) : 1;
    p.fh = f ? checked_int(f->size(0)) : 1;
    const int64_t out_w = (x.size(3) * up[0] + padding[0] + padding[1] - p.fw) / down[0] + 1;
    const int64_t out_h = (x.size(2) * up[1] + padding[2] + padding[3] - p.fh) / down[1] + 1;
    p.channels_last = x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
    const auto format = p.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const Tensor dense = p.channels_last ? x : x.contiguous();
    const Tensor taps = f ? f->contiguous() : Tensor();
    const Tensor y = at::empty({x.size(0), x.size(1), out_h, out_w}, x.options().memory_format(format));
    p.dtype = dtype_of(x);
    p.x = dense.const_data_ptr();
    p.y = y.mutable_data_ptr();
    p.f = f ? taps.const_data_ptr<float>() : nullptr;
    p.outer = f && f->dim() == 1;
    p.flip = flip;
    p.gain = gain;
    p.up_x = checked_int(up[0]), p.up_y = checked_int(up[1]);
    p.down_x = checked_int(down[0]), p.down_y = checked_int(down[1]);
    p.pad_x0 = checked_int(padding[0]), p.pad_y0 = checked_int(padding[2]);
    p.n = x.size(0), p.c = x.size(1);
    p.in_h = checked_int(x.size(2) * up[1]) / p.up_y, p.in_w = checked_int(x.size(3) * up[0]) / p.up_x;
    p.out_h = checked_int(out_h), p.out_w = checked_int(out_w);
    if (y.numel() > 0) check(di_refine_upfirdn2d(&p, current_stream()), "upfirdn2d");
    return y;
}

constexpr int64_t kOuterTaps = 4;  // from here on two one-dimensional passes are cheaper than their product

Tensor upfirdn2d(const Tensor& x, const OptionalTensor& f, at::IntArrayRef up, at::IntArrayRef down,
                 at::IntArrayRef padding, bool flip, double gain) {
    const c10::DeviceGuard guard(x.device());
    if (!f || f->dim() == 2 || f->numel() <= kOuterTaps) return upfirdn2d_pass(x, f, up, down, padding, flip, gain);
    const Tensor rows =
        upfirdn2d_pass(x, f->unsqueeze(0), {up[0], 1}, {down[0], 1}, {padding[0], padding[1], 0, 0}, flip, 1);
    return upfirdn2d_pass(rows, f->unsqueeze(1), {1, up[1]}, {1, down[1]}, {0, 0, padding[2], padding[3]}, flip, gain);
}

using Upfirdn2dSignature = Tensor(const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef,
                                  c10::SymIntArrayRef, bool, double);

// The transpose of up-sampling is down-sampling with the reversed filter, and the other way round.
struct Upfirdn2d : torch::autograd::Function<Upfirdn2d> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& f, std::vector<int64_t> up,
                          std::vector<int64_t> down, std::vector<c10::SymInt> padding, bool flip, double gain);
    static variable_list backward(AutogradContext* ctx, const variable_list& grads);
};

Tensor upfirdn2d_autograd(const Tensor& x, const OptionalTensor& f, at::IntArrayRef up, at::IntArrayRef down,
                          c10::SymIntArrayRef padding, bool flip, double gain) {
    return Upfirdn2d::apply(x, f, up.vec(), down.vec(), padding.vec(), flip, gain);
}

Tensor Upfirdn2d::forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& f, std::vector<int64_t> up,
                          std::vector<int64_t> down, std::vector<c10::SymInt> padding, bool flip, double gain) {
    static const auto op = find<Upfirdn2dSignature>("di_refine::upfirdn2d");
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor y = op.call(x, f, up, down, padding, flip, gain);
    const c10::SymInt fw = f ? f->sym_size(-1) : c10::SymInt(1), fh = f ? f->sym_size(0) : c10::SymInt(1);
    const auto last = [&](int axis, const c10::SymInt& pad0) {  // so that the gradient gets the size of x
        return x.sym_size(3 - axis) * up[axis] - y.sym_size(3 - axis) * down[axis] + pad0 - up[axis] + 1;
    };
    std::vector<c10::SymInt> back{fw - 1 - padding[0], last(0, padding[0]), fh - 1 - padding[2], last(1, padding[2])};
    ctx->save_for_backward({f.value_or(Tensor())});
    ctx->saved_data["up"] = up;
    ctx->saved_data["down"] = down;
    ctx->saved_data["padding"] = back;
    ctx->saved_data["flip"] = flip;
    ctx->saved_data["gain"] = gain;
    return y;
}

variable_list Upfirdn2d::backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<Upfirdn2dSignature>("di_refine::upfirdn2d");
    auto& data = ctx->saved_data;
    const auto padding = data["padding"].toListRef();
    std::vector<c10::SymInt> back;
    for (const auto& value : padding) back.push_back(value.toSymInt());
    const Tensor dx = op.call(grads[0], optional(ctx->get_saved_variables()[0]), data["down"].toIntVector(),
                              data["up"].toIntVector(), back, !data["flip"].toBool(), data["gain"].toDouble());
    return {dx, {}, {}, {}, {}, {}, {}};
}

}  // namespace
}  // namespace di_refine

#ifdef DI_REFINE_CUDA
#define DI_REFINE_KEY CUDA
#define DI_REFINE_AUTOGRAD_KEY AutogradCUDA
#else
#define DI_REFINE_KEY CPU
#define DI_REFINE_AUTOGRAD_KEY AutogradCPU
#endif

TORCH_LIBRARY_IMPL(di_refine, DI_REFINE_KEY, m) {
    m.impl("bias_act", di_refine::bias_act);
    m.impl("bias_act_grad", di_refine::bias_act_grad);
    m.impl("bias_act_grad2", di_refine::bias_act_grad2);
    m.impl("upfirdn2d", di_refine::upfirdn2d);
}

TORCH_LIBRARY_IMPL(di_refine, DI_REFINE_AUTOGRAD_KEY, m) {
    m.impl("bias_act", di_refine::bias_act_autograd);
    m.impl("bias_act_grad", di_refine::bias_act_grad_autograd);
    m.impl("bias_act_grad2", di_refine::bias_act_grad2_autograd);
    m.impl("upfirdn2d", di_refine::upfirdn2d_autograd);
}
