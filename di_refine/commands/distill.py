"""The command `distill.py`: a diffusion model becomes a generator of one step or a few, without training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from di_refine.commands import cli
from di_refine.commands.config import DistillConfig, TeachConfig
from di_refine.commands.options import make, options, resolve, warn
from di_refine.config import TrainerConfig
from di_refine.errors import InputError
from di_refine.metrics.config import MeasureConfig
from di_refine.runs.config import LoopConfig, RunConfig

if TYPE_CHECKING:
    import torch

    from di_refine.commands.job import Subject
    from di_refine.denoisers import Denoiser


@cli.command()
@options(TeachConfig, DistillConfig, LoopConfig, TrainerConfig, MeasureConfig, RunConfig)
@cli.dry_run_option
@cli.ops_option
@cli.device_option
@click.pass_context
def main(context, dry_run, device, **values):
    """Distil a diffusion model into a generator that makes an image in one step, without any data.

    \b
    python distill.py --teacher=edm-digits-16x16-cond.pkl                          (shipped, minutes on a CPU)
    python distill.py --teacher=edm-cifar10-32x32-cond-vp.pkl --preset=sid --precision=bf16
    python distill.py --teacher=edm.pkl --student-steps=2 --metrics=fid5k_full --ref=reference.npz

    Options that are not given are fitted to the run, or have the values of a published preset.
    A teacher of the registry brings values for its size, which go before these. --dry-run shows what results, and from
    where.
    """
    # PyTorch is imported here and not above, so that --help is quick.
    from di_refine.commands import job, teaching
    from di_refine.files import registry
    from torch_utils import distributed

    if not values["teacher"]:
        raise InputError("`teacher` is needed: name the diffusion model to distil")
    entry = registry.entry_for_path(registry.resolve(values["teacher"][0], "teacher")) or {}
    with distributed.process_group(cli.pick_device(device)) as place:
        item = subject(make(DistillConfig, values), values["teacher"], values["teacher_config"])
        values, sources = resolve(
            context,
            values,
            "distill",
            job.facts(item, place),
            entry.get("distill"),
            lambda chosen: job.recorded_options(item, chosen),
            lambda chosen: job.images_per_second(item, chosen, place),
        )
        config = make(DistillConfig, values)
        if config != item.config:  # a preset has another noise level
            item = subject(config, values["teacher"], values["teacher_config"])
        work = job.build(item, values, sources, place)
        warn(context, values)
        return teaching.dry_run(work) if dry_run else teaching.run(work)


def subject(config: DistillConfig, teachers: tuple[str, ...], configs: tuple[str, ...] = ()) -> Subject:
    """The diffusion model to distil, and the generator that it becomes.

    Args:
        config: names the noise levels.
        teachers: files, URLs or names; the first is the one that is distilled.
        configs: JSON files that say what the teachers' files do not.

    Raises:
        InputError: a file is missing or holds something else, or the noise levels do not fit it.
    """
    from di_refine.commands.job import Subject, teacher_configs
    from di_refine.files import networks, registry
    from di_refine.generators import DistilledGenerator

    paths = [registry.resolve(name, "teacher") for name in teachers]
    settings = teacher_configs(configs, paths)
    file = networks.load(paths[0], "teacher", settings[0]).require(networks.EDM, "teacher")
    sigmas = step_levels(config, file.average)

    def generator(net: torch.nn.Module, noise_mode: str) -> torch.nn.Module:
        return DistilledGenerator(net, sigmas)

    def snapshot(trainer) -> dict[str, Any]:
        return {**file.networks, "ema": trainer.ema.net, "distilled_sigmas": sigmas}

    return Subject(
        command="distill",
        config=config,
        file=file,
        label_dim=file.average.label_dim,
        teachers=paths,
        configs=settings,
        generator=generator,
        snapshot=snapshot,
        rows={"original": "start", "distilled": "distilled (last)", "best": "distilled (best)", "teacher": "teacher"},
        facts={"distilled_sigmas": sigmas},
    )


def step_levels(config: DistillConfig, net: Denoiser) -> list[float]:
    """The noise level of each step.

    Raises:
        InputError: they are no falling numbers, or the teacher does not know them.
    """
    from di_refine.generators import step_sigmas

    sigmas = step_sigmas(config.student_steps, config.init_sigma)
    if config.student_sigmas is not None:
        try:
            sigmas = [float(word) for word in config.student_sigmas.split(",")]
        except ValueError:
            raise InputError(
                f"`student_sigmas` must be falling numbers such as 2.5,0.6, not {config.student_sigmas!r}"
            ) from None
        if len(sigmas) != config.student_steps:
            raise InputError(
                f"`student_sigmas` has {len(sigmas)} levels and `student_steps` is {config.student_steps}; give one "
                "each"
            )
        if any(low >= high for high, low in zip(sigmas, sigmas[1:])):
            raise InputError(f"student_sigmas={config.student_sigmas} must fall from step to step")
    low, high = max(net.sigma_min, 0.002), min(net.sigma_max, 80.0)
    for sigma in sigmas:
        if not low <= sigma <= high:
            name = "`init_sigma`" if config.student_sigmas is None else "`student_sigmas`"
            raise InputError(f"{name}: {sigma:g} is outside of the teacher's noise levels, {low:g} to {high:g}")
    return sigmas


if __name__ == "__main__":
    main()
