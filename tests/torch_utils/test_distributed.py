"""Tests of several gloo processes: collective operations against their definition, disagreement, death.

    pytest tests/torch_utils/test_distributed.py -k "killed or raises or stopped" -rP

prints how long torchrun takes to end the others.
"""

import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import ranks
import torch

from torch_utils import distributed
from torch_utils.distributed import DistributedError

# ----------------------------------------------------------------------------------------------------------------------
# What the processes run


def everything():
    """Run all collective operations of one rank and compare with what they should give."""
    rank, size = distributed.rank(), distributed.world_size()
    assert distributed.is_first() == (rank == 0)
    assert distributed.broadcast_object({"rank": rank}) == {"rank": 0}
    assert distributed.gather_object(rank) == (list(range(size)) if rank == 0 else [])
    assert distributed.any_rank(rank == size - 1) and not distributed.any_rank(False)
    assert distributed.highest(10 * rank) == 10 * size - 10
    assert distributed.share(12) == slice(12 // size * rank, 12 // size * (rank + 1))
    assert distributed.micro_batch(12, 100) == distributed.micro_batch(12) == 12 // size
    distributed.barrier()
    gradients(rank, size)
    buffers(rank, size)
    terms = {"a": torch.full([2, 3], float(rank)), "b": torch.full([1], 10.0 * rank)}
    whole = distributed.gather_batch(terms)
    assert whole["a"].tolist() == [[float(r)] * 3 for r in range(size) for _ in range(2)]
    assert whole["b"].tolist() == [10.0 * r for r in range(size)]
    with distributed.process_group("cpu") as device:  # inside another
        assert device.type == "cpu" and distributed.world_size() == size
    disagreement(rank, size)
    if rank > 0:  # the first has nothing more to do well before the others: all end well
        time.sleep(0.5)
    sys.exit(0)


def gradients(rank, size):
    """Average several buckets and types, a gradient that one rank lacks, one that all lack, and an unusual layout."""
    distributed.BUCKET_BYTES = 200
    mean = (size - 1) / 2
    shapes = [[3, 4], [70], [2, 3, 4, 4], [1], [5], []]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    params.append(torch.nn.Parameter(torch.zeros([6], dtype=torch.float64)))
    for index, p in enumerate(params):
        number = torch.arange(p.numel(), dtype=p.dtype).view(p.shape)
        p.grad = torch.empty_like(p).copy_(number + index + rank)
    params[3].grad = torch.full([1], 1.5) if rank == 0 else None
    params[4].grad = None
    loss = torch.tensor(float(rank))
    distributed.average_gradients(params, also=[loss])
    for index in (0, 1, 2, 5, 6):
        p = params[index]
        number = torch.arange(p.numel(), dtype=p.dtype).view(p.shape)
        torch.testing.assert_close(p.grad, number + index + mean, rtol=0, atol=1e-5)
    assert params[2].grad.is_contiguous(memory_format=torch.channels_last)
    assert params[3].grad.item() == pytest.approx(1.5 / size) and params[4].grad is None
    assert loss.item() == mean


def buffers(rank, size):
    module = torch.nn.BatchNorm1d(4)
    module.running_mean.fill_(rank)
    module.running_var.fill_(0.1)
    module.num_batches_tracked.fill_(7)
    distributed.average_buffers(module)
    assert module.running_mean.tolist() == [(size - 1) / 2] * 4
    assert torch.equal(module.running_var, torch.full([4], 0.1))  # the same everywhere: stays, bit for bit
    module.weight.data.fill_(rank)
    module.running_var.fill_(rank)
    module.num_batches_tracked.fill_(rank)
    distributed.broadcast_parameters(module)
    assert module.weight.sum() == module.running_var.sum() == module.num_batches_tracked == 0


def disagreement(rank, size):
    last = rank == size - 1
    net = torch.nn.Linear(2, 2)
    for p in net.parameters():
        p.data.fill_(0.5)
    state = {"net": net, "betas": (0.0, 0.99), "nothing": None}
    distributed.check_equal("state", state)
    cases = {
        "options: batch is 32 there and 64 here; start": ("options", {"batch": 32 if last else 64, "lr": 1}),
        "options: batch_gpu is missing on rank 0; start": (
            "options",
            {"batch": 64, **({"batch_gpu": 2} if last else {})},
        ),
        "options: lr is missing on rank {}; start": ("options", {"batch": 64, **({} if last else {"lr": 2})}),
        "options: betas.1 is 1 there and 0 here; start": ("options", {"betas": (0, int(last))}),
        "command: it is 'b' there and 'a' here; start": ("command", "b" if last else "a"),
    }
    for words, (what, value) in cases.items():
        expect(f"rank {size - 1} does not agree with rank 0 on the {words.format(size - 1)}", what, value)
    if last:
        net.weight.data[1, 1] += 1e-7
    expect(f"rank {size - 1} does not agree with rank 0 on the weights: net.weight differs; start", "weights", state)
    net.weight.data.fill_(rank)
    net.bias.data.fill_(rank)
    expect("rank 1 does not agree with rank 0 on the weights: weight differs (and 1 more); start", "weights", net)
    with pytest.raises(DistributedError, match=f"^batch=11 is not a multiple of the {size} processes; give 12$"):
        distributed.share(11)
    with pytest.raises(DistributedError, match=f"^batch_gpu=5 does not divide the 6 images of each of {size}"):
        distributed.micro_batch(6 * size, 5)


def expect(message, what, value):
    with pytest.raises(DistributedError) as caught:
        distributed.check_equal(what, value)
    assert str(caught.value).startswith(message), caught.value


def endless(where="collective", victim="-1"):
    """Average until a rank dies, while rank 0 may work alone, or until one rank raises."""
    distributed.barrier()
    ranks.say_pid()
    p = torch.nn.Parameter(torch.zeros([100]))
    if where == "alone" and distributed.is_first():
        time.sleep(100)
    for step in range(1_000_000):
        if step == 20 and distributed.rank() == int(victim):
            raise ArithmeticError("too much\nof it")
        p.grad = torch.ones([100])
        distributed.average_gradients([p])


def hanging():
    """Do as `endless` does, in a group whose operations wait five seconds."""
    endless()


def lonely():
    """Try every operation on rank 0 when the other rank is gone."""
    distributed.barrier()
    if not distributed.is_first():
        os._exit(7)
    net = torch.nn.BatchNorm1d(2)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    operations = [
        distributed.barrier,
        lambda: distributed.highest(1),
        lambda: distributed.broadcast_object("a" * 1_000_000),
        lambda: distributed.gather_object(0),
        lambda: distributed.check_equal("net", net),
        lambda: distributed.average_gradients(net.parameters()),
        lambda: distributed.average([torch.ones([2])]),
        lambda: distributed.average_buffers(net),
        lambda: distributed.gather_batch({"a": torch.ones([2])}),
    ]
    for number, operation in enumerate(operations):
        with pytest.raises(ConnectionError, match=r"^rank 0 of 2 has lost connection with the others \(.+ says why$"):
            operation()
        print(number)
    raise SystemExit(3)  # not 0, for which it would wait for the other


# ----------------------------------------------------------------------------------------------------------------------
# One process


def test_alone_everything_is_the_identity(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)
        assert distributed.broadcast_object("a") == "a" and distributed.gather_object("a") == ["a"]
        assert distributed.any_rank(True) and not distributed.any_rank(False) and distributed.highest(-2) == -2
        assert distributed.share(7) == slice(0, 7) and distributed.micro_batch(8, 2) == 2
        p, other = torch.nn.Parameter(torch.zeros([2])), torch.nn.Parameter(torch.zeros([2]))
        p.grad = torch.ones([2])
        distributed.average_gradients([p, other])
        assert p.grad.tolist() == [1, 1] and other.grad is None
        distributed.check_equal("anything", p)
        distributed.barrier()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "many"}, "environment variable WORLD_SIZE is 'many', not a number; start"),
        ({"WORLD_SIZE": "2"}, "environment variable RANK is not set; start the processes by torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "not all 2 ranks have come together at rank 1"),
    ],
)
def test_bad_environment(monkeypatch, variables, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=words), distributed.process_group("cpu"):
        pass


