"""Training a diffusion teacher (Karras et al. 2022, arXiv 2206.00364, section 5 and table 7)."""

from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from di_refine.edm.augment import AugmentPipe
from di_refine.edm.loss import EDMLoss
from di_refine.edm.networks import EDMPrecond
from di_refine.errors import InputError
from di_refine.noise import by_sigma
from di_refine.pretraining.config import TeacherConfig, UNetConfig, whole_numbers
from torch_utils import distributed, misc
from torch_utils.training import Average, FiniteWatch, adam, compiled, load_adam, seeded


def build(unet: UNetConfig, resolution: int, channels: int, label_dim: int, augment: bool, seed: int) -> EDMPrecond:
    """An untrained diffusion model.

    Args:
        unet: its sizes.
        resolution, channels, label_dim: of the images.
        augment: the network is to be told how its training images were transformed.
        seed: of the first weights.

    Raises:
        InputError: the sizes do not fit each other or the images.
    """
    levels = unet.multipliers
    if resolution % 2 ** (len(levels) - 1):
        raise InputError(
            f"channel_mult={unet.channel_mult} has {len(levels)} levels, and {resolution}x{resolution} images "
            f"cannot be halved {len(levels) - 1} times; give fewer levels"
        )
    torch.manual_seed(misc.derive_seed(seed, "weights"))
    try:
        return EDMPrecond(
            img_resolution=resolution,
            img_channels=channels,
            label_dim=label_dim,
            model_type="SongUNet",
            model_channels=unet.width,
            channel_mult=levels,
            num_blocks=unet.num_blocks,
            attn_resolutions=whole_numbers("attn_resolutions", unet.attn_resolutions),
            dropout=unet.dropout,
            augment_dim=AugmentPipe.edm().label_dim if augment else 0,
        )
    except ValueError as error:
        raise InputError(f"width={unet.width} with `channel_mult` cannot be built: {error}") from None


def learning_rate(config: TeacherConfig, nimg: int, total: int | None) -> float:
    """The learning rate of the step that ends at `nimg` images; it never falls all the way to zero.

    Args:
        config: its `lr`, `lr_rampup`, `lr_rampdown` and `batch` count.
        nimg: images seen.
        total: length of the training, in images, which only the fall asks for.
    """
    rate = config.lr * min(nimg / max(config.lr_rampup * 1000, 1e-8), 1)
    if config.lr_rampdown and total is not None:
        left = total - (nimg - config.batch)
        rate *= min(max(left, config.batch) / (config.lr_rampdown * 1000), 1)
    return rate


class TeacherTrainer:
    """Denoising score matching on real images.

    With several processes (`torch_utils.distributed`), each makes one trainer of the same network and settings and
    takes every step; all but dropout is the same as with one.

    Args:
        net: an EDM-preconditioned network on its device; trained in place.
        data: `(start_nimg) -> iterator` of this process's share of each step's images, uint8 `[share, C, R, R]`, and
            labels `[share, label_dim]`; the order is a function of the images seen.
        config: the settings.
        total: length of the training, in images, which a falling learning rate needs to know.
        backend: of `torch.compile`, where the network is compiled. Random numbers inside the network, which are those
            of dropout, may then differ from those without.

    Raises:
        ValueError: the learning rate is to fall, and `total` is not given.
        DistributedError: the processes do not divide the batch, or `batch_gpu` does not divide their shares.

    Attributes:
        ema: the average, which is the result.
        nimg: images seen, by all processes together.
        by_sigma: `loss_by_sigma` of the last step, `[6]`: the loss in bins with the edges `noise.SIGMA_EDGES`,
            NaN where no level fell.
        share, micro_batch: this process's part of a batch, and how many images of it make a forward pass.
    """

    def __init__(
        self,
        net: EDMPrecond,
        data: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]],
        config: TeacherConfig,
        total: int | None = None,
        backend: str = "inductor",
    ):
        if config.lr_rampdown and total is None:
            raise ValueError("`lr_rampdown` needs to know the end of the training: give total as well")
        self.net = net.train().requires_grad_(True)
        self._average = Average(net)
        self.ema = self._average.module
        self.config, self._total = config, total
        self.augment_pipe = AugmentPipe.edm(config.augment) if config.augment else None
        # Shares its parameters with `net`, which is what states, averages and pickles are made of.
        self._denoiser = compiled(self.net, backend) if config.compile else self.net
        self.share = distributed.share(config.batch)
        self.micro_batch = distributed.micro_batch(config.batch, config.batch_gpu)
        self.loss = EDMLoss(config.sigma_mean, config.sigma_std, net.sigma_data)
        self.params = list(net.parameters())
        self.device = self.params[0].device
        self.optimizer = adam(self.params, config.lr, (0.9, 0.999))
        self.nimg = 0
        self.by_sigma: dict[str, torch.Tensor] = {}
        self._data = data
        self._batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._finite = FiniteWatch(["teacher"], self.device)

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
        losses = []  # of the images
        with seeded(self.device, cfg.seed, self.nimg, "networks", distributed.rank()):
            for start in range(0, num, size):
                part = slice(start, start + size)
                x, c = images[part], labels[part] if labels.shape[1] else None
                with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                    pipe = self._augmentation(mine.start + start, size)
                    loss = self.loss(self._denoiser, x, c, pipe, rnd=rnd[part], noise=noise[part]).float()
                (loss.sum() / num).backward()
                mean += loss.detach().mean() * (size / num)
                losses.append(loss.detach().flatten(1).mean(dim=1))
        bins = by_sigma(self.loss.sigma_and_weight(rnd)[0].flatten(), torch.cat(losses))
        distributed.average_gradients(self.params, also=[mean, bins])
        self.by_sigma = {"loss_by_sigma": bins[0] / bins[1]}
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, self.nimg + cfg.batch, self._total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._finite.note("teacher", mean + norm, self.nimg)
        self.nimg += cfg.batch
        self._average.update(cfg.batch, min(cfg.ema_kimg * 1000, self.nimg * cfg.ema_rampup))
        return {"loss": mean, "grad_norm": norm.detach()}

    def _augmentation(self, start: int, size: int) -> Callable | None:
        """The augmentation of images `start` to `start + size` of the batch, whoever has the others."""
        pipe = self.augment_pipe
        if pipe is None:
            return None
        rng = torch.Generator().manual_seed(misc.derive_seed(self.config.seed, self.nimg, "augmentation"))

        def augment(images: torch.Tensor):
            # The resampling of clean images must not round them to bfloat16: its step is half a grey level.
            with torch.autocast(self.device.type, enabled=False):
                return pipe(images, generator=rng, part=(start, self.config.batch))

        return augment

    def check_finite(self, last_good: str = "none yet") -> None:
        """Raise if a loss or gradient since the start was not finite (costs one synchronisation).

        Raises:
            NotFiniteError: naming the images seen and `last_good`, the snapshot to go back to.
        """
        self._finite.check(self.config.batch, last_good, "Lower `lr`, or use `precision=fp32`.")

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
        for name in ("net", "ema"):
            getattr(self, name).load_state_dict(state[name])
        load_adam(self.optimizer, state["optimizer"])
        self.nimg = state["nimg"]
        self._finite.reset()
        self._batches = None
