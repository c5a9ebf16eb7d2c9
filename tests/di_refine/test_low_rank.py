"""Low-rank copies of networks: they share, they begin equal, and only their own parts are trained."""

import copy

import pytest
import torch
from golden_io import GOLDEN

from di_refine.files import networks
from torch_utils import low_rank

TEACHERS = {"EDM": "edm/ddpmpp_cond.pkl", "ADM": "edm/adm_cond.pkl", "EDM2": "edm2/cond.pkl"}


@pytest.fixture(params=TEACHERS)
def net(request):
    return networks.load(GOLDEN / TEACHERS[request.param]).average


def call(net):
    torch.manual_seed(0)
    size = net.img_resolution
    x, sigma = torch.randn(2, net.img_channels, size, size), torch.tensor([0.3, 2.0])
    return net(x, sigma, torch.eye(net.label_dim)[:2])


def test_it_begins_as_the_original_and_shares_its_matrices(net):
    before = call(net)
    twin = low_rank.adapted(net, 3, seed=1)
    assert torch.equal(call(twin), before) and torch.equal(call(net), before)
    matrices = {p.data_ptr() for p in net.parameters() if p.ndim >= 2}
    assert matrices <= {p.data_ptr() for p in twin.parameters()}
    own = low_rank.trained(twin)
    assert matrices.isdisjoint(p.data_ptr() for p in own) and not any(p.requires_grad for p in net.parameters())
    widths = [p.shape for p in net.parameters() if p.ndim >= 2]
    thin = sum(min(3, shape[0], shape[1:].numel()) * (shape[0] + shape[1:].numel()) for shape in widths)
    assert sum(p.numel() for p in own) == thin + sum(p.numel() for p in net.parameters() if p.ndim < 2)


def test_training_moves_the_copy_alone(net):
    frozen, twin = copy.deepcopy(net.state_dict()), low_rank.adapted(net, 2)
    own = low_rank.trained(twin)
    optimizer = torch.optim.Adam(own, lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (call(twin) - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in frozen.items())
    again = low_rank.adapted(net, 2, seed=5)
    assert not torch.equal(call(again), call(twin))
    low_rank.trained(again).load_state_dict(own.state_dict())
    assert torch.equal(call(again), call(twin))


def test_a_full_rank_reaches_every_matrix():
    layer = torch.nn.Linear(3, 4)
    target = torch.randn(4, 3)
    twin = low_rank.adapted(layer, 99)
    parts = twin.parametrizations.weight[0]
    assert parts.up.shape == (4, 3) and parts.down.shape == (3, 3)
    with torch.no_grad():
        parts.up.copy_((target - layer.weight) @ torch.linalg.inv(parts.down))
    assert torch.allclose(twin.weight, target, atol=1e-4)
