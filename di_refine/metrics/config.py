"""The settings of measuring in the course of a training. Nothing here imports PyTorch: `--help` is quick."""

from dataclasses import dataclass

from torch_utils.settings import MEASURING, Settings, setting

ALLOW_CODE_HELP = (
    "Run feature networks that are programs, TorchScript and plug-ins (.py), which could do anything on this machine."
)


@dataclass(kw_only=True)
class MeasureConfig(Settings):
    """What a training measures, and how; None where the registry decides, which knows the networks it ships."""

    metrics: str | None = setting(
        None,
        "Measure these metrics at each snapshot, such as fd2k_full@digits; none measures nothing.",
        group=MEASURING,
        default_text="what the registry recommends, else by the teacher, where there is one",
        metavar="LIST|none",
        may_change=True,
    )
    final_metrics: str | None = setting(
        None,
        "Measure these metrics at the end; none measures nothing.",
        group=MEASURING,
        default_text="what the registry recommends, else `metrics`",
        metavar="LIST|none",
        may_change=True,
    )
    final_seeds: int = setting(
        3,
        "Measure with this many seeds at the end; the interval of the difference takes two.",
        minimum=1,
        maximum=100,
        group=MEASURING,
        may_change=True,
    )
    detector: str | None = setting(
        None,
        "Take this feature network for metrics whose network is not in the registry.",
        group=MEASURING,
        metavar="FILE",
        may_change=True,
    )
    allow_code: bool = setting(False, ALLOW_CODE_HELP, group=MEASURING, may_change=True)
    ref: str | None = setting(
        None,
        "Compare with these statistics or images.",
        group=MEASURING,
        default_text="what the registry says",
        metavar="FILE.npz|DATA",
        may_change=True,
    )
