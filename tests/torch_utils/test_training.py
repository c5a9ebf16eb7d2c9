"""What all trainers share: the average of the weights, the watch for numbers that are not finite, seeded draws."""

import math

import pytest
import torch

from torch_utils import training
from torch_utils.training import Average, FiniteWatch, NotFiniteError, seeded


def network(value: float) -> torch.nn.Module:
    net = torch.nn.Linear(2, 2)
    net.register_buffer("calls", torch.tensor(value))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(value)
    return net


def test_half_of_the_average_is_newer_after_its_half_life():
    net = network(0.0)
    average = Average(net)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
        net.calls.fill_(7.0)
    for _ in range(4):
        average.update(10, half_life=40)
    assert all(torch.allclose(p, torch.full_like(p, 0.5)) for p in average.module.parameters())
    assert average.module.calls == 7 and not average.module.training
    assert not any(p.requires_grad for p in average.module.parameters())
    assert average.distance() == pytest.approx(0.5)
    average.update(10, half_life=0)
    assert average.distance() == 0


def test_an_average_goes_on_with_one_that_is_given():
    net, before = network(1.0), network(0.0)
    average = Average(net, before)
    assert average.module is before
    average.update(10, half_life=10)
    assert all(torch.allclose(p, torch.full_like(p, 0.5)) for p in before.parameters())


def test_the_first_failure_is_the_one_that_is_named():
    watch = FiniteWatch(["student", "generator"], torch.device("cpu"))
    watch.note("generator", torch.tensor(1.0), 0)
    watch.check(8, "none yet", "Lower it.")
    watch.note("generator", torch.tensor(math.inf), 16)
    watch.note("student", torch.tensor(math.nan), 24)
    watch.note("generator", torch.tensor(math.nan), 32)
    with pytest.raises(NotFiniteError, match=r"of the generator is .* 0\.016 kimg \(step 2\).*: x\.pkl\. Lower it\."):
        watch.check(8, "x.pkl", "Lower it.")
    watch.reset()
    watch.check(8, "none yet", "Lower it.")


def test_draws_are_a_function_of_the_parts_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(torch.device("cpu"), 1, "networks"):
        first = torch.rand(3)
    with seeded(torch.device("cpu"), 1, "networks"):
        assert torch.equal(torch.rand(3), first)
    with seeded(torch.device("cpu"), 2, "networks"):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), expected)


def _stepped(betas=(0.9, 0.99)):
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = training.adam([parameter], 0.1, betas)
    parameter.grad = torch.arange(4.0)
    optimizer.step()
    return parameter, optimizer


def test_adam_goes_on_with_the_moments_and_its_own_settings():
    _, first = _stepped()
    _, second = _stepped(betas=(0.5, 0.7))
    training.load_adam(second, first.state_dict())
    assert second.param_groups[0]["betas"] == (0.5, 0.7)
    for name, value in first.state_dict()["state"][0].items():
        assert torch.equal(second.state_dict()["state"][0][name], value)
    training.load_adam(second, training.adam([torch.nn.Parameter(torch.ones(4))], 0.1, (0.9, 0.99)).state_dict())
    assert not second.state_dict()["state"], "a state before the first step has no moments"


@pytest.mark.parametrize(
    "change",
    [
        {"exp_avg": torch.zeros(3)},  # of which the fused update would read and write four
        {"exp_avg": torch.zeros(4, dtype=torch.int64)},
        {"exp_avg_sq": None},
        {"step": torch.zeros(2)},
        {"step": 1},
        {"more": torch.zeros(4)},
    ],
)
def test_moments_of_another_kind_are_refused(change):
    _, optimizer = _stepped()
    state = optimizer.state_dict()
    state["state"] = {0: {**state["state"][0], **change}}
    with pytest.raises(ValueError, match="moments of parameter 0 are none of Adam"):
        training.load_adam(_stepped()[1], state)


def test_moments_of_other_parameters_are_refused():
    _, optimizer = _stepped()
    state = training.adam([torch.nn.Parameter(torch.ones(4)) for _ in range(2)], 0.1, (0.9, 0.99)).state_dict()
    with pytest.raises(ValueError, match="is of other parameters"):
        training.load_adam(optimizer, state)
