"""What `python -m di_refine view` shows: pictures of several networks at the same latents, their difference, the
nearest real pictures, and what a teacher makes of them.

The page itself, which knows gradio, is `view_page.py`; this module does not know it.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from di_refine.bridge import Bridge
from di_refine.commands.styles import first_half, has_styles, mapped, mixed, slerp, stylegan2, synthesize
from di_refine.denoisers import Denoiser
from di_refine.errors import InputError
from di_refine.files import pictures
from di_refine.files.datasets import ImageDataset
from di_refine.generators import DiffusionSampler, NetworkSampler, latents
from di_refine.metrics.feature_net import FeatureNet
from di_refine.metrics.references import reference_statistics

NOISE_MODES = ("const", "random", "none")
MAX_PICTURES = 36
"""At once, of each network."""

MAX_STEPS = 256
NEAREST = 5
"""Real pictures beside each picture of a network."""


@dataclass(frozen=True)
class Request:
    """Which pictures are asked for.

    Attributes:
        seed: of the first picture; each further one has the next.
        count: how many pictures, 1 to `MAX_PICTURES`.
        label: the number of their class; None leaves the classes to the networks' laws, as `generate.py` does.
        psi: truncation psi, for StyleGAN2 generators.
        noise_mode: one of `NOISE_MODES`, likewise.
        other: the seed that the first picture is turned towards ...
        between: ... by this part of the way, 0 to 1, in w where there is one, else on the sphere of latents.
        mix: the seed whose styles some layers take, for StyleGAN2 generators; None mixes none.
        layers: these layers, of which 0 is the coarsest; None are the first half.
        steps: of the sampler, for diffusion models.

    Raises:
        InputError: something is out of its range.
    """

    seed: int = 0
    count: int = 4
    label: int | None = None
    psi: float = 1.0
    noise_mode: str = "const"
    other: int = 1
    between: float = 0.0
    mix: int | None = None
    layers: tuple[int, ...] | None = None
    steps: int = 18

    def __post_init__(self) -> None:
        for what, value, low, high in (
            ("the seed", self.seed, 0, 2**32 - 1),
            ("the second seed", self.other, 0, 2**32 - 1),
            ("the seed of the styles", self.mix or 0, 0, 2**32 - 1),
            ("the number of pictures", self.count, 1, MAX_PICTURES),
            ("truncation psi", self.psi, -10, 10),
            ("the way between the seeds", self.between, 0, 1),
            ("the number of steps", self.steps, 2, MAX_STEPS),
        ):
            if not low <= value <= high:
                raise InputError(f"{what} is {value}, and may be {low} to {high}")
        if self.noise_mode not in NOISE_MODES:
            raise InputError(f"the noise mode is {self.noise_mode!r}, and may be {', '.join(NOISE_MODES)}")

    def seeds(self, first: int) -> list[int]:
        """The seeds of as many pictures, from the first on."""
        return list(range(first, first + self.count))


@dataclass(frozen=True)
class Panel:
    """Pictures under a title.

    Attributes:
        title: what they are.
        images: uint8 `[N, C, R, R]` on the CPU.
        note: a sentence about them; empty for none.
        columns: pictures in a row; None is about as many as rows.
    """

    title: str
    images: torch.Tensor
    note: str = ""
    columns: int | None = None


@dataclass(frozen=True)
class Real:
    """Real pictures and their features.

    Attributes:
        dataset: the pictures.
        detector: the feature network.
        features: of all pictures, float32 `[len(dataset), F]` on the CPU.
    """

    dataset: ImageDataset
    detector: FeatureNet
    features: torch.Tensor

    @staticmethod
    def of(dataset: ImageDataset, detector: FeatureNet) -> "Real":
        """Compute the features, or take them from the cache folder.

        Raises:
            InputError: the data set does not suit the feature network.
        """
        found = reference_statistics(dataset, detector, keep_features=True, cache=True).features
        return Real(dataset, detector, torch.as_tensor(found).float())


class Viewer:
    """Draws what a page asks for; one thread at a time.

    Args:
        networks: titles and samplers, at least one.
        difference: show the difference of the first two; None shows it where they can be compared.
        real: real pictures, among which the nearest are looked for.
        teacher: a `Denoiser` on the samplers' device, which denoises the pictures.

    Attributes:
        titles: of the networks.
        samplers: the networks.
        difference: whether there is a difference picture.
        class_names: of the classes that are drawn, by number; empty without classes.
        layers: how many layers of styles there are; 0 where no network is a StyleGAN2 generator.
        has_steps: whether a network is a diffusion model, which is sampled in steps.
        real, teacher: as given.

    Raises:
        InputError: the networks have different classes; a difference is asked for, and there are no two networks or
            they make pictures of different shape; or the data set or the teacher does not suit a network.
    """

    def __init__(
        self,
        networks: Sequence[tuple[str, NetworkSampler]],
        difference: bool | None = None,
        real: Real | None = None,
        teacher: torch.nn.Module | None = None,
    ):
        self.titles = [title for title, _ in networks]
        self.samplers = [sampler for _, sampler in networks]
        self.real, self.teacher = real, teacher
        self.difference = self._check_difference(difference)
        self.class_names = self._classes()
        self.layers = max(stylegan2(each, "", "").net.num_ws if has_styles(each) else 0 for each in self.samplers)
        self.has_steps = any(isinstance(each, DiffusionSampler) for each in self.samplers)
        for sampler in self.samplers:
            pictures.check_channels(sampler.num_channels)
            if real is not None:
                real.detector.check_channels(sampler.num_channels)
        self._to_teacher = [] if teacher is None else [self._bridge_to(teacher, *named) for named in networks]
        self._from_real = [] if real is None else [_fitted(real.dataset, sampler) for sampler in self.samplers]
        self._drawn: tuple[Request, list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------------------------------
    # What is shown

    def pictures(self, request: Request) -> list[Panel]:
        """A panel for each network, and one for the difference of the first two.

        Raises:
            InputError: the request names a class or a layer that there is not.
        """
        images = [images for images, _ in self._images(request)]
        panels = [
            Panel(title, pictures.to_uint8(each).cpu(), self._kind(sampler, request))
            for title, sampler, each in zip(self.titles, self.samplers, images)
        ]
        if self.difference:
            first, second = self.titles[:2]
            panels.append(_difference(f"{second} - {first}", images[0], images[1], f"brighter in {second}"))
        return panels

    def nearest(self, request: Request) -> list[Panel]:
        """For each network its pictures in the first column, and beside each the nearest real pictures.

        Distances are Euclidean, between features of whole-number pictures, as metrics take them.

        Raises:
            InputError: as `pictures`, or there are no real pictures.
        """
        if self.real is None:
            raise InputError("there are no real pictures; give a data set with --data")
        found = []
        for index, (images, _) in enumerate(self._images(request)):
            shown = pictures.to_uint8(images).cpu()
            with self._lock:
                features = self.real.detector(shown, probabilities=False)[0].cpu()
            count = min(NEAREST, len(self.real.features))
            distances, numbers = torch.cdist(features, self.real.features).topk(count, largest=False)
            real = torch.from_numpy(self.real.dataset.images(numbers.flatten().numpy()))
            real = self._from_real[index](real).unflatten(0, (-1, count))
            rows = torch.cat([shown[:, None], real], dim=1).flatten(0, 1)
            mean = distances[:, 0].mean().item()
            note = f"first column: the network's; mean distance of the nearest: {mean:.3g}"
            found.append(Panel(self.titles[index], rows, note, 1 + count))
        return found

    def judged(self, request: Request, sigma: float, which: int = 0) -> list[Panel]:
        """What the teacher makes of a network's pictures: as they are, noised, denoised, and how that differs.

        Where denoising changes them, the teacher disagrees; refinement pulls them there. The noise is the same each
        time, and added at the teacher's size.

        Args:
            request: which pictures.
            sigma: the noise level.
            which: the number of the network.

        Raises:
            InputError: as `pictures`, there is no teacher or network of that number, or no such noise level.
        """
        if self.teacher is None:
            raise InputError("there is no teacher; give one with --teacher")
        if not 0 <= which < len(self.samplers):
            raise InputError(f"there is no network {which}; the last is {len(self.samplers) - 1}")
        low, high = self.sigmas
        if not low <= sigma <= high:
            raise InputError(f"the noise level is {sigma:g}, and the teacher knows {low:g} to {high:g}")
        images, labels = self._images(request)[which]
        with self._lock, torch.inference_mode():
            x0 = self._to_teacher[which](images)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
            noised = x0 + sigma * noise
            c = labels.to(x0) if labels.shape[1] == self._denoiser.label_dim else _unlabelled(x0, self._denoiser)
            denoised = self._denoiser(noised, x0.new_full([len(x0)], sigma), c).float()
        return [
            Panel(self.titles[which], pictures.to_uint8(x0).cpu(), "as the teacher sees it"),
            Panel("noised", pictures.to_uint8(noised).cpu(), f"sigma {sigma:.3g}"),
            Panel("denoised", pictures.to_uint8(denoised).cpu(), "by the teacher"),
            _difference("denoised - picture", x0, denoised, "brighter after denoising"),
        ]

    @property
    def sigmas(self) -> tuple[float, float]:
        """The least and the largest noise level that the teacher knows, the latter at most 80, where EDM begins."""
        return max(self._denoiser.sigma_min, 1e-3), min(self._denoiser.sigma_max, 80.0)

    # ------------------------------------------------------------------------------------------------------------------

    def _images(self, request: Request) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each network's images, float `[count, C, R, R]`, and their labels; those of the last request are kept."""
        with self._lock:
            if self._drawn is None or self._drawn[0] != request:
                self._drawn = request, [self._draw(sampler, request) for sampler in self.samplers]
            return self._drawn[1]

    def _draw(self, sampler: NetworkSampler, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        labels = self._labels(sampler, request)
        start, end = (latents(request.seeds(seed), sampler.latent_shape) for seed in (request.seed, request.other))
        if isinstance(sampler, DiffusionSampler):
            sampler.num_steps = request.steps
        if not has_styles(sampler):
            z = slerp(start, end, request.between) if request.between else start
            return sampler.images([], labels, z=z), labels
        generator = stylegan2(sampler, "", "")
        generator.truncation_psi, generator.noise_mode = request.psi, request.noise_mode
        ws = mapped(sampler, generator, start, labels)
        if request.between:
            ws = ws.lerp(mapped(sampler, generator, end, labels), request.between)
        if request.mix is not None:
            layers = first_half(generator) if request.layers is None else request.layers
            known = [layer for layer in layers if 0 <= layer < generator.net.num_ws]
            styles = latents([request.mix], sampler.latent_shape)
            ws = mixed(ws, mapped(sampler, generator, styles, labels[:1]), known)
        return synthesize(sampler, generator, ws), labels

    def _labels(self, sampler: NetworkSampler, request: Request) -> torch.Tensor:
        """Labels `[count, label_dim]`; a network without classes has none whatever is asked for."""
        if request.label is None or not sampler.label_dim:
            return sampler.law.in_turn(request.seeds(request.seed))
        if not 0 <= request.label < len(self.class_names):
            raise InputError(f"there is no class {request.label}; there are {len(self.class_names)}")
        return torch.eye(sampler.label_dim)[request.label].expand(request.count, -1)

    def _kind(self, sampler: NetworkSampler, request: Request) -> str:
        size = f"{sampler.resolution}x{sampler.resolution}"
        if has_styles(sampler):
            return f"StyleGAN2 generator, {size}"
        if isinstance(sampler, DiffusionSampler):
            return f"diffusion model, {request.steps} steps, {size}"
        steps = len(cast(Any, sampler).generator.sigmas)
        return f"distilled, {steps} step{'s' if steps > 1 else ''}, {size}"

    @property
    def _denoiser(self) -> Denoiser:
        return cast(Denoiser, self.teacher)

    def _check_difference(self, wanted: bool | None) -> bool:
        shapes = [(sampler.num_channels, sampler.resolution) for sampler in self.samplers[:2]]
        fits = len(shapes) == 2 and shapes[0] == shapes[1]
        if wanted and len(shapes) < 2:
            raise InputError("--difference needs two networks; name another one")
        if wanted and not fits:
            (a, size), (b, other) = shapes
            first, second = self.titles[:2]
            raise InputError(
                f"--difference: {first} makes pictures of {size}x{size} pixels and {a} channels, {second} of "
                f"{other}x{other} and {b}; leave it out to see them side by side"
            )
        return fits if wanted is None else wanted

    def _classes(self) -> tuple[str, ...]:
        """The names of the classes; those of the data set where no network has any."""
        known = [(title, each.law) for title, each in zip(self.titles, self.samplers) if each.label_dim]
        known = [(title, law) for title, law in known if law.has_classes]
        if not known:
            return ()
        (first, law), *others = known
        for title, other in others:
            if other.label_dim != law.label_dim:
                raise InputError(f"{title} has {other.label_dim} classes, and {first} has {law.label_dim}")
            if other.names and law.names:
                law.check_order(other.names, title)
        if self.real is not None and len(self.real.dataset.class_names) == law.label_dim:
            law = law if law.names else replace(law, names=self.real.dataset.class_names)
        return tuple(law.title(number) for number in range(law.label_dim))

    def _bridge_to(self, teacher: torch.nn.Module, title: str, sampler: NetworkSampler) -> torch.nn.Module:
        model = cast(Denoiser, teacher)
        if sampler.label_dim and model.label_dim and sampler.label_dim != model.label_dim:
            raise InputError(
                f"`teacher` has {model.label_dim} classes, and {title} has {sampler.label_dim}; take a teacher of the "
                "same classes, or one without"
            )
        shapes = (sampler.num_channels, sampler.resolution), (model.img_channels, model.img_resolution)
        return torch.nn.Identity() if shapes[0] == shapes[1] else Bridge(*shapes[0], *shapes[1]).to(sampler.device)


class _Fitted(torch.nn.Module):
    """Real pictures, uint8, brought to the shape of a network's."""

    def __init__(self, bridge: Bridge):
        super().__init__()
        self.bridge = bridge

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return pictures.to_uint8(self.bridge(images.float() / 127.5 - 1))


def _fitted(dataset: ImageDataset, sampler: NetworkSampler) -> torch.nn.Module:
    shapes = (dataset.num_channels, dataset.resolution), (sampler.num_channels, sampler.resolution)
    return torch.nn.Identity() if shapes[0] == shapes[1] else _Fitted(Bridge(*shapes[0], *shapes[1]))


def _unlabelled(images: torch.Tensor, model: Denoiser) -> torch.Tensor:
    return images.new_zeros(len(images), model.label_dim)


def _difference(title: str, first: torch.Tensor, second: torch.Tensor, red: str) -> Panel:
    """The second images less the first: white where they agree, red where the second is brighter, blue where darker.

    In each pixel the channel that differs most counts, and the largest difference has full colour.

    Args:
        title: of the panel.
        first, second: float `[N, C, R, R]` in [-1, 1].
        red: what red means.
    """
    change = (second.clamp(-1, 1) - first.clamp(-1, 1)).cpu()
    strongest = change.gather(1, change.abs().argmax(dim=1, keepdim=True))
    largest = strongest.abs().max().item()
    level = strongest / largest if largest else strongest
    colours = 1 - torch.cat([(-level).clamp(min=0), level.abs(), level.clamp(min=0)], dim=1)  # 1 is white
    note = f"red: {red}; largest difference {127.5 * largest:.0f}, mean {127.5 * change.abs().mean():.1f} of 255"
    return Panel(title, pictures.to_uint8(2 * colours - 1), note if largest else "no difference")


def distinct_titles(names: Sequence[str]) -> list[str]:
    """A short title for each network: its file's name, or all of what was given where that names several."""
    stems = [Path(name).stem for name in names]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else name for stem, name in zip(stems, names)]
