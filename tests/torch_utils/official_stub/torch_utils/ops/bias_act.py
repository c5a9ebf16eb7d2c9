import math
import types

import torch
import torch.nn.functional as F

_FUNCTIONS = {
    "linear": (lambda x, alpha: x, 0, 1),
    "relu": (lambda x, alpha: F.relu(x), 0, math.sqrt(2)),
    "lrelu": (F.leaky_relu, 0.2, math.sqrt(2)),
    "tanh": (lambda x, alpha: torch.tanh(x), 0, 1),
    "sigmoid": (lambda x, alpha: torch.sigmoid(x), 0, 1),
    "swish": (lambda x, alpha: x * torch.sigmoid(x), 0, math.sqrt(2)),
}
activation_funcs = {
    name: types.SimpleNamespace(func=func, def_alpha=alpha, def_gain=gain)
    for name, (func, alpha, gain) in _FUNCTIONS.items()
}


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="cuda"):
    spec = activation_funcs[act]
    if b is not None:
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = spec.func(x, spec.def_alpha if alpha is None else alpha) * (spec.def_gain if gain is None else gain)
    return x if clamp is None else x.clamp(-clamp, clamp)
