from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from training.loop.distributed import Workers
from training.loop.epochs import metrics_path_for
from training.loop.resume import resume_path_for
from trtdeploy.errors import UsageError

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]


def torchrun(processes: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return start([*command, "-m", "training", *map(str, arguments)])


def alone(*arguments: object) -> subprocess.Popen[str]:
    return start([sys.executable, "-m", "training", *map(str, arguments)])


def start(command: list[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(PROJECT), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finished(process: subprocess.Popen[str]) -> str:
    try:
        out, err = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, err
    return out


def test_two_processes_give_what_one_gives(ptq_file, float_file, tmp_path):
    options = [
        "qat",
        ptq_file,
        "--max-steps",
        12,
        "--batch-size",
        32,
        "--learning-rate",
        "1e-3",
        "--teacher",
        float_file,
    ]
    options += ["--shift", 1, "--json", "-o"]
    one = alone(*options, tmp_path / "one.safetensors")
    two = torchrun(2, *options, tmp_path / "two.safetensors")
    facts = [json.loads(finished(process)) for process in (one, two)]  # one JSON object: only one process prints
    assert facts[0]["training"] == facts[1]["training"]
    states = [load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    before = load_file(ptq_file)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        moved = (value.double() - before[key].double()).abs().max()
        apart = (value.double() - states[1][key].double()).abs().max()
        # A value that lands on the other side of a rounding boundary moves on by a code; Adam's first steps are signs.
        assert apart <= 0.02 * moved + 1e-5, key
    losses = [
        [
            json.loads(line)["loss"]
            for line in metrics_path_for(tmp_path / f"{name}.safetensors").read_text().splitlines()
        ]
        for name in ("one", "two")
    ]
    # Sums in another order move values over rounding boundaries: 0.1% here. Batch norms that do not share their state
    # make 0.9%, gradients that are not averaged 4%.
    assert losses[0] == pytest.approx(losses[1], rel=4e-3)


def test_a_dead_worker_ends_the_job_and_leaves_what_was_saved(ptq_file, tmp_path):
    output = tmp_path / "q.safetensors"
    job = torchrun(2, "qat", ptq_file, "--epochs", 400, "--batch-size", 32, "-o", output)
    try:
        deadline = time.monotonic() + 400
        while not resume_path_for(output).exists() and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.05)
        assert resume_path_for(output).exists()
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, err = job.communicate(timeout=400)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode not in (0, None)
    assert "Signal 9 (SIGKILL)" in err or "another worker ended" in err
    assert not output.exists()
    kept = torch.load(resume_path_for(output), weights_only=True)
    assert kept["epoch"] >= 1


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    assert [Workers(rank, 2).part_of(32) for rank in range(2)] == [slice(0, 16), slice(16, 32)]
    with pytest.raises(UsageError, match="cannot be shared equally by 2 processes"):
        Workers(0, 2).part_of(33)
    with pytest.raises(UsageError, match="fewer than 2 each"):
        Workers(0, 4).part_of(4)


class TwoNames(nn.Module):
    """A batch norm that has two names and is called by keyword."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = norm
        self.second = norm

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(input=self.first(input=images))


class NormWithActivation(nn.BatchNorm2d):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(images))


@pytest.fixture
def process_group(tmp_path):
    """A group of one process, in which what several share can be compared with what one has."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_shared_batch_norm_is_called_as_the_one_that_it_stands_for(process_group):
    torch.manual_seed(0)
    alone, shared, images = (
        TwoNames(nn.BatchNorm2d(3)),
        TwoNames(nn.BatchNorm2d(3)),
        torch.randn(4, 3, 5, 5),
    )
    parallel = Workers(0, 2).parallel(shared, [], example=images)
    assert type(shared.first) is type(shared.second) is not nn.BatchNorm2d
    assert torch.allclose(parallel.train()(images), alone(images), atol=1e-5)
    assert torch.allclose(shared.first.running_var, alone.first.running_var)
    assert torch.allclose(shared.eval()(images), alone.eval()(images), atol=1e-5)


def test_a_batch_norm_that_does_more_is_not_taken_for_a_plain_one(process_group):
    with pytest.raises(UsageError, match="a batch norm of the class NormWithActivation"):
        Workers(0, 2).parallel(TwoNames(NormWithActivation(3)), [], example=torch.zeros(1, 3, 5, 5))


def test_a_parameter_that_the_forward_does_not_use_is_left_alone(process_group):
    class Auxiliary(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.unused = nn.Linear(3, 2)

    network = Auxiliary()
    parallel = Workers(0, 2).parallel(network, [], example=torch.zeros(1, 3)).train()
    for _ in range(3):
        parallel(torch.randn(4, 3)).sum().backward()
    assert network.weight.grad is not None
    assert network.unused.weight.grad is None
