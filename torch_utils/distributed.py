"""Training by several processes that torchrun starts: one per GPU, or several on the CPU for tests.

    with distributed.process_group(device) as device:
        ...
        mine = distributed.share(batch)          # this rank's images of the step
        (loss.sum() / len(z[mine])).backward()   # mean over the share, in one or several pieces
        distributed.average_gradients(parameters)

All ranks hold the same weights, draw the same random numbers for the whole batch, work on their share of it, and
average the gradients once per step; so the number of ranks changes a result only by the order of summation. Without
torchrun the functions of this module return what a single process has, and wait for nobody.

Tensors are sent from the device that they are on (NCCL on CUDA, else gloo). Objects and flags are sent between the
CPUs, and so never wait for a GPU. An operation that fails because another rank has ended or hangs raises a
ConnectionError.
"""

import contextlib
import datetime
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

BUCKET_BYTES = 32 << 20  # large enough for full bandwidth, small enough that copying and sending overlap


class DistributedError(ValueError):
    """The processes cannot work together; the message says why and what to change."""


def rank() -> int:
    """Return the number of this process, from 0; it is 0 where there is only one."""
    return dist.get_rank() if _is_several() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_several() else 1


def is_first() -> bool:
    """Return whether this process is the one that writes files and prints results."""
    return rank() == 0


_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Make everything here the operation of a single process inside this block, whatever the others do meanwhile."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _is_several() -> bool:
    return dist.is_available() and dist.is_initialized() and not _alone


# ----------------------------------------------------------------------------------------------------------------------
# Beginning and end


@contextlib.contextmanager
def process_group(
    device: torch.device | str = "cpu", timeout: float = 3600, join_timeout: float = 300
) -> Iterator[torch.device]:
    """Join the processes that torchrun started; without torchrun, or inside another such block, do nothing.

    A rank that leaves normally, with `sys.exit(0)` as well, waits here for the others. One that leaves with an
    exception does not: torchrun notices that its process has ended, and ends the others.

    Args:
        device: 'cpu' or 'cuda', whatever its index.
        timeout: seconds that a collective operation waits for a rank that does not answer. Must exceed the longest
            evaluation or whatever else one rank may do alone.
        join_timeout: seconds to wait for all ranks to start.

    Yields:
        The device of this rank, which is also made current: cuda:LOCAL_RANK, or the CPU.

    Raises:
        DistributedError: the environment or the device is not as it must be, or a rank did not start.
    """
    device = torch.device(device)
    size, local = _environment("WORLD_SIZE", 1), _environment("LOCAL_RANK", 0)
    if size > 1 and device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise DistributedError(
                f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}; give torchrun "
                "--nproc_per_node no more than that"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size < 2 or _is_several():
        yield device
        return
    if device.type not in ("cpu", "cuda"):
        raise DistributedError(f"several processes need device=cuda or device=cpu, not {device.type}")
    me = _environment("RANK", None)
    try:
        _join(device, me, size, datetime.timedelta(seconds=timeout), datetime.timedelta(seconds=join_timeout))
    except (RuntimeError, ValueError, OSError) as error:
        raise DistributedError(f"not all {size} ranks have come together at rank {me} ({_reason(error)})") from None
    try:
        yield device
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            _leave()
        elif dist.get_backend() == "gloo":  # waits for no other rank, as NCCL would
            dist.destroy_process_group()
        raise
    _leave()


def _join(
    device: torch.device, me: int, size: int, timeout: datetime.timedelta, join_timeout: datetime.timedelta
) -> None:
    store, _, _ = next(dist.rendezvous("env://", me, size, timeout=join_timeout))
    store.set_timeout(join_timeout)
    # Connecting waits as long as any later operation. Hence it begins when all are there.
    store.set(f"joined/{me}", "")
    store.wait([f"joined/{other}" for other in range(size)], join_timeout)
    nccl = device.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=me, world_size=size, timeout=timeout)


def _leave() -> None:
    """Wait for all ranks to come to their end, then leave the group.

    Not at the interpreter's very end, where gloo's threads abort the process now and then.
    """
    barrier()
    time.sleep(0.1)  # such a thread may have to free a tensor yet, and for that take turns with this one
    dist.destroy_process_group()


