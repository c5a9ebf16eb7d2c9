"""Network files of a few kilobytes or megabytes that ask for gigabytes or hours."""

import json
import pickle
import sys
import types

import numpy as np
import torch
from special import MEBIBYTES, SECONDS, SHIPPED

from torch_utils import persistence


def _generate(path):
    return ["generate.py", f"--network={path}", "--seeds=0", f"--outdir={path.parent / 'out'}"]


def _inspect(path):
    return ["-m", "di_refine", "inspect", str(path)]


class _Record:
    """Pickled as a network is, whatever its state."""

    def __init__(self, class_name, **state):
        self.meta = {"type": "class", "version": 6, "module_src": "", "class_name": class_name, "state": state}

    def __reduce__(self):
        return persistence._reconstruct_persistent_obj, (self.meta,)


def _dump(folder, content):
    path = folder / "x.pkl"
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


# Pickles of PyTorch.


def _shared_tables(folder):
    """20,000 layers that share one table of 20,000 entries."""
    table = {f"t{index}": None for index in range(20_000)}
    layers = {f"l{index}": _Record("X", _buffers=table, _modules={}) for index in range(20_000)}
    return _dump(folder, {"G_ema": _Record("Generator", _modules=layers, _init_args=(), _init_kwargs={})})


def shared_tables(folder):
    return _generate(_shared_tables(folder))


def shared_tables_inspected(folder):
    return _inspect(_shared_tables(folder))


def shared_layers(folder):
    """2,000 networks, all with the same 20,000 layers."""
    layers = {f"l{index}": _Record("X", _modules={}) for index in range(20_000)}
    inner = _Record("Y", _modules=layers)
    return _inspect(_dump(folder, {f"n{index}": _Record("Z", _modules={"a": inner}) for index in range(2_000)}))


def _changed(folder, **kwargs):
    """The shipped generator with other constructor arguments."""
    record = persistence.load_records(SHIPPED / "stylegan2-digits.pkl")["G_ema"]
    record.state["_init_kwargs"] = {**record.init_kwargs, **kwargs}
    persistence.save({"G_ema": record}, folder / "x.pkl")
    return folder / "x.pkl"


def resolution_in_kwargs(folder):
    return _generate(_changed(folder, img_resolution=1 << 20))


def resolution_within_range(folder):
    return _generate(_changed(folder, img_resolution=1 << 17))


def channels_in_kwargs(folder):
    return _generate(_changed(folder, img_channels=1_000_000))


def widths_in_kwargs(folder):
    return _generate(_changed(folder, z_dim=1 << 17, w_dim=1 << 17))


def filter_in_kwargs(folder):
    return _generate(_changed(folder, synthesis_kwargs={"resample_filter": [1] * 900}))


def _diffusion(cls, *args, **kwargs):
    torch.manual_seed(0)
    return cls(*args, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], **kwargs)


def _stylegan2(resolution):
    from stylegan2_ada.networks import Generator

    synthesis = {"channel_base": resolution, "channel_max": 1, "use_noise": False}
    return Generator(8, 0, 8, resolution, 1, {"num_layers": 1}, synthesis)


def giant_pictures(folder):
    """Weights of 20 KB, and pictures of 17 gigapixels."""
    persistence.save({"G_ema": _stylegan2(1 << 17)}, folder / "x.pkl")
    return _generate(folder / "x.pkl")


def giant_diffusion(folder):
    from di_refine.edm.networks import EDMPrecond

    persistence.save({"ema": _diffusion(EDMPrecond, 1 << 17, 1)}, folder / "x.pkl")
    return _generate(folder / "x.pkl")


def giant_teacher(folder):
    from di_refine.edm.networks import EDMPrecond

    persistence.save({"ema": _diffusion(EDMPrecond, 1 << 17, 1)}, folder / "x.pkl")
    teacher = f"--teacher={folder / 'x.pkl'}"
    return ["distill.py", teacher, "--kimg=0.01", "--score-warmup=0", "--batch=2", f"--outdir={folder}"]


def iddpm_levels(folder):
    """131,071 noise levels, each of which follows from the one before."""
    from di_refine.edm.networks import iDDPMPrecond

    net = _diffusion(iDDPMPrecond, 8, 1, M=10)
    record = persistence.to_records({"ema": net}, "x")["ema"]
    record.state["_init_kwargs"] = {**record.init_kwargs, "M": (1 << 17) - 1}
    persistence.save({"ema": record}, folder / "x.pkl")
    return _generate(folder / "x.pkl")


