"""What an update of a `di_refine.trainer.Trainer` needs of a device's memory, and how many images fit into it at once.

`Estimator` watches one pass of an update with one image and one with two, on the trainer's own device and in its
precision: which tensors there are at each moment, and how large they are. Both passes make the same tensors in the same
order; so the difference is what each further image costs at that moment, and with n images there are

    live(t, n) = live(t, 1) + (n - 1) (live(t, 2) - live(t, 1))

bytes beside the networks and Adam's states. The peak is the largest of these. Not in it: what a kernel needs while it
runs, what PyTorch's allocator loses between blocks, and on a GPU the CUDA context.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from di_refine.errors import RunError
from di_refine.trainer import Trainer
from torch_utils import distributed

SAFETY = 0.8
"""Of the free memory, what an estimate may fill."""

_Moments = list[tuple[int, int]]
"""Bytes of gradients, and of everything else that came into being, at each moment of a pass."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at that moment of an update when there are most; their sum is `peak`.

    Attributes:
        images: per forward pass.
        networks: parameters and buffers of all networks.
        optimizers: Adam's two means of all parameters that are trained.
        gradients: of parameters, those that are there at that moment.
        activations: everything else: what the backward pass needs, what it is working on, the batch.
    """

    images: int
    networks: int
    optimizers: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.networks + self.optimizers + self.gradients + self.activations

    def record(self) -> dict[str, Any]:
        """For a JSON result: GiB, to three digits."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        sizes = {"peak": self.peak, **parts}
        return {"images_per_pass": self.images, **{f"{name}_gib": gib(size) for name, size in sizes.items()}}

    def __str__(self) -> str:
        number = f"{self.images} image{'s' if self.images > 1 else ''} per pass"
        parts = f"networks {gib(self.networks):g}, Adam {gib(self.optimizers):g}, gradients {gib(self.gradients):g}"
        return f"{gib(self.peak):g} GiB per device with {number} ({parts}, activations {gib(self.activations):g})"


def gib(size: float) -> float:
    """Bytes in GiB, to three digits."""
    return float(f"{size / 2**30:.3g}")


