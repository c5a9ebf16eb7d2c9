"""A measured metric, and the `metric-<name>.jsonl` files of a run directory."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from di_refine import terminal
from di_refine.metrics.detectors import Identity


@dataclass(frozen=True)
class MetricResult:
    """One measured metric.

    Attributes:
        name: as in `metrics.names`.
        values: by key of the metric file, such as {"pr2k3_full@digits_precision": 0.8, ...}.
        num_images: generated images it was measured on.
        seed: of the sampler.
        resolution, num_channels: of the generated images.
        detector: the feature network.
        reference: where the reference statistics come from: their count, data set and hashes, as far as known.
        seconds: duration of the pass that measured it, together with all other metrics of that pass.
        num_gpus: processes that shared the pass.
    """

    name: str
    values: dict[str, float]
    num_images: int
    seed: int
    resolution: int
    num_channels: int
    detector: Identity
    reference: dict
    seconds: float
    num_gpus: int = 1

    @property
    def value(self) -> float | tuple[float, ...]:
        """The number, or the pair of numbers."""
        values = tuple(self.values.values())
        return values[0] if len(values) == 1 else values


def write_jsonl(
    run_dir: str | os.PathLike, result: MetricResult, snapshot_pkl: str | os.PathLike | None = None
) -> None:
    """Append a result to `metric-<name>.jsonl` in a run directory, as one write.

    The keys of the StyleGAN family's files come first (`results`, `metric`, `total_time`, `total_time_str`, `num_gpus`,
    `snapshot_pkl`, `timestamp`), then what identifies the number.

    Args:
        run_dir: the folder.
        result: what to write.
        snapshot_pkl: the network measured; stored relative to `run_dir`.
    """
    run_dir = Path(run_dir)
    if snapshot_pkl is not None and os.path.isabs(snapshot_pkl):
        snapshot_pkl = os.path.relpath(snapshot_pkl, run_dir)
    record = {
        "results": result.values,
        "metric": result.name,
        "total_time": result.seconds,
        "total_time_str": terminal.format_time(result.seconds),
        "num_gpus": result.num_gpus,
        "snapshot_pkl": None if snapshot_pkl is None else os.fspath(snapshot_pkl),
        "timestamp": time.time(),
        "num_images": result.num_images,
        "seed": result.seed,
        "resolution": result.resolution,
        "num_channels": result.num_channels,
        "detector": asdict(result.detector),
        "reference": result.reference,
    }
    with open(run_dir / f"metric-{result.name}.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