def _environment(name: str, default: int | None) -> int:
    """Return the number in an environment variable that torchrun sets; without a default, the variable must be set."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        problem = "is not set" if text is None else f"is {text!r}, not a number"
        raise DistributedError(f"the environment variable {name} {problem}; start the processes by torchrun") from None


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Turn the failure of an operation, because a rank has ended or hangs, into an error of one sentence.

    Raises:
        ConnectionError: in place of the RuntimeError of gloo or NCCL, which have no narrower type for it.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {rank()} of {world_size()} has lost connection with the others ({_reason(error)}); the rank that "
            "ended first says why"
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------------------------
# Objects and flags


def barrier() -> None:
    """Wait until all ranks are here. Does not wait for work on the GPUs."""
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on at least one rank.

    A signal to stop, for example, may reach one rank only and has to end all of them in the same step.
    """
    return bool(highest(int(flag)))


def highest(number: int) -> int:
    """Return the largest of the numbers of all ranks."""
    if world_size() == 1:
        return number
    answer = torch.tensor(number)  # on the CPU: asking must not wait for a GPU
    with _collective():
        dist.all_reduce(answer, dist.ReduceOp.MAX)
    return int(answer.item())


def broadcast_object(obj: Any = None) -> Any:
    """Return the first rank's object, which must be picklable, on all ranks."""
    if world_size() == 1:
        return obj
    box = [obj]
    with _collective():
        dist.broadcast_object_list(box)
    return box[0]


def gather_object(obj: Any) -> list:
    """Return the objects of all ranks in their order on the first rank, and an empty list on the others."""
    if world_size() == 1:
        return [obj]
    everyone: list[Any] | None = [None] * world_size() if is_first() else None
    with _collective():
        dist.gather_object(obj, everyone)
    return everyone or []


def check_equal(what: str, value: Any) -> None:
    """Check by hash that a value is the same on all ranks: settings, weights, or a whole training state.

    Args:
        what: its name, for the message.
        value: tensors, modules and plain values, in mappings and sequences to any depth.

    Raises:
        DistributedError: a value differs; raised on all ranks, with its name and the ranks that do not agree.
    """
    if world_size() == 1:
        return
    mine = {name: _digest(leaf) for name, leaf in _leaves(value)}
    total = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    totals = gather_object(total)
    if not broadcast_object(len(set(totals)) > 1):
        return
    problem = None
    if everyone := gather_object(mine):
        other, found = next((i, e) for i, e in enumerate(everyone) if e != mine)
        names = [name for name in {**mine, **found} if mine.get(name) != found.get(name)]
        here, there = mine.get(names[0]), found.get(names[0])
        if here is None or there is None:
            detail = f"is missing on rank {0 if here is None else other}"
        elif "sha256" in here + there:
            detail = "differs"
        else:
            detail = f"is {there} there and {here} here"
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        problem = (
            f"rank {other} does not agree with rank 0 on the {what}: {names[0] or 'it'} {detail}{more}; start all "
            "ranks with the same command, files and versions"
        )
    raise DistributedError(broadcast_object(problem))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping):
        items: Iterable = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, part in items:
        yield from _leaves(part, f"{name}.{key}" if name else str(key))