class Estimator:
    """Estimates the peak of an update for any number of images per pass.

    Runs its passes when it is first asked. The trainer stays as it is, but for gradients, which are dropped. In place
    of float16, at which CPUs are slow, the passes use bfloat16 there.

    Args:
        trainer: between two steps.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._share = trainer.share.stop - trainer.share.start
        self._watched: dict[bool, list[_Moments]] = {}

    def __call__(self, images: int | None = None) -> MemoryEstimate:
        """The peak with so many images per pass; None is what the trainer is set to."""
        images = images or self._trainer.micro_batch
        several = images < self._share
        if several not in self._watched:
            self._watched[several] = [self._watch(n, several) for n in (1, 2) if n <= self._share]
        networks, gradients = _bytes(_networks(self._trainer)), _bytes(_trained(self._trainer))
        # At the update itself all gradients are there, and with several processes copies of them on their way.
        update = (gradients, gradients if distributed.world_size() > 1 else 0)
        there, others = max([update, *_extrapolated(images, *self._watched[several])], key=sum)
        return MemoryEstimate(images, networks, 2 * gradients, there, others)

    def largest_within(self, size: float) -> int:
        """The most images per pass whose estimate is within `size` bytes; 1 where none is."""
        return next((images for images in _divisors(self._share) if self(images).peak <= size), 1)

    def _watch(self, images: int, several: bool) -> _Moments:
        trainer, trained = self._trainer, _trained(self._trainer)
        with _undone(trainer):
            for p in trained:  # of several passes, the later ones meet the gradients of the first
                p.grad = torch.zeros_like(p) if several else None
            meter = _Meter(_networks(trainer), trained)
            with meter.watching(_checkpoints(trainer.student)):
                _pass(trainer, images)
        return meter.moments


def _extrapolated(images: int, one: _Moments, two: _Moments | None = None) -> _Moments:
    """The moments of a pass of so many images from those of one and of two."""
    two = two or one
    if len(one) != len(two):  # a network that goes by the number of images: the largest of each, as if at one moment
        one, two = ([tuple(max(sizes) for sizes in zip(*moments))] for moments in (one, two))
    return [tuple(a + (images - 1) * (b - a) for a, b in zip(first, second)) for first, second in zip(one, two)]


class _Meter(TorchFunctionMode):
    """Knows what tensors PyTorch makes on a device, and when they go.

    It sees what is returned to Python, what autograd keeps for the backward pass, and the gradients of the former.

    Args:
        known: tensors that are not to be counted.
        trained: parameters, whose gradients are counted apart.

    Attributes:
        moments: one for each call, and for each step backward.
    """

    def __init__(self, known: Iterable[torch.Tensor], trained: Sequence[torch.nn.Parameter]):
        super().__init__()
        gradients = [p.grad for p in trained if p.grad is not None]
        self.moments: _Moments = []
        self._trained, self._device = trained, trained[0].device
        self._live = {"gradient": _bytes(gradients), "other": 0}
        self._known = {_address(tensor) for tensor in (*known, *gradients)}
        self._storages: dict[int, tuple[str, int]] = {}  # address -> what it is part of, bytes

    @contextlib.contextmanager
    def watching(self, checkpoints: Iterable[functools.partial]) -> Iterator[None]:
        """While this is open, moments are noted, also within these calls of `torch.utils.checkpoint.checkpoint`."""
        with contextlib.ExitStack() as stack:
            for call in checkpoints:  # backward passes run without this mode, and so would what they compute again
                call.keywords["context_fn"] = lambda: (contextlib.nullcontext(), self)
                stack.callback(call.keywords.pop, "context_fn")
            for p in self._trained:
                stack.callback(p.register_post_accumulate_grad_hook(self._accumulated).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._kept, lambda tensor: tensor))
            stack.enter_context(self)
            yield

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in _flat(result):
            self._add(tensor)
            if tensor.grad_fn is not None:
                tensor.register_hook(self._passing)
        self._mark()
        return result

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        self._add(tensor)
        self._mark()
        return tensor

    def _passing(self, gradient: torch.Tensor) -> None:
        self._add(gradient)
        self._mark()

    def _accumulated(self, p: torch.nn.Parameter) -> None:
        self._add(p.grad)
        address = _address(p.grad)
        part, size = self._storages.get(address, ("gradient", 0))
        if part == "other":
            self._storages[address] = ("gradient", size)
            self._live["other"] -= size
            self._live["gradient"] += size
        self._mark()

    def _add(self, tensor: torch.Tensor) -> None:
        address = _address(tensor)
        if tensor.device != self._device or not address or address in self._known or address in self._storages:
            return
        storage = tensor.untyped_storage()
        self._storages[address] = ("other", storage.nbytes())
        self._live["other"] += storage.nbytes()
        weakref.finalize(storage, self._remove, address).atexit = False

    def _remove(self, address: int) -> None:
        part, size = self._storages.pop(address)
        self._live[part] -= size

    def _mark(self) -> None:
        self.moments.append((self._live["gradient"], self._live["other"]))


# ----------------------------------------------------------------------------------------------------------------------
# How many images fit


def choose(make: Callable[[int], Trainer], share: int, device: torch.device) -> tuple[int, str]:
    """The most images per forward pass that fit into the memory.

    On a GPU that is tried; elsewhere it is estimated, and compared with the memory that is free. All processes call
    this and get the same number, that of the one with the least room.

    Args:
        make: gives a trainer with so many images per pass, which is thrown away.
        share: images of this process; its divisors are tried, falling.
        device: where the trainers are.

    Returns:
        The number, and how it was found, in words.

    Raises:
        RunError: on a GPU, when not even one image fits.
    """
    if device.type == "cuda":
        return largest_that_works(make, share), "the most that an update on the GPU had room for"
    free = free_memory(device)
    if free is None:
        return share, "all, as it is not known how much memory is free"
    estimator = Estimator(make(share))
    found = distributed.gather_object(estimator.largest_within(SAFETY * free))
    images = distributed.broadcast_object(min(found, default=share))
    return images, f"estimated {gib(estimator(images).peak):g} GiB, with {gib(free):g} GiB free"


def largest_that_works(make: Callable[[int], Trainer], share: int) -> int:
    """The first of the falling divisors of `share` with which an update raises no `torch.OutOfMemoryError` anywhere.

    Args, raises: as of `choose`.
    """
    for images in _divisors(share):
        fits = _works(make, images)
        gc.collect()
        torch.cuda.empty_cache()
        if not distributed.any_rank(not fits):
            return images
    raise RunError(
        "--batch-gpu=auto: the GPU's memory has no room for one image per pass; try --precision=bf16 or "
        "--checkpoint-score, or networks that are smaller"
    )


def _works(make: Callable[[int], Trainer], images: int) -> bool:
    """Whether two updates go through, of which the second meets Adam's states; without the other processes."""
    try:
        trainer = make(images)
        trained = _trained(trainer)
        for _ in range(2):
            for _ in range(2 if images < trainer.share.stop - trainer.share.start else 1):
                _pass(trainer, images)
            if distributed.world_size() > 1:  # gradients are averaged in copies
                copies = [p.grad.clone() for p in trained if p.grad is not None]
                del copies
            for optimizer in _optimizers(trainer):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        return False
    return True


