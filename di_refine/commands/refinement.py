"""Refining a StyleGAN2 generator with a diffusion teacher: what `refine.py` runs."""

from dataclasses import dataclass
from typing import Any

import torch

from di_refine.commands.job import Experiment
from di_refine.commands.options import Options, option
from di_refine.errors import InputError
from di_refine.files import registry
from di_refine.generators import NetworkSampler, StyleGAN2Generator, load_kind
from di_refine.trainer import Trainer


@dataclass(kw_only=True)
class RefineOptions(Options):
    """The options of `refine.py`, under their names there."""

    network: str = option(..., str, "The StyleGAN2 generator to refine.", metavar="FILE|URL|NAME")


class Refinement(Experiment):
    """A StyleGAN2 pickle, and what teaching its generator makes of it."""

    options: RefineOptions

    def _load(self) -> None:
        o = self.options
        self.network_path = registry.resolve(o.network, option="--network")
        self.networks = load_kind(self.network_path, "stylegan2", "--network")
        self.original = self.networks["G_ema"]
        self.label_dim = self.original.c_dim
        self.teacher_paths = [registry.resolve(name, option="--teacher") for name in o.teacher]
        if not self.teacher_paths:
            path = registry.companion(self.network_path, "teacher")
            if path is None:
                raise InputError(
                    f"--teacher is needed: the registry knows no diffusion model for {self.network_path.name}; "
                    "name an EDM pickle of the same images and classes"
                )
            self.teacher_paths = [path]

    def _generator(self, net: torch.nn.Module) -> torch.nn.Module:
        return StyleGAN2Generator(net)

    def _sampler(self, net: torch.nn.Module) -> NetworkSampler:
        return NetworkSampler(net, self.device, class_probs=self.class_probs)

    def _snapshot(self, trainer: Trainer) -> dict[str, Any]:
        changed = {"G": trainer.generator.net, "G_ema": trainer.ema.net}
        if trainer.critic is not None:
            changed["D"] = trainer.critic.net
        return {**self.networks, **changed}

    def _critic_networks(self) -> tuple[torch.nn.Module, Any] | None:
        net = self.networks.get("D")
        pipe = self.networks.get("augment_pipe")
        return (net, pipe if isinstance(pipe, torch.nn.Module) else None) if isinstance(net, torch.nn.Module) else None
