"""The part of the report that needs the networks themselves: pictures, generation speed, numbers of operations."""

import time
from pathlib import Path
from typing import Any

import torch
from stages import Stage
from torch.utils.flop_counter import FlopCounterMode

from di_refine.commands import cli
from di_refine.files import networks, pictures
from di_refine.files.datasets import ImageDataset
from di_refine.generators import NetworkSampler, load_sampler
from stylegan2_ada.networks import Discriminator


def generation_speeds(stage: Stage, names: list[str]) -> dict[str, float]:
    """Images per second of each network, drawn as generate.py and the metrics do: 128 at a time, in float32.

    The numbers of parameters are left in measured/parameters.json on the way.
    """
    speeds, parameters = {}, {}
    for name in names:
        if name == "data":
            continue
        sampler = _sampler(stage, name)
        parameters[name] = sum(p.numel() for p in sampler.net.parameters())
        sampler(0, 8 if stage.smoke else 128, 0)[0].cpu()
        count, clock, limit = 0, time.monotonic(), 0.1 if stage.smoke else 2.0
        while time.monotonic() - clock < limit:
            sampler(count, 128, 1)[0].cpu()  # what copies to the CPU has waited for the device
            count += 128
        speeds[name] = count / (time.monotonic() - clock)
    stage.write_json("measured/parameters.json", parameters)
    return speeds


def side_by_side(stage: Stage, titles: dict[str, str], path: Path, rows: int = 6) -> None:
    """A panel for each network: a column for each class, the same latents for GAN, control and refined."""
    panels = []
    for name, title in titles.items():
        if name == "data":
            panels.append((title, _real_images(stage, rows)))
            continue
        sampler = _sampler(stage, name, noise_mode="const")
        columns = max(sampler.label_dim, 1)
        seeds = list(range(rows * columns))
        labels = torch.eye(sampler.label_dim)[torch.arange(columns).repeat(rows)] if sampler.label_dim else None
        panels.append((title, pictures.to_uint8(sampler.images(seeds, labels))))
    columns = len(panels[-1][1]) // rows
    pictures.save_side_by_side(path, panels, columns=columns)


def operations(stage: Stage) -> dict[str, float]:
    """Floating-point operations an image of each training: matrix products and convolutions, forward and backward.

    A backward pass counts twice a forward pass. Left out are ADA's augmentation, the penalty of every 16th step, and
    the generator's pass in score steps of its own.
    """
    made: dict[str, float] = {}
    if stage.result("teacher"):
        net = networks.load(stage.network("teacher", "teacher.py")).average
        shape = [1, net.img_channels, net.img_resolution, net.img_resolution]
        teacher = _count(lambda: net(torch.zeros(shape), torch.ones(1), torch.zeros([1, net.label_dim])))
        made["teacher"] = 3 * teacher
    if stage.result("gan"):
        pair = networks.load(stage.network("gan", "gan.py")).networks
        G, D = pair["G_ema"].requires_grad_(True), pair["D"].requires_grad_(True)
        labels = torch.zeros([1, G.c_dim])
        picture = G(torch.zeros([1, G.z_dim]), labels)
        generator = _count(lambda: G(torch.zeros([1, G.z_dim]), labels))
        made["gan"] = made["gan-longer"] = 4 * generator + 9 * _count(lambda: _discriminate(D, picture, labels))
        if "teacher" in made:
            for name in _results_of(stage, "refine"):
                made[name] = 3 * generator + 4 * teacher
    if "teacher" in made:
        for name in _results_of(stage, "distill"):
            made[name] = 7 * teacher
    return made


def device_facts(name: str, smoke: bool) -> dict[str, Any]:
    """What was computed on, and its measured bf16 rate in TFLOP/s, of products of random 8192 x 8192 matrices."""
    device = cli.pick_device(name)
    facts: dict[str, Any] = {"torch_version": torch.__version__, "bf16_tflops": None}
    if device.type != "cuda":
        return {**facts, "device": f"{device}, {torch.get_num_threads()} thread(s)", "bf16_text": "not measured"}
    a, b = (torch.randn([8192, 8192], device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    clock = time.monotonic()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    rate = 20 * 2 * 8192**3 / (time.monotonic() - clock) / 1e12
    text = f"{rate:.0f} TFLOP/s"
    return {**facts, "device": torch.cuda.get_device_name(device), "bf16_tflops": rate, "bf16_text": text}


def _sampler(stage: Stage, name: str, noise_mode: str = "random") -> NetworkSampler:
    path, device = stage.network(name, "the other stages"), cli.pick_device(stage.device)
    return load_sampler(path, steps=2 if stage.smoke else 18, device=device, noise_mode=noise_mode)


def _real_images(stage: Stage, rows: int) -> torch.Tensor:
    dataset = ImageDataset(stage.held_out_images)
    classes = dataset.labels(range(len(dataset))).argmax(axis=1)
    order: list[int] = []
    for row in range(rows):
        for number in range(dataset.label_dim):
            members = (classes == number).nonzero()[0]
            order.append(int(members[row % len(members)]))
    return torch.from_numpy(dataset.images(order))


def _results_of(stage: Stage, kind: str) -> dict[str, dict]:
    found = {path.stem: stage.result(path.stem) for path in (stage.workdir / "results").glob("*.json")}
    return {name: result for name, result in found.items() if result.get("stage") == kind}


def _discriminate(D: Discriminator, picture: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return D(picture, labels)


def _count(function) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
