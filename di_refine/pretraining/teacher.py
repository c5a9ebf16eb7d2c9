"""Training a diffusion teacher (Karras et al. 2022, arXiv 2206.00364, section 5 and table 7)."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from di_refine.edm.loss import EDMLoss
from di_refine.errors import RunError
from torch_utils import distributed, misc


@dataclass
class TeacherConfig:
    """Settings of `TeacherTrainer`.

    Attributes:
        batch: images per step, of all processes together.
        batch_gpu: images per forward pass; None is all that a process has. Must divide `batch`.
        lr: Adam's learning rate, reached after a linear ramp.
        lr_rampup: length of the ramp, in images.
        lr_rampdown: length of the fall to zero that ends at `total`, in images; 0 keeps the rate.
        total: length of the training, in images, which only the fall asks for.
        ema_nimg: half-life of the average, in images.
        ema_rampup: upper limit of the half-life as a fraction of the images seen, so that the start is forgotten.
        p_mean, p_std: of ln(sigma) in training.
        precision: 'fp32' or 'bf16' (autocast; weights stay float32).
        compile: backend of `torch.compile` for the network, such as 'inductor', or None. Random numbers inside the
            network, which are those of dropout, may then differ from those without.
        seed: every draw is a function of it and the number of images seen.
    """

    batch: int = 512
    batch_gpu: int | None = None
    lr: float = 1e-3
    lr_rampup: float = 10_000_000
    lr_rampdown: float = 0
    total: int | None = None
    ema_nimg: float = 500_000
    ema_rampup: float = 0.05
    p_mean: float = -1.2
    p_std: float = 1.2
    precision: str = "fp32"
    compile: str | None = None
    seed: int = 0

    def __post_init__(self):
        self.batch_gpu = self.batch_gpu or self.batch
        if self.batch < 1 or self.batch % self.batch_gpu:
            raise ValueError(f"batch={self.batch} is not a multiple of batch_gpu={self.batch_gpu}")
        if self.lr_rampdown and self.total is None:
            raise ValueError("lr_rampdown needs to know the end of the training: give total as well")

    def lr_at(self, nimg: int) -> float:
        """The learning rate of the step that ends at `nimg` images; it never falls all the way to zero."""
        rate = self.lr * min(nimg / max(self.lr_rampup, 1e-8), 1)
        if self.lr_rampdown:
            left = self.total - (nimg - self.batch)
            rate *= min(max(left, self.batch) / self.lr_rampdown, 1)
        return rate


class TeacherTrainer:
    """Denoising score matching on real images.

    With several processes (`torch_utils.distributed`), each makes one trainer of the same network and settings and
    takes every step; all but dropout is the same as with one.

    Args:
        net: an EDM-preconditioned network on its device; trained in place.
        data: `(start_nimg) -> iterator` of this process's share of each step's images, uint8 `[share, C, R, R]`, and
            labels `[share, label_dim]`; the order is a function of the images seen.
        config: settings.
        augment_pipe: called like `di_refine.edm.augment.AugmentPipe`, or None.

    Raises:
        DistributedError: the processes do not divide the batch, or `batch_gpu` does not divide their shares.

    Attributes:
        ema: the average, which is the result.
        nimg: images seen, by all processes together.
        share, micro_batch: this process's part of a batch, and how many images of it make a forward pass.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        data: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]],
        config: TeacherConfig,
        augment_pipe: torch.nn.Module | None = None,
    ):
        self.net = net.train().requires_grad_(True)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.config, self.augment_pipe = config, augment_pipe
        # Shares its parameters with `net`, which is what states, averages and pickles are made of.
        self._denoiser = torch.compile(self.net, backend=config.compile) if config.compile else self.net
        self.share = distributed.share(config.batch)
        self.micro_batch = distributed.micro_batch(config.batch, config.batch_gpu)
        self.loss = EDMLoss(config.p_mean, config.p_std, net.sigma_data)
        self.params = list(net.parameters())
        self.device = self.params[0].device
        fused = self.device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.Adam(self.params, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        self.nimg = 0
        self._data, self._batches = data, None
        self._bad = torch.full([], -1, dtype=torch.int64, device=self.device)

    def step(self) -> dict[str, torch.Tensor]:
        """One update. Returns the mean `loss` per pixel and the `grad_norm`, scalars on the device."""
        cfg, mine = self.config, self.share
        if self._batches is None:
            distributed.check_equal("teacher's settings", asdict(cfg))
            distributed.check_equal("teacher's training state", self.state_dict())
            self._batches = self._data(self.nimg)
        images, labels = next(self._batches)
        num, size = mine.stop - mine.start, self.micro_batch
        if len(images) != num:
            raise ValueError(f"the data stream gives {len(images)} images a step where this process needs {num}")
        images = images.to(torch.float32) / 127.5 - 1
        # Drawn for the whole batch and then cut, so that they depend neither on the processes nor on batch_gpu.
        rng = torch.Generator(self.device).manual_seed(misc.derive_seed(cfg.seed, self.nimg, "teacher"))
        rnd = torch.randn([cfg.batch, 1, 1, 1], generator=rng, device=self.device)[mine]
        noise = torch.randn([cfg.batch, *images.shape[1:]], generator=rng, device=self.device)[mine]
        mean = torch.zeros([], device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(misc.derive_seed(cfg.seed, self.nimg, "networks", distributed.rank()))
            for start in range(0, num, size):
                part = slice(start, start + size)
                x, c = images[part], labels[part] if labels.shape[1] else None
                with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                    pipe = self._augmentation(mine.start + start, size)
                    loss = self.loss(self._denoiser, x, c, pipe, rnd=rnd[part], noise=noise[part]).float()
                (loss.sum() / num).backward()
                mean += loss.detach().mean() * (size / num)
        distributed.average_gradients(self.params, also=[mean])
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr_at(self.nimg + cfg.batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._bad = torch.where((self._bad < 0) & ~torch.isfinite(mean + norm), self.nimg, self._bad)
        self.nimg += cfg.batch
        self._average()
        return {"loss": mean, "grad_norm": norm.detach()}

    def _augmentation(self, start: int, size: int) -> Callable | None:
        """The augmentation of images `start` to `start + size` of the batch, whoever has the others."""
        if self.augment_pipe is None:
            return None
        rng = torch.Generator().manual_seed(misc.derive_seed(self.config.seed, self.nimg, "augmentation"))

        def augment(images: torch.Tensor):
            # The resampling of clean images must not round them to bfloat16: its step is half a grey level.
            with torch.autocast(self.device.type, enabled=False):
                return self.augment_pipe(images, generator=rng, part=(start, self.config.batch))

        return augment

    @torch.no_grad()
    def _average(self) -> None:
        cfg = self.config
        half_life = min(cfg.ema_nimg, self.nimg * cfg.ema_rampup)
        keep = 0.5 ** (cfg.batch / max(half_life, 1e-8))
        torch._foreach_lerp_(list(self.ema.parameters()), self.params, 1 - keep)
        for average, value in zip(self.ema.buffers(), self.net.buffers()):
            average.copy_(value)

    def check_finite(self, last_good: str = "none yet") -> None:
        """Raise if a loss or gradient since the start was not finite (costs one synchronisation).

        Raises:
            RunError: naming the images seen and `last_good`, the snapshot to go back to.
        """
        nimg = self._bad.item()
        if nimg >= 0:
            step = nimg // self.config.batch
            raise RunError(
                f"the teacher's loss or gradient is not finite at {nimg / 1000:.3f} kimg (step {step}); "
                f"last good snapshot: {last_good}. Lower --lr, or use --precision=fp32."
            )

    def state_dict(self) -> dict:
        """Everything stateful, readable with `torch.load(weights_only=True)`."""
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "nimg": self.nimg,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`; the network and settings must be the same, the number of processes need not."""
        for name in ("net", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.nimg = state["nimg"]
        self._bad.fill_(-1)
        self._batches = None
