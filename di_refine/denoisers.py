"""Several diffusion models as one teacher."""

import math
from collections.abc import Sequence

import torch

from di_refine.errors import InputError


class Ensemble(torch.nn.Module):
    """A teacher whose score is the weighted mean of several teachers' scores.

    With one noise level for all, the mean of the scores `(D_i - x) / s^2` is the score of `D = sum of w_i D_i`; so this
    module's output is that sum. At the noise level s its score is that of the product of experts

        q_s(x) proportional to  prod of q_{i,s}(x)^{w_i},     q_{i,s}: what teacher i knows, noised to level s,

    the normalised geometric mean: images likely under all teachers, not under any of them. Note the order: it is the
    product of the noised densities at EACH level, not the noised product of the clean densities. The two agree where s
    is small or the experts are Gaussians of one covariance, and differ otherwise; the noised product is not available
    from the teachers' scores. A refined generator therefore minimises, at each level, its divergence from that level's
    product; these need not be noised versions of one clean density.

    May be copied, moved and trained as any module. Weights of exactly 0 leave a teacher out at no cost.

    Args:
        teachers: denoisers called as `(x, sigma, labels)`, for instance `di_refine.edm.networks.EDMPrecond`.
        weights: one for each, not negative, with sum 1; None makes them equal.

    Raises:
        InputError: no teachers; they differ in resolution, channels or classes; they have no noise levels in common; or
            the weights are wrong.

    Attributes:
        teachers: the `ModuleList`, in order.
        weights: floats.
        img_resolution, img_channels, label_dim: what all teachers take.
        sigma_min, sigma_max: the levels that all teachers know.
        sigma_data: of the first teacher (0.5 where it has none), since a student score begins as its copy.
    """

    def __init__(self, teachers: Sequence[torch.nn.Module], weights: Sequence[float] | None = None):
        super().__init__()
        if not teachers:
            raise InputError("--teacher is needed at least once")
        self.weights = check_weights(weights, len(teachers))
        for attribute, what in (
            ("img_resolution", "resolution"),
            ("img_channels", "number of channels"),
            ("label_dim", "number of classes"),
        ):
            values = [getattr(teacher, attribute) for teacher in teachers]
            if len(set(values)) > 1:
                raise InputError(
                    f"--teacher: the {what} of the teachers is {' and '.join(map(str, values))}, but a mean of their "
                    "scores needs equal ones; leave out the teachers that differ"
                )
            setattr(self, attribute, values[0])
        self.teachers = torch.nn.ModuleList(teachers)
        self.sigma_min = max(getattr(teacher, "sigma_min", 0.0) for teacher in teachers)
        self.sigma_max = min(getattr(teacher, "sigma_max", math.inf) for teacher in teachers)
        self.sigma_data = getattr(teachers[0], "sigma_data", 0.5)
        if self.sigma_min > self.sigma_max:
            raise InputError(
                "--teacher: the teachers have no noise levels in common: one begins at "
                f"{self.sigma_min:g}, another ends at {self.sigma_max:g}"
            )

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """The weighted mean of the teachers' outputs.

        Args:
            x: [N, C, R, R], clean images in [-1, 1] plus sigma times unit normals.
            sigma: noise level, one number or one per sample.
            class_labels: [N, label_dim], or None.
            kwargs: passed to every teacher.

        Returns:
            Denoised images, as the teachers return them; of a single teacher, exactly its own.
        """
        total = None
        for weight, teacher in zip(self.weights, self.teachers):
            if weight == 0:
                continue
            part = teacher(x, sigma, class_labels, **kwargs)
            part = part if weight == 1 else weight * part
            total = part if total is None else total + part
        return total

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The nearest noise level that the teachers know.

        Each teacher in turn rounds what the one before left. That is exact while at most one of them has discrete
        levels; every teacher rounds anew on what it is given.
        """
        for teacher in self.teachers:
            sigma = teacher.round_sigma(sigma)
        return sigma

    def extra_repr(self) -> str:
        return f"weights={', '.join(f'{weight:g}' for weight in self.weights)}"


def parse_weights(texts: Sequence[str | float], count: int) -> tuple[float, ...]:
    """What `--teacher-weight` was given as, once per teacher.

    Args:
        texts: numbers, or their text, in the order of the teachers; none at all means equal weights.
        count: how many teachers there are.

    Returns:
        `count` weights with sum 1.

    Raises:
        InputError: naming the option, when something is not a number or `check_weights` refuses.
    """
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        raise InputError(f"--teacher-weight must be numbers such as 0.5, not {', '.join(map(repr, texts))}") from None
    return check_weights(numbers, count)


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weights of `count` teachers; none given are equal ones.

    Raises:
        InputError: naming the option, when their number differs, one is negative, or their sum is not 1 (to 1e-6).
    """
    if not weights:
        return (1 / count,) * count
    given = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise InputError(
            f"--teacher-weight is given {len(weights)} times and --teacher {count} times; give one weight per teacher, "
            "or none for equal ones"
        )
    if not all(weight >= 0 for weight in weights):
        raise InputError(f"--teacher-weight must not be negative, but the weights are {given}")
    if not abs(sum(weights) - 1) <= 1e-6:
        raise InputError(f"--teacher-weight must sum to 1, but {given} sum to {sum(weights):g}")
    return tuple(float(weight) for weight in weights)