def _digest(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    tensor = leaf.detach().to("cpu").contiguous()
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    return f"sha256 {hashlib.sha256(f'{tensor.dtype} {list(tensor.shape)}'.encode() + content.tobytes()).hexdigest()}"


# ----------------------------------------------------------------------------------------------------------------------
# Batches and tensors


def share(n: int, setting: str = "batch") -> slice:
    """Return this rank's part of `n` images, the same number on each; parts lie in the order of the ranks.

    Args:
        n: images of the whole batch.
        setting: name of the setting that says so, for the message.

    Raises:
        DistributedError: `n` is not a multiple of the number of ranks.
    """
    size = world_size()
    if n % size:
        raise DistributedError(f"{setting}={n} is not a multiple of the {size} processes; give {n + -n % size}")
    return slice(rank() * n // size, (rank() + 1) * n // size)


def micro_batch(batch: int, batch_gpu: int | None = None, setting: str = "batch_gpu") -> int:
    """Return how many images of this rank's share go through a network at once.

    Args:
        batch: images of the whole batch.
        batch_gpu: the number that is wanted; None, or more than the share, means the whole share.
        setting: name of the setting that says so, for the message.

    Raises:
        DistributedError: `batch_gpu` does not divide the share, or the number of ranks does not divide the batch.
    """
    mine = share(batch)
    num = mine.stop - mine.start
    size = min(batch_gpu or num, num)
    if num % size:
        raise DistributedError(f"{setting}={size} does not divide the {num} images of each of {world_size()} processes")
    return size


def average_gradients(params: Iterable[torch.nn.Parameter], also: Sequence[torch.Tensor] = ()) -> None:
    """Replace every gradient by its mean over the ranks. All ranks then have the same, bit for bit.

    A gradient that is None on some ranks counts as zero there; one that is None on all stays None. Call it once a step,
    after the last `backward()`.

    Args:
        params: the same parameters in the same order on all ranks, on one device.
        also: tensors to average in place on the way, such as losses to log.
    """
    if world_size() == 1:
        return
    params = list(params)
    # Which gradients there are is known without the device, and agreed on without it.
    present = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
    with _collective():
        dist.all_reduce(present, dist.ReduceOp.MAX)
    wanted = [p for p, there in zip(params, present.tolist()) if there]
    for p in wanted:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    average([p.grad for p in wanted if p.grad is not None] + list(also))


@torch.no_grad()
def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace floating-point tensors by their means over the ranks, in place."""
    if world_size() == 1:
        return
    sent = []
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with _collective():
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in sent:
        with _collective():
            work.wait()
        _unflatten(flat.div_(world_size()), bucket)


@torch.no_grad()
def average_buffers(module: torch.nn.Module) -> None:
    """Replace the floating-point buffers of a module, such as running means, by their means over the ranks.

    The means are taken in float64, so that a buffer that is the same on all ranks does not change.
    """
    if world_size() == 1:
        return
    buffers = [b for b in module.buffers() if b.is_floating_point() and b.numel()]
    means = [b.double() for b in buffers]
    average(means)
    for buffer, mean in zip(buffers, means):
        buffer.copy_(mean)


@torch.no_grad()
def broadcast_parameters(module: torch.nn.Module) -> None:
    """Give all ranks the first rank's parameters and buffers."""
    if world_size() == 1:
        return
    for bucket in _buckets([*module.parameters(), *module.buffers()]):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
        with _collective():
            dist.broadcast(flat, 0)
        _unflatten(flat, bucket)


@torch.no_grad()
def gather_batch(terms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put together per-sample values of the whole batch from those of each rank's share.

    Args:
        terms: tensors `[n, ...]` of one floating-point type on one device; shapes are the same on all ranks.

    Returns:
        Tensors `[n * ranks, ...]` under the same names, on all ranks.
    """
    if world_size() == 1 or not terms:
        return dict(terms)
    flat = torch.cat([value.detach().reshape(-1) for value in terms.values()])
    everyone = [torch.empty_like(flat) for _ in range(world_size())]
    with _collective():
        dist.all_gather(everyone, flat)
    parts = [part.split([value.numel() for value in terms.values()]) for part in everyone]
    return {
        name: torch.cat([part[index].view(value.shape) for part in parts])
        for index, (name, value) in enumerate(terms.items())
    }


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Split the tensors into groups of one type and limited size, the same on all ranks if the tensors are alike."""
    kinds: dict[Any, list[list[torch.Tensor]]] = {}
    room: dict[Any, int] = {}
    for tensor in tensors:
        kind, size = (tensor.device, tensor.dtype), tensor.numel() * tensor.element_size()
        if room.get(kind, 0) < size:
            kinds.setdefault(kind, []).append([])
            room[kind] = BUCKET_BYTES
        kinds[kind][-1].append(tensor)
        room[kind] -= size
    return [bucket for buckets in kinds.values() for bucket in buckets if bucket]


def _unflatten(flat: torch.Tensor, bucket: list[torch.Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in bucket])
    torch._foreach_copy_([t.detach() for t in bucket], [part.view(t.shape) for part, t in zip(parts, bucket)])
