"""A stand-in for the official module of this name, which runs the source text in a pickle to rebuild its networks."""

import copy
import sys
import types

_modules = {}


def persistent_class(orig_class):
    """As in the official module, the result is a subclass that records the constructor arguments."""

    class Decorator(orig_class):
        def __init__(self, *args, **kwargs):
            self._init_args = copy.deepcopy(args)
            self._init_kwargs = copy.deepcopy(kwargs)
            super().__init__(*args, **kwargs)

        @property
        def init_args(self):
            return copy.deepcopy(self._init_args)

        @property
        def init_kwargs(self):
            return copy.deepcopy(self._init_kwargs)

    Decorator.__name__ = orig_class.__name__
    return Decorator


def _reconstruct_persistent_obj(meta):
    text = meta["module_src"]
    if text not in _modules:
        _modules[text] = module = types.ModuleType(f"_embedded_{len(_modules)}")
        sys.modules[module.__name__] = module
        exec(text, module.__dict__)
    cls = getattr(_modules[text], meta["class_name"])
    instance = cls.__new__(cls)
    instance.__dict__.update(meta["state"])
    return instance
