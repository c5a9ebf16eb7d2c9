"""What every trainer needs: an average of the weights, a watch for numbers that are not finite, seeded random draws."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torch_utils import misc


class NotFiniteError(RuntimeError):
    """A loss or gradient became infinite or NaN; the message says whose, when, and what to do."""


class Average:
    """An exponential moving average of a module's parameters; buffers are copied.

    Args:
        module: what is averaged.
        average: the average to go on with; a copy of the module if None.

    Attributes:
        module: the average, in eval mode and without gradients.
    """

    def __init__(self, module: torch.nn.Module, average: torch.nn.Module | None = None):
        self.module = (copy.deepcopy(module) if average is None else average).eval().requires_grad_(False)
        self._averages = [p.detach() for p in self.module.parameters()]
        self._newest = [p.detach() for p in module.parameters()]
        self._buffers = list(zip(self.module.buffers(), module.buffers()))

    @torch.no_grad()
    def update(self, num_images: int, half_life: float) -> None:
        """Move the average towards the module.

        Args:
            num_images: images since the last update.
            half_life: images after which half of the average is newer; 0 makes the average a copy.
        """
        keep = 0.5 ** (num_images / half_life) if half_life > 0 else 0.0
        torch._foreach_lerp_(self._averages, self._newest, 1 - keep)
        for average, newest in self._buffers:
            average.copy_(newest)

    @torch.no_grad()
    def distance(self) -> torch.Tensor:
        """Length of the difference between average and module, relative to the length of the module's parameters."""
        difference = torch.nn.utils.get_total_norm(torch._foreach_sub(self._averages, self._newest))
        return difference / torch.nn.utils.get_total_norm(self._newest)


class FiniteWatch:
    """Remembers when a loss or gradient first was not finite. Noting costs no wait for the device; `check` waits once.

    Nothing is repaired on the way: from such a step on the networks may hold weights that are not finite.

    Args:
        names: whose losses and gradients are noted.
        device: where they are.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self._names = list(names)
        self._first = torch.full([len(names)], -1, dtype=torch.int64, device=device)

    def note(self, name: str, value: torch.Tensor, nimg: int) -> None:
        """Note a scalar of the step that began at `nimg` images."""
        index = self._names.index(name)
        new = ~torch.isfinite(value) & (self._first[index] < 0)
        self._first[index] = torch.where(new, nimg, self._first[index])

    def check(self, batch: int, last_good: str, remedy: str) -> None:
        """Raise if anything noted so far was not finite.

        Args:
            batch: images per step.
            last_good: the newest snapshot before.
            remedy: what to do, for the message.

        Raises:
            NotFiniteError: naming the first that failed, images seen, and `last_good`.
        """
        bad = [(nimg, name) for name, nimg in zip(self._names, self._first.tolist()) if nimg >= 0]
        if bad:
            nimg, name = min(bad, key=lambda found: found[0])
            raise NotFiniteError(
                f"the loss or gradient of the {name} is not finite at {nimg / 1000:.3f} kimg (step {nimg // batch}); "
                f"last good snapshot: {last_good}. {remedy}"
            )

    def reset(self) -> None:
        """Forget what was noted."""
        self._first.fill_(-1)


@contextlib.contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Seed PyTorch's own generators for a block by any mix of integers and words, and restore them afterwards.

    What networks draw by themselves (noise inputs, dropout) then is a function of the parts alone.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(misc.derive_seed(*parts))
        yield


def adam(
    params: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float], eps: float = 1e-8
) -> torch.optim.Adam:
    """Adam in its fused form, where the device has one."""
    params = list(params)
    return torch.optim.Adam(params, lr=lr, betas=betas, eps=eps, fused=params[0].device.type in ("cuda", "cpu"))


def load_adam(optimizer: torch.optim.Adam, state: Mapping[str, Any]) -> None:
    """Continue with the moments of a state. Learning rates and all other settings are those of the optimizer.

    PyTorch checks neither: its fused update takes moments of any size for those of the parameter, and reads and writes
    what lies behind them in memory.

    Args:
        optimizer: of the parameters that the moments are of.
        state: what the `state_dict` of such an optimizer returned.

    Raises:
        ValueError: it is of other parameters, or not of Adam.
    """
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in state["param_groups"]] != [group["params"] for group in own]:
        raise ValueError("the optimizer's state is of other parameters")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for index, moments in state["state"].items():
        shapes = {"step": [], "exp_avg": [*parameters[index].shape], "exp_avg_sq": [*parameters[index].shape]}
        floats = all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in moments.values())
        if not floats or {name: [*value.shape] for name, value in moments.items()} != shapes:
            raise ValueError(f"the optimizer's moments of parameter {index} are none of Adam")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def compiled(net: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """What to call in place of a network, to run it as `torch.compile` makes it.

    The network itself stays as it is, with the parameters that both use. Where it cannot be compiled, one line on
    stderr says why, and it is called as it is from then on.

    Args:
        net: called with tensors whose shapes do not change.
        backend: of `torch.compile`. Random numbers inside the network are drawn in another order by 'inductor'.
    """
    run: Callable[..., Any] = torch.compile(net, backend=backend, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal run
        if run is net:
            return net(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return run(*args, **kwargs)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            print(f"{type(net).__name__} cannot be compiled and runs without: {reason}", file=sys.stderr, flush=True)
            run = net
            return net(*args, **kwargs)

    return call
