"""Distilling a diffusion model into a generator of one step or a few: what `distill.py` runs."""

from dataclasses import dataclass
from typing import Any

import torch

from di_refine.commands import cli
from di_refine.commands.job import Experiment
from di_refine.commands.options import Options, option
from di_refine.errors import InputError
from di_refine.files import registry
from di_refine.generators import DistilledGenerator, NetworkSampler, averaged, load_kind, step_sigmas
from di_refine.trainer import Trainer


@dataclass(kw_only=True)
class DistillOptions(Options):
    """The options of `distill.py`, under their names there."""

    init_sigma: float = option(1.0, cli.POSITIVE_NUMBER, "Noise level that the generator starts from.")
    student_steps: int = option(1, cli.POSITIVE_INT, "Steps of the generator.")
    student_sigmas: str | None = option(
        None, str, "Their noise levels, falling, instead of --init-sigma.  [default: EDM's spacing]", metavar="LIST"
    )


class Distillation(Experiment):
    """A diffusion model, and the generator that it becomes."""

    COMMAND = "distill"

    ROWS = {"original": "start", "distilled": "distilled (last)", "best": "distilled (best)", "teacher": "teacher"}

    options: DistillOptions

    def _load(self) -> None:
        o = self.options
        if not o.teacher:
            raise InputError("--teacher is needed: name the EDM diffusion model to distil")
        self.teacher_paths = [registry.resolve(name, option="--teacher") for name in o.teacher]
        self.network_path = self.teacher_paths[0]
        self.networks = load_kind(self.network_path, "edm", "--teacher")
        self.original = averaged(self.networks)
        self.label_dim = self.original.label_dim
        self.sigmas = self._sigmas()

    def _sigmas(self) -> list[float]:
        o, net = self.options, self.original
        sigmas = step_sigmas(o.student_steps, o.init_sigma)
        if o.student_sigmas is not None:
            try:
                sigmas = [float(word) for word in o.student_sigmas.split(",")]
            except ValueError:
                raise InputError(
                    f"--student-sigmas must be falling numbers such as 2.5,0.6, not {o.student_sigmas!r}"
                ) from None
            if len(sigmas) != o.student_steps:
                raise InputError(
                    f"--student-sigmas has {len(sigmas)} levels and --student-steps is {o.student_steps}; give one each"
                )
            if any(low >= high for high, low in zip(sigmas, sigmas[1:])):
                raise InputError(f"--student-sigmas={o.student_sigmas} must fall from step to step")
        low, high = max(net.sigma_min, 0.002), min(net.sigma_max, 80.0)
        for sigma in sigmas:
            if not low <= sigma <= high:
                name = "--init-sigma" if o.student_sigmas is None else "--student-sigmas"
                raise InputError(f"{name}: {sigma:g} is outside of the teacher's noise levels, {low:g} to {high:g}")
        return sigmas

    def record(self) -> dict[str, Any]:
        """As of `Experiment`, with the noise levels."""
        return {**super().record(), "distilled_sigmas": self.sigmas}

    def _generator(self, net: torch.nn.Module) -> torch.nn.Module:
        return DistilledGenerator(net, self.sigmas)

    def _sampler(self, net: torch.nn.Module) -> NetworkSampler:
        return NetworkSampler(net, self.device, class_probs=self.class_probs, sigmas=self.sigmas)

    def _snapshot(self, trainer: Trainer) -> dict[str, Any]:
        return {**self.networks, "ema": trainer.ema.net, "distilled_sigmas": self.sigmas}
