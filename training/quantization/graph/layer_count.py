"""Every layer with weights that a network runs, found by what it computes and not by how it is written.

The network runs once. An operation that multiplies data with constants, a convolution or a matrix product, is a layer,
whether a module of torch.nn computes it, a subclass, a function that is called with a parameter, or the inside of
``nn.MultiheadAttention``. So none is missed, and each that stays in float is named with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.quantization.layers import WEIGHTED, QuantizedLayer, why_not_quantizable
from training.quantization.quantizer import Quantizer, quantizers_off
from training.quantization.spec import QuantizationSpec

_PRODUCTS = {
    "convolution": "a convolution",
    "mm": "a matrix product",
    "addmm": "a matrix product",
    "bmm": "a matrix product",
    "baddbmm": "a matrix product",
    "addbmm": "a matrix product",
    "mv": "a matrix product",
    "addmv": "a matrix product",
    "_addmm_activation": "a matrix product",
    "linear": "a matrix product",
    "_trilinear": "a matrix product",
    "mkldnn_rnn_layer": "a recurrent layer",
}
_READS_A_VALUE = {"_local_scalar_dense", "is_nonzero"}
_NOT_RUN = "it does not run in evaluation"
_IDLE = "it never ran on the calibration data"
_BY_SKIP = "--skip"


class FloatLayer(BaseModel):
    """A layer with weights that is not quantized, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    reason: str


class LayerCount(BaseModel):
    """The layers with weights of a network, by the names of their modules or parameters.

    Attributes:
        quantized: Those in INT8.
        in_float: The others.
        decides_by_values: Modules whose forward reads the values of data, as control flow does; an export holds what
            one input decides.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantized: tuple[str, ...]
    in_float: tuple[FloatLayer, ...]
    decides_by_values: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Number of all layers with weights."""
        return len(self.quantized) + len(self.in_float)

    def text(self) -> str:
        """Say how many are in INT8, and name the others; those with one reason together."""
        lines = [f"{len(self.quantized)} of {self.total} layers with weights in INT8"]
        by_reason: dict[str, list[str]] = {}
        for layer in self.in_float:
            by_reason.setdefault(layer.reason, []).append(layer.name or "the network")
        lines += [f"  in float: {', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        if self.decides_by_values:
            named = ", ".join(name or "the network" for name in self.decides_by_values)
            lines.append(f"  decides by the values of its data: {named} (an export holds what one input decides)")
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Return the numbers and the names in float, as the ledger has them."""
        return {"quantized": len(self.quantized), "in_float": {layer.name: layer.reason for layer in self.in_float}}


def count_layers(model: nn.Module, *example: Any, spec: QuantizationSpec | None = None) -> LayerCount:
    """Run a network once, in evaluation with its quantizers off, and count its layers with weights.

    Args:
        model: Float or quantized.
        example: Its inputs.
        spec: How it was quantized.
    """
    spec = spec or QuantizationSpec()
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch(model, names, example)
    was_training = {module: module.training for module in names}
    try:
        with watch.running():
            model.eval()(*example)
    finally:
        for module, training in was_training.items():
            module.training = training
    quantized, in_float = list(watch.quantized), dict(watch.in_float)
    for module, name in names.items():
        if not isinstance(module, WEIGHTED) or name in quantized or name in in_float:
            continue
        if id(getattr(module, "weight", None)) in watch.multiplied:
            continue  # another layer, or a function, computes with its weight
        if isinstance(module, QuantizedLayer) and not module.idle:
            quantized.append(name)  # it runs on other data
        else:
            in_float[name] = _reason(module, name, spec, ran=False)
    return LayerCount(
        quantized=tuple(quantized),
        in_float=tuple(
            FloatLayer(name=name, reason=reason or _reason(model.get_submodule(name), name, spec, ran=True))
            for name, reason in in_float.items()
        ),
        decides_by_values=tuple(watch.decides),
    )


def _reason(module: nn.Module, name: str, spec: QuantizationSpec, *, ran: bool) -> str:
    """Return why a module that is a layer with weights stays in float."""
    if spec.skips(name):
        return _BY_SKIP
    if isinstance(module, QuantizedLayer):
        return _IDLE
    if not ran:
        return _NOT_RUN
    return why_not_quantizable(module) or "it is not quantized"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Follows which tensors are made of data and which of parameters alone, and notes what multiplies the two."""

    def __init__(self, model: nn.Module, names: Mapping[nn.Module, str], example: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._names = model, names
        self._stack: list[nn.Module] = [model]
        self._kept: list[Tensor] = []  # until the end, so that no two tensors have one identity
        self._data: set[int] = set()
        self._parameters: dict[int, frozenset[str]] = {}
        self._identity: dict[str, int] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._keep(tensor)
            self._parameters[id(tensor)] = frozenset((name,))
            self._identity[name] = id(tensor)
        for leaf in tree_leaves(example):
            if isinstance(leaf, Tensor):
                self._keep(leaf)
                self._data.add(id(leaf))
        self.multiplied: set[int] = set()
        self.quantized: dict[str, None] = {}
        self.in_float: dict[str, str] = {}
        self.decides: dict[str, None] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch what is run inside."""
        with ExitStack() as stack:
            stack.enter_context(quantizers_off(self._model))
            stack.enter_context(torch.no_grad())
            fast = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation otherwise
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            for handle in (
                register_module_forward_pre_hook(lambda module, _: self._stack.append(module)),
                register_module_forward_hook(lambda *_: self._leave(), always_call=True),
            ):
                stack.callback(handle.remove)
            stack.enter_context(self)
            yield

    def _leave(self) -> None:
        self._stack.pop()

    def _keep(self, tensor: Tensor) -> None:
        self._kept.append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        of_data = any(id(tensor) in self._data for tensor in given)
        if of_data and operation in _PRODUCTS:
            summed = operation.startswith(("add", "baddbmm", "_add"))  # the first operand is added
            for tensor in given[summed:]:
                if id(tensor) not in self._data and tensor.dim() > 1:
                    self._note(operation, self._parameters.get(id(tensor), frozenset()))
        if of_data and operation in _READS_A_VALUE and not isinstance(self._stack[-1], Quantizer):
            self.decides[self._owner()] = None
        origins = frozenset().union(*(self._parameters.get(id(tensor), frozenset()) for tensor in given))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._keep(tensor)
                if of_data:
                    self._data.add(id(tensor))
                elif id(tensor) not in self._parameters:
                    self._parameters[id(tensor)] = origins
        return result

    def _owner(self) -> str:
        known = [self._names[module] for module in self._stack if module in self._names]
        return known[-1]

    def _note(self, operation: str, parameters: frozenset[str]) -> None:
        """Note one operation of the innermost module that runs, on a weight that is made of these parameters."""
        self.multiplied.update(self._identity[name] for name in parameters)
        owner = self._owner()
        module = self._model.get_submodule(owner)
        if isinstance(module, QuantizedLayer) and not module.idle:
            self.quantized[owner] = None
        elif isinstance(module, WEIGHTED):
            self.in_float[owner] = ""
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            self.in_float[owner] = f"nn.{type(module).__name__} computes all its products as one"
        else:
            name = ", ".join(sorted(each.removesuffix(".weight") for each in parameters)) or owner or "the network"
            attends = isinstance(module, nn.MultiheadAttention)
            where = ", inside nn.MultiheadAttention" if attends else ", not of a layer"
            self.in_float[name] = f"{_PRODUCTS[operation]} called as a function{where}"