def test_a_rank_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    words = "^not all 2 ranks have come together at rank 0 "
    with pytest.raises(DistributedError, match=words), distributed.process_group("cpu", join_timeout=1):
        pass


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device_count=lambda: 2))
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    words = "local rank 2 has no GPU: this machine has 2; give torchrun --nproc_per_node no more"
    with pytest.raises(DistributedError, match=words), distributed.process_group("cuda"):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# Several


def test_three_processes():
    ranks.run(__file__, "everything", 3)


def test_two_processes_of_torchrun():
    process = ranks.torchrun(__file__, "everything", 2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_operations_without_the_others_fail_with_one_sentence():
    """The ranks run without torchrun, which would end this rank as well."""
    first, other = ranks.start(__file__, "lonely", 2)
    out, errors = first.communicate(timeout=60)
    assert first.returncode == 3 and out.split() == [*"012345678"], errors
    other.communicate()
    assert other.returncode == 7


@pytest.mark.parametrize(("size", "victim", "where"), [(2, 1, "collective"), (3, 0, "collective"), (3, 2, "alone")])
def test_torchrun_ends_the_others_of_a_killed_rank(size, victim, where):
    """Torchrun also ends ranks that compute alone."""
    process = ranks.torchrun(__file__, "endless", size, where)
    pids = ranks.read_pids(process, size)
    time.sleep(0.2)
    begin = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)  # torchrun ends last
    print(f"{size} processes, rank {victim} killed ({where}): all ended after {time.monotonic() - begin:.2f} s")
    assert process.returncode == 1 and not ranks.are_running(pids)
    assert f"exitcode  : -9 (pid: {pids[victim]})" in errors


def test_torchrun_ends_the_others_of_a_rank_that_raises():
    process = ranks.torchrun(__file__, "endless", 3, "collective", 1)
    pids = ranks.read_pids(process, 3)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=60)
    print(f"3 processes, rank 1 raises: all ended after {time.monotonic() - begin:.2f} s")
    assert process.returncode == 1 and not ranks.are_running(pids)
    assert errors.count("ArithmeticError: too much\n") == 1 and "[rank1]: ArithmeticError: too much\n" in errors


def test_a_stopped_rank_ends_the_others_after_the_timeout():
    """Torchrun takes a stopped process for a living one, but ends it, in 30 s, when another has given up."""
    process = ranks.torchrun(__file__, "hanging", 2)
    pids = ranks.read_pids(process, 2)
    begin = time.monotonic()
    os.kill(pids[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=100)
    print(f"2 processes, rank 1 stopped, timeout 5 s: all ended after {time.monotonic() - begin:.2f} s")
    assert process.returncode == 1 and not ranks.are_running(pids)
    assert "ConnectionError: rank 0 of 2 has lost connection with the others (" in errors


if __name__ == "__main__":
    ranks.main(globals(), timeout=5 if sys.argv[1] == "hanging" else 3600)
