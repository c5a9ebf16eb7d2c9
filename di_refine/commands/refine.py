"""The command `refine.py`: a trained StyleGAN2-ADA generator learns from a diffusion teacher, without training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from di_refine.commands import cli
from di_refine.commands.config import RefineConfig, TeachConfig
from di_refine.commands.options import make, options, resolve, warn
from di_refine.config import TrainerConfig
from di_refine.errors import InputError
from di_refine.metrics.config import MeasureConfig
from di_refine.runs.config import LoopConfig, RunConfig

if TYPE_CHECKING:
    from di_refine.commands.job import Subject


@cli.command()
@options(RefineConfig, TeachConfig, LoopConfig, TrainerConfig, MeasureConfig, RunConfig)
@cli.dry_run_option
@cli.ops_option
@cli.device_option
@click.pass_context
def main(context, dry_run, device, **values):
    """Refine a StyleGAN2-ADA generator with a diffusion model of the same images, without any data.

    \b
    python refine.py --network=stylegan2-digits.pkl                       (shipped, minutes on a CPU)
    python refine.py --network=stylegan2-cifar10.pkl --precision=bf16     (official networks, a GPU)
    python refine.py --network=mine.pkl --teacher=edm.pkl --metrics=fid5k_full --ref=reference.npz

    Options that are not given are fitted to the run, or have the values of a published preset.
    A network of the registry brings values for its size, which go before these. --dry-run shows what results, and from
    where.
    """
    # PyTorch is imported here and not above, so that --help is quick.
    from di_refine.commands import job, teaching
    from di_refine.files import registry
    from torch_utils import distributed

    entry = registry.entry_for_path(registry.resolve(values["network"], "network")) or {}
    with distributed.process_group(cli.pick_device(device)) as place:
        item = subject(make(RefineConfig, values), values["teacher"], values["teacher_config"])
        values, sources = resolve(
            context,
            values,
            "refine",
            job.facts(item, place),
            entry.get("refine"),
            lambda chosen: job.recorded_options(item, chosen),
            lambda chosen: job.images_per_second(item, chosen, place),
        )
        work = job.build(item, values, sources, place)
        warn(context, values)
        return teaching.dry_run(work) if dry_run else teaching.run(work)


def subject(config: RefineConfig, teachers: tuple[str, ...], configs: tuple[str, ...] = ()) -> Subject:
    """The generator to refine, and what teaching makes of it.

    Args:
        config: names the generator.
        teachers: files, URLs or names; none takes what the registry says belongs to the generator.
        configs: JSON files that say what the teachers' files do not.

    Raises:
        InputError: a file is missing or holds something else.
    """
    import torch

    from di_refine.commands.job import Subject, teacher_configs
    from di_refine.files import networks, registry
    from di_refine.generators import StyleGAN2Generator

    path = registry.resolve(config.network, "network")
    file = networks.load(path, "network").require(networks.STYLEGAN2, "network")
    paths = [registry.resolve(name, "teacher") for name in teachers]
    if not paths:
        companion = registry.companion(path, "teacher")
        if companion is None:
            raise InputError(
                f"`teacher` is needed: the registry knows no diffusion model for {path.name}; name one of the same "
                "images and classes"
            )
        paths = [companion]
    # A pickle may hold anything under these names; only networks are of use.
    discriminator, pipe = (
        part if isinstance(part, torch.nn.Module) else None for part in map(file.networks.get, ("D", "augment_pipe"))
    )

    def snapshot(trainer) -> dict[str, Any]:
        changed = {"G": trainer.generator.net, "G_ema": trainer.ema.net}
        if trainer.critic is not None:
            changed["D"] = trainer.critic.net
        return {**file.networks, **changed}

    return Subject(
        command="refine",
        config=config,
        file=file,
        label_dim=file.average.c_dim,
        teachers=paths,
        configs=teacher_configs(configs, paths),
        generator=StyleGAN2Generator,
        snapshot=snapshot,
        rows={"original": "original", "refined": "refined (last)", "best": "refined (best)", "teacher": "teacher"},
        discriminator=discriminator,
        augment_pipe=pipe,
    )


if __name__ == "__main__":
    main()
