"""A measured metric, and the `metric-<name>.jsonl` files of a run directory."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.files.run_files import RunFiles
from di_refine.metrics.feature_net import Identity
from torch_utils import safe_files

MAX_BYTES = 1 << 28  # of a file of one JSON object per line


@dataclass(frozen=True)
class MetricResult:
    """One measured metric.

    Attributes:
        name: as in `metrics.kinds`.
        values: by key of the metric file, such as {"pr2k3_full@digits_precision": 0.8, ...}.
        num_images: how many generated images it was measured on.
        seed: what the sampler was called with.
        resolution, num_channels: of the generated images.
        detector: the feature network.
        reference: where the reference statistics come from: their count, data set and hashes, as far as known.
        seconds: duration of the pass that measured it, together with all other metrics of that pass.
        num_gpus: how many processes shared the pass.
        labels: what the labels were drawn from, see `LabelLaw.described`; None where none were drawn.
    """

    name: str
    values: dict[str, float]
    num_images: int
    seed: int
    resolution: int
    num_channels: int
    detector: Identity
    reference: dict[str, Any]
    seconds: float
    num_gpus: int = 1
    labels: str | None = None

    @property
    def value(self) -> float | tuple[float, ...]:
        """The number, or the pair of numbers."""
        values = tuple(self.values.values())
        return values[0] if len(values) == 1 else values

    def record(self, snapshot_pkl: str | None = None, network: str | None = None) -> dict[str, Any]:
        """Return the JSON object of a metric file.

        The keys of the StyleGAN family's files come first (`results`, `metric`, `total_time`, `total_time_str`,
        `num_gpus`, `snapshot_pkl`, `timestamp`), then what identifies the number.

        Args:
            snapshot_pkl: the network that was measured, relative to the run directory; None where it has no file there.
            network: what was measured, in words, where that is not the network that the run trains.
        """
        return {
            "results": self.values,
            "metric": self.name,
            "total_time": self.seconds,
            "total_time_str": terminal.format_time(self.seconds),
            "num_gpus": self.num_gpus,
            "snapshot_pkl": snapshot_pkl,
            "timestamp": time.time(),
            "num_images": self.num_images,
            "seed": self.seed,
            "labels": self.labels,
            "resolution": self.resolution,
            "num_channels": self.num_channels,
            "detector": self.detector.as_dict(),
            "reference": self.reference,
            "network": network,
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "MetricResult":
        """The measurement that a JSON object of a metric file tells of.

        Raises:
            ValueError: something is missing, or of another kind.
        """
        try:
            values, reference, labels = dict(record["results"]), dict(record["reference"]), record.get("labels")
            numbers = {
                name: int(record[name]) for name in ("num_images", "seed", "resolution", "num_channels", "num_gpus")
            }
            found = cls(
                name=str(record["metric"]),
                values={str(key): float(value) for key, value in values.items()},
                detector=Identity(**record["detector"]),
                reference=reference,
                seconds=float(record["total_time"]),
                labels=None if labels is None else str(labels),
                **numbers,
            )
        except (LookupError, ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"it is no measurement ({type(error).__name__}: {error})") from None
        if not found.values or not all(map(math.isfinite, found.values.values())):
            raise ValueError("it is no measurement (it has no values, or such as are not finite)")
        return found


def values(results: Iterable[MetricResult]) -> dict[str, float]:
    """All values of several metrics by their keys."""
    return {key: value for result in results for key, value in result.values.items()}


def write_jsonl(
    run_dir: str | os.PathLike,
    result: MetricResult,
    snapshot: str | os.PathLike | None = None,
    network: str | None = None,
) -> None:
    """Append a result to its `metric-<name>.jsonl` in a run directory, as one write.

    Args:
        run_dir: the folder.
        result: what to write.
        snapshot: the network that was measured; an absolute path is made relative to `run_dir`.
        network: as `MetricResult.record`.
    """
    if snapshot is not None and os.path.isabs(snapshot):
        snapshot = os.path.relpath(snapshot, run_dir)
    record = result.record(None if snapshot is None else os.fspath(snapshot), network)
    safe_files.write_line(RunFiles(run_dir).metric(result.name), json.dumps(record, allow_nan=False))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a run's file, line by line; none where there is no such file.

    Raises:
        InputError: the file cannot be read, or a line is something else.
    """
    if not path.exists():
        return
    try:
        with safe_files.open_regular(path, MAX_BYTES) as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = safe_files.parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{path} line {number} is not a JSON object; remove the line")
        yield record