def many_sigmas(folder):
    from di_refine.edm.networks import EDMPrecond

    content = {"ema": _diffusion(EDMPrecond, 8, 1), "distilled_sigmas": [1.0] * 200_000}
    persistence.save(content, folder / "x.pkl")
    return _generate(folder / "x.pkl")


def much_inspected(folder):
    """As many small values as a pickle may have."""
    return _inspect(_dump(folder, {f"k{index}": [] for index in range(220_000)}))


def holes(folder):
    """A terabyte of holes, which the header says is a tensor."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    with open(folder / "x.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    return [
        "calc_metrics.py",
        f"--network={SHIPPED / 'stylegan2-digits.pkl'}",
        f"--detector={folder / 'x.safetensors'}",
        "--metrics=is1k@x",
    ]


# Pickles of TensorFlow.


def _network(variables=(), components=None, **static):
    for name in ("dnnlib", "dnnlib.tflib", "dnnlib.tflib.network"):
        module = sys.modules.setdefault(name, types.ModuleType(name))
    if not hasattr(module, "Network"):
        module.Network = type("Network", (), {"__module__": module.__name__, "__qualname__": "Network"})
    result = module.Network()
    state = {"version": 4, "static_kwargs": static, "variables": list(variables), "components": components or {}}
    vars(result).update(state)
    return result


def _tensorflow(folder, generator):
    return _dump(folder, (_network(), _network(), generator))


def _one_array(folder):
    """An array of 16 MB under 2,000 names."""
    array = np.zeros(1 << 22, np.float32)
    variables = [(f"synthesis/{size}x{size}/Conv1/bias", array) for size in range(5, 2005)]
    return _tensorflow(folder, _network(variables, {"synthesis": _network()}))


def one_array(folder):
    return _generate(_one_array(folder))


def one_array_inspected(folder):
    return _inspect(_one_array(folder))


def components(folder):
    """Networks of 300 networks, four deep, all the same."""
    inner = _network([("a", 1.0)])
    for _ in range(3):
        inner = _network((), {"synthesis": inner, **{f"c{index}": inner for index in range(300)}})
    return _generate(_tensorflow(folder, inner))


def filters(folder):
    """A filter of 900 taps for each of 1,000 blocks."""
    names = [f"synthesis/{size}x{size}/Conv0_up/weight" for size in range(5, 1005)]
    variables = [(name, np.zeros([1, 1, 1, 1], np.float32)) for name in names]
    return _generate(_tensorflow(folder, _network(variables, {"synthesis": _network()}, resample_kernel=[1] * 900)))


# Pairs of safetensors and JSON.


def _pair(folder, text):
    import safetensors.torch

    (folder / "x.json").write_text(text)
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def json_lists(folder):
    return _inspect(_pair(folder, "[" + "[]," * 6_000_000 + "0]"))


def json_depth(folder):
    return _inspect(_pair(folder, "[" * 1_000_000))


def json_shared(folder):
    """Each of 60 shared values holds the one before it twice."""
    shared = [[]] + [[{"$shared": index}] * 2 for index in range(60)]
    config = {"format": "di-refine-networks", "version": 1, "sources": {}, "shared": shared}
    path = _pair(folder, "")
    from di_refine.files.download import sha256_of

    config |= {"tensors": {"sha256": sha256_of(path)}, "content": {"x": {"$shared": 60}}}
    (folder / "x.json").write_text(json.dumps(config))
    return _inspect(path)


CASES = [
    (f"networks-{case.__name__}", case, SECONDS, MEBIBYTES)
    for case in (
        shared_tables,
        shared_tables_inspected,
        shared_layers,
        resolution_in_kwargs,
        resolution_within_range,
        channels_in_kwargs,
        widths_in_kwargs,
        filter_in_kwargs,
        giant_pictures,
        giant_diffusion,
        giant_teacher,
        iddpm_levels,
        many_sigmas,
        much_inspected,
        holes,
        one_array,
        one_array_inspected,
        components,
        filters,
        json_lists,
        json_depth,
        json_shared,
    )
]
