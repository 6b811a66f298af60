"""Several processes that train one network together, as ``torchrun`` starts them.

Each takes its part of every global batch. Gradients are averaged by DistributedDataParallel; batch norm takes its
statistics over the global batch, here in a form that runs on CPUs too (torch's own SyncBatchNorm needs a GPU). So the
result is that of one process with the same global batch, up to the order of floating-point sums. Dropout and stochastic
depth are drawn by each process for itself, so with them on the result is as good as that of one process, but not equal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trtdeploy.errors import TrainingError, UsageError

DEFAULT_TIMEOUT_S = 600.0
"""How long a process waits for the others: longer than scoring the dev split may differ between them."""


@dataclass(frozen=True)
class Workers:
    """The processes of one run; this is number ``rank`` of ``count``."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def part_of(self, batch_size: int) -> slice:
        """Return which samples of a global batch are this process's.

        Raises:
            UsageError: They cannot all have as many.
        """
        if batch_size % self.count:
            raise UsageError(
                f"A batch of {batch_size} images cannot be shared equally by {self.count} processes.",
                hint="Choose a --batch-size that is a multiple of their number.",
            )
        share = batch_size // self.count
        if share < 2 and self.count > 1:
            raise UsageError(f"A batch of {batch_size} images leaves {self.count} processes fewer than 2 each.")
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, value: Tensor) -> float:
        """Return the mean of a scalar over all processes."""
        total = value.detach().double().clone()
        if self.count > 1:
            dist.all_reduce(total)
        return float(total) / self.count

    def from_main(self, value: Any) -> Any:
        """Return what the main process gave, in every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def parallel(self, model: nn.Module, ranges: list[nn.Parameter], *, example: Tensor) -> nn.Module:
        """Return what to call instead of ``model`` while it trains, so that gradients are those of all processes.

        Args:
            model: The network; its batch norms are replaced by ones that share their state.
            ranges: Parameters that its forward uses without owning them.
            example: An input, to see which parameters its forward does not use.

        Raises:
            UsageError: A batch norm computes something of its own.
        """
        if self.count == 1:
            return model
        _share_batch_norm(model)
        together = _WithRanges(model, ranges)
        # Looked for in every step where there are any: otherwise torch waits for their gradients, and gives up.
        return nn.parallel.DistributedDataParallel(
            together, broadcast_buffers=False, find_unused_parameters=_has_unused(together, example)
        )

    @contextmanager
    def watched(self, kept: Callable[[], str]) -> Iterator[None]:
        """Turn the loss of another process into an error that says what is kept.

        Args:
            kept: Says what is there to go on from.

        Raises:
            TrainingError: Another process ended or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1:
                raise
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"Worker {self.rank} of {self.count} cannot go on, most likely because another worker ended: {reason}",
                hint=f"Look for that worker's own message. {kept()}",
            ) from error


@contextmanager
def joined_workers(device: torch.device, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Workers]:
    """Join the processes that ``torchrun`` started, over gloo on CPUs and NCCL on GPUs; alone, do nothing.

    Raises:
        TrainingError: The others cannot be reached.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield Workers()
        return
    try:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"The {count} workers of this run cannot reach each other: {error}",
            hint="Start them with torchrun; on several machines give it --nnodes and --rdzv-endpoint.",
        ) from error
    workers = Workers(rank=dist.get_rank(), count=dist.get_world_size())
    try:
        yield workers
        with workers.watched(lambda: "What the main worker has written is complete."):
            dist.barrier()  # nobody takes the connections down while another still uses them
    finally:
        dist.destroy_process_group()


class _WithRanges(nn.Module):
    """A network and parameters that only its quantizers know of."""

    def __init__(self, network: nn.Module, ranges: list[nn.Parameter]) -> None:
        super().__init__()
        self.network = network
        self.ranges = nn.ParameterList(ranges)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def _has_unused(network: nn.Module, example: Tensor) -> bool:
    """Return whether a network has parameters that no gradient reaches; it is in evaluation mode afterwards."""
    network.eval()(example.clone()).sum().backward()
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    network.zero_grad(set_to_none=True)
    return unused


class _SumOverWorkers(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient, because every process uses the sum."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics in training are those of the global batch; every process has as many samples."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - the base class's name
        pass  # the layer that this stands for has run on such inputs

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, by which a caller may give it
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        values = input.float()
        count = values.numel() // values.shape[1] * dist.get_world_size()
        mean = _sum_over_workers(values.sum(axes)) / count
        centred = values - mean.reshape(shape)
        # From the centred values: the difference of two large sums would lose most of its digits.
        variance = _sum_over_workers(centred.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
        outputs = centred * (variance + self.eps).rsqrt().reshape(shape)
        if self.affine:
            outputs = outputs * self.weight.reshape(shape) + self.bias.reshape(shape)
        return outputs.to(input.dtype)


_PLAIN_FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward, _GlobalBatchNorm.forward)


def _sum_over_workers(values: Tensor) -> Tensor:
    total: Tensor = _SumOverWorkers.apply(values)  # type: ignore[no-untyped-call]
    return total


def _share_batch_norm(model: nn.Module) -> None:
    for path, child in list(model.named_modules(remove_duplicate=False)):  # one layer may have two names
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            continue
        if type(child).forward not in _PLAIN_FORWARDS:
            raise UsageError(
                f"{path} is a batch norm of the class {type(child).__name__} with a forward of its own, so several "
                "processes cannot share its statistics.",
                hint="Train in one process, or build the network from torch's own batch norm.",
            )
        twin = _GlobalBatchNorm.__new__(_GlobalBatchNorm)
        twin.__dict__ = child.__dict__  # one state under two classes: parameters, buffers, hooks and mode
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, twin)
