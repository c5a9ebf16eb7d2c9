"""The settings of the loop around a trainer and of where its run directory is; quick to import."""

from dataclasses import dataclass

from torch_utils.settings import FILES, HOW_LONG, Settings, declared, setting

__all__ = ["TOLD_ANEW", "LoopConfig", "RunConfig"]


@dataclass(kw_only=True)
class LoopConfig(Settings):
    """When the loop stops, writes and measures. A run that is resumed may change all of it."""

    kimg: float = setting(
        5000,
        "Train on this many thousand images, those of the warm-up included.",
        above=0,
        maximum=1e9,
        group=HOW_LONG,
        may_change=True,
    )
    minutes: float | None = setting(
        None,
        "Train for about this many minutes: the speed is measured first, and `kimg` chosen by it. A run that is "
        "resumed keeps the number.",
        above=0,
        default_text="as `kimg`",
        group=HOW_LONG,
        may_change=True,
    )
    max_minutes: float | None = setting(
        None,
        "Stop after this many minutes. Everything is saved, and the run can be resumed.",
        above=0,
        default_text="no limit",
        group=HOW_LONG,
        may_change=True,
    )
    stop_if_worse: float | None = setting(
        None,
        "Stop when the first metric is worse than at the start by this factor.",
        above=1,
        default_text="never",
        group=HOW_LONG,
        may_change=True,
    )
    tick: float = setting(
        50,
        "Print a status line and write a training state every so many thousand images.",
        above=0,
        group=FILES,
        may_change=True,
    )
    snap: int = setting(
        10,
        "Write the network and measure it every so many ticks.",
        minimum=1,
        group=FILES,
        may_change=True,
    )
    keep: int = setting(
        2,
        "Keep so many of the newest networks and training states. The best network stays as well.",
        minimum=1,
        group=FILES,
        may_change=True,
    )

    @property
    def total_nimg(self) -> int:
        """How many images the training sees."""
        return max(round(self.kimg * 1000), 1)

    @property
    def tick_nimg(self) -> int:
        """How many images lie between two ticks."""
        return round(self.tick * 1000)


@dataclass(kw_only=True)
class RunConfig(Settings):
    """Where a run directory is, or will be."""

    outdir: str = setting(
        "runs",
        "Make the numbered run directory in this folder. If the folder is itself a run directory, that run goes on.",
        metavar="DIR",
        group=FILES,
        may_change=True,
    )
    desc: str | None = setting(
        None,
        "Put these words behind the number in the name of the run directory.",
        default_text="from the input",
        group=FILES,
        may_change=True,
    )
    resume: str | None = setting(
        None,
        "Continue this run directory or training state; auto continues the newest run of this kind, if there is one.",
        default_text="a new run",
        metavar="auto|RUN",
        group=FILES,
        may_change=True,
    )


TOLD_ANEW = {"max_minutes": LoopConfig.max_minutes, **{item.name: item.default for item in declared(RunConfig)}}
"""Settings that each part of a run is told anew, and their defaults; where they come from is not recorded."""
