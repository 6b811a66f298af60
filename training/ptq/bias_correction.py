"""Empirical bias correction: what quantization shifts on average, the bias takes back.

Rounding the weights moves the mean of a layer's output. Layer by layer, with all layers before on quantized weights and
corrected, the mean over images of ``float output - output`` of each output channel is added to the bias. Source: Nagel
et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", https://arxiv.org/abs/1906.04721,
section 4.2 and appendix D.

Activations stay in float meanwhile. What is clipped off rare outliers moves the mean too, but not the typical output: a
bias that takes that back as well moves every image for the sake of a few.

A layer's correction only adds a constant to its output, so nothing is computed twice: the network runs once in float
for the means, and once on quantized weights, node after node, each on all images before the next begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from training.predict import in_float32
from training.quantization import QuantizedLayer, quantizers_off
from trtdeploy.errors import QuantizationError

_MEMORY_BYTES = 2 << 30
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Correction:
    """What was done: on how many images, to how many layers, and which layers have no bias that could take a shift."""

    images: int
    corrected: int
    left_out: tuple[str, ...]


def correct_biases(
    model: nn.Module, batches: Iterable[Tensor], *, progress: Callable[[int, int], None] | None = None
) -> Correction:
    """Correct the biases of a calibrated network in place; its state dict keeps its keys.

    A layer without a bias hands its shift to the batch norm behind it, as a change of the running mean. Left out are
    layers with neither, layers that run more than once, and layers in a module that the graph does not look into.

    Args:
        model: A quantized network with ranges, in evaluation mode.
        batches: Model input, each ``(N, C, H, W)``. As many are taken as fit into 2 GiB of activations, at least one.
        progress: Called with the nodes done and their number.

    Raises:
        QuantizationError: The network could not be traced, so the order of its layers is unknown.
    """
    if not isinstance(model, fx.GraphModule):
        raise QuantizationError(
            f"{type(model).__name__} cannot be traced, so the order of its layers is not known and their biases cannot "
            "be corrected.",
            hint="Leave out --bias-correction.",
        )
    used: list[Tensor] = []
    fitting = 0
    for batch in batches:
        if not used:
            fitting = _MEMORY_BYTES // _NodeByNode(model, [batch[:1].clone()]).run()
        elif sum(map(len, used)) + len(batch) > fitting:
            break
        used.append(batch)
    with quantizers_off(model), _output_means(model) as float_means, torch.no_grad(), in_float32():
        for batch in used:
            model(batch.clone())  # a network may write into its input
    corrector = _Corrector(model, {layer: mean.value for layer, mean in float_means.items()})
    with quantizers_off(model, weights=False), in_float32():
        _NodeByNode(model, used, after=corrector.correct, progress=progress).run()
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
    return Correction(
        images=sum(map(len, used)),
        corrected=len(corrector.done),
        left_out=tuple(name for name in layers if name not in corrector.done),
    )


class _Mean:
    """The mean of each channel over batches, in float64."""

    def __init__(self) -> None:
        self._sum = torch.zeros((), dtype=torch.float64)
        self._count = 0

    def add(self, outputs: Tensor, axis: int) -> None:
        others = [index for index in range(outputs.dim()) if index != axis % outputs.dim()]
        self._sum = self._sum + outputs.sum(dim=others, dtype=torch.float64)
        self._count += outputs.numel() // outputs.shape[axis]

    @property
    def value(self) -> Tensor:
        return self._sum / self._count


def _channel_axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


@contextmanager
def _output_means(model: nn.Module) -> Iterator[dict[nn.Module, _Mean]]:
    means: dict[nn.Module, _Mean] = {}

    def add(layer: nn.Module, _: Any, outputs: Tensor) -> None:
        means.setdefault(layer, _Mean()).add(outputs, _channel_axis(layer))

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, QuantizedLayer)]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


class _NodeByNode(fx.Interpreter):
    """Runs a graph node after node, each on all batches.

    Args:
        model: The network.
        batches: Its input.
        after: Called with each node and its values, one per batch, which it may change in place.
        progress: Called with the nodes done and their number.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        batches: Sequence[Tensor],
        *,
        after: Callable[[fx.Node, list[Any]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(model)
        self._batches = batches
        self._after = after
        self._progress = progress

    @torch.no_grad()
    def run(self) -> int:  # type: ignore[override]
        """Run everything once; return the bytes of all tensors that lived at the same time, at most."""
        nodes = list(self.graph.nodes)
        values: dict[fx.Node, list[Any]] = {}
        largest = 0
        for done, node in enumerate(nodes, start=1):
            results = []
            for index, batch in enumerate(self._batches):
                self.env = {needed: values[needed][index] for needed in node.all_input_nodes}
                self.args_iter = iter((batch,) if node is nodes[0] else ())
                results.append(self.run_node(node))
            if self._after:
                self._after(node, results)
            values[node] = results
            largest = max(largest, sum(_bytes_of(value) for each in values.values() for value in each))
            for unused in (*self.user_to_last_uses.get(node, ()), *(() if node.users else (node,))):
                values.pop(unused, None)
            if self._progress:
                self._progress(done, len(nodes))
        return largest


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, (tuple, list)) else 0


class _Corrector:
    """Moves the bias of each layer by what its output lacks, and the outputs at hand with it."""

    def __init__(self, model: fx.GraphModule, float_means: dict[nn.Module, Tensor]) -> None:
        self._modules = dict(model.named_modules())
        self._float_means = float_means
        self._runs = Counter(node.target for node in model.graph.nodes if node.op == "call_module")
        self.done: set[str] = set()

    def correct(self, node: fx.Node, outputs: list[Tensor]) -> None:
        """Correct the layer of a node, if it is one; ``outputs`` are those of all batches."""
        layer = self._modules[str(node.target)] if node.op == "call_module" else None
        if not isinstance(layer, QuantizedLayer) or self._runs[node.target] != 1:
            return
        axis = _channel_axis(layer)
        mean = _Mean()
        for output in outputs:
            mean.add(output, axis)
        shift = (self._float_means[layer] - mean.value).float()
        if isinstance(layer.bias, Tensor):
            layer.bias.add_(shift)
            shape = [-1 if index == axis % outputs[0].dim() else 1 for index in range(outputs[0].dim())]
            for output in outputs:
                output += shift.view(shape)
        elif (running_mean := self._running_mean_behind(node)) is not None:
            running_mean -= shift  # the batch norm subtracts it from the output
        else:
            return
        self.done.add(str(node.target))

    def _running_mean_behind(self, node: fx.Node) -> Tensor | None:
        """Return the running mean of the batch norm that alone reads a layer's output, and reads nothing else."""
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or self._runs[users[0].target] != 1:
            return None
        norm = self._modules[str(users[0].target)]
        return norm.running_mean if isinstance(norm, _NORMS) and not norm.training else None