def free_memory(device: torch.device) -> int | None:
    """Bytes that each process on this machine may still fill of a device's memory; None where they are not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = [*_available(), *_container()] if device.type == "cpu" else []
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    return min(sizes) // processes if sizes else None


def _available() -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _container() -> Iterator[int]:
    """What the limit of a control group leaves, where there is one; cached files do not count as used."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such file, or the word 'max' in it
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield limit - used + int(statistics.get("file", 0))


# ----------------------------------------------------------------------------------------------------------------------
# Files


def file_sizes(trainer: Trainer, networks: dict[str, Any]) -> dict[str, int]:
    """Bytes, nearly, of the files that a run writes again and again: 'network-snapshot' and 'training-state'.

    Args:
        trainer: its state, with what Adam will add to it.
        networks: what a snapshot holds.
    """
    modules = [value for value in networks.values() if isinstance(value, torch.nn.Module)]
    state = trainer.state_dict()
    adam = sum(_bytes(_flat(optimizer.state_dict()["state"])) for optimizer in _optimizers(trainer))
    return {
        "network-snapshot": sum(_bytes(_flat(module.state_dict())) for module in modules),
        "training-state": _bytes(_flat(state)) - adam + 2 * _bytes(_trained(trainer)),
    }


# ----------------------------------------------------------------------------------------------------------------------


def _pass(trainer: Trainer, images: int) -> None:
    """The forward and backward passes of an update in which everything moves, on the first so many images."""
    first = trainer.share.start
    trainer._accumulate(trainer._draws(0), slice(first, first + images), True)


@contextlib.contextmanager
def _undone(trainer: Trainer) -> Iterator[None]:
    """Put back what passes change, and do on a CPU without float16 and without reading data again and again."""
    buffers = [tensor for net in _modules(trainer) for tensor in net.buffers()]
    kept = {name: getattr(trainer, name) for name in ("nimg", "config", "_reference_stream")}
    values = [tensor.clone() for tensor in buffers]
    trainer.nimg = 0  # an update with every regularisation there is
    if trainer._reference is not None:
        some = next(trainer._reference(0))
        trainer._reference_stream = (tuple(tensor.clone() for tensor in some) for _ in itertools.count())
    if trainer.device.type == "cpu":
        wanted = {name: trainer.config.precision_of(name) for name in ("teacher", "score", "generator")}
        precisions = {f"{name}_precision": value.replace("fp16", "bf16") for name, value in wanted.items()}
        trainer.config = dataclasses.replace(trainer.config, **precisions)
    for scaler in trainer._scalers.values():  # what a scaler makes at its first use is not part of every pass
        scaler.scale(torch.zeros([], device=trainer.device))
    try:
        with torch.random.fork_rng(devices=[trainer.device] if trainer.device.type == "cuda" else []):
            torch.manual_seed(0)
            yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        with torch.no_grad():
            for tensor, value in zip(buffers, values):
                tensor.copy_(value)
        for p in _trained(trainer):
            p.grad = None


def _modules(trainer: Trainer) -> list[torch.nn.Module]:
    critic = trainer.critic and trainer.critic.net
    modules = [trainer.generator, trainer.ema, trainer.student, trainer.teacher, trainer.ratio, critic]
    return [module for module in modules if module is not None]


def _networks(trainer: Trainer) -> list[torch.Tensor]:
    return [tensor for net in _modules(trainer) for tensor in (*net.parameters(), *net.buffers())]


def _checkpoints(net: torch.nn.Module) -> list[functools.partial]:
    """What stands in for the forward methods of blocks that `checkpoint_score` computes again."""
    calls = [vars(module).get("forward") for module in net.modules()]
    return [call for call in calls if isinstance(call, functools.partial)]


def _optimizers(trainer: Trainer) -> list[torch.optim.Optimizer]:
    optimizers = [trainer.student_optimizer, trainer.generator_optimizer]
    return optimizers + ([trainer.critic_optimizer] if trainer.critic is not None else [])


def _trained(trainer: Trainer) -> list[torch.nn.Parameter]:
    groups = [group for optimizer in _optimizers(trainer) for group in optimizer.param_groups]
    return [p for group in groups for p in group["params"]]


def _flat(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take; those that share storage count once."""
    return sum({_address(t): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _divisors(number: int) -> list[int]:
    """All of them, falling."""
    return [n for n in range(number, 0, -1) if number % n == 0]
