"""Putting quantizers into a network where the placement wants them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from training.quantization.graph.folding import fold_batch_norms, take_silu_apart
from training.quantization.graph.layer_count import count_layers
from training.quantization.graph.tracing import Traced, UntraceableError, trace
from training.quantization.layers import QuantizedLayer, channel_shape, is_quantizable, quantized_twin
from training.quantization.placement import Placement, Placer, Wanted
from training.quantization.quantizer import Quantizer, quantizers
from training.quantization.spec import QuantizationSpec
from training.quantization.toolkits.choice import Toolkit, make_quantizer
from trtdeploy.errors import QuantizationError

_log = logging.getLogger(__name__)
_FUNCTIONAL = {
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
    functional.linear,
}
_ROLES = {"residual": "residual", "gate": "gated", "pooling": "pooled", "concat": "concat"} | {
    "operand": "operand",
    "activation": "activation",
}


def quantize(model: nn.Module, spec: QuantizationSpec | None = None, *, example: Tensor | tuple[Any, ...]) -> nn.Module:
    """Return a network with quantizers, which shares its parameters, and their names, with ``model``.

    ``model`` is used up. Without ranges the quantizers cannot run; see ``training.ptq.calibrate``.

    Args:
        model: A float network.
        spec: What to quantize; the defaults if None.
        example: Its input, or all inputs by position, to learn the shapes of all tensors from.

    Returns:
        A ``torch.fx.GraphModule``. Of what cannot be traced, the whole network or a block of it, only the layers get
        quantizers, and a warning says so.

    Raises:
        QuantizationError: There is nothing to quantize.
        UsageError: A pattern of ``spec.skip`` matches no layer.
        RuntimeUnavailableError: The toolkit is not installed.
    """
    spec = spec or QuantizationSpec()
    arguments = example if isinstance(example, tuple) else (example,)
    names = [name for name, module in model.named_modules() if is_quantizable(module)]
    if not names:
        raise QuantizationError(
            f"{type(model).__name__} has no layer that could be quantized: no submodule computes as a convolution or a "
            f"linear layer of torch.nn does. It has {count_layers(model, *arguments, spec=spec).text()}",
            hint="Build the network from the layers of torch.nn.",
        )
    spec.require_matches(names)
    if all(map(spec.skips, names)):
        raise QuantizationError(f"--skip leaves no layer to quantize; it matches all {len(names)}.")
    if names == [""]:
        model = nn.Sequential(model)
    try:
        traced = trace(model, *arguments)
    except UntraceableError as error:
        _log.warning(
            "%s cannot be traced, so only its layers are quantized, not residual additions, gates, pooling or "
            "concatenations: %s",
            type(model).__name__,
            error,
        )
        _swap_layers(model, spec)
        return model
    graph = traced.graph
    if spec.target == "onnxruntime":
        fold_batch_norms(model, graph)
        take_silu_apart(model, graph)
    modules = dict(model.named_modules())
    _warn_of_float(model, traced)
    placement = Placer(graph, modules, spec.skips, target=spec.target).place()
    _swap_layers(model, spec)
    _insert(model, graph, placement, spec.toolkit)
    quantized = fx.GraphModule(model, graph, type(model).__name__)
    _keep_the_rest(model, quantized)
    return quantized if model.training else quantized.eval()


def _warn_of_float(model: nn.Module, traced: Traced) -> None:
    """Say in one warning what of a traced network no rule reaches."""
    blocks = {
        name: why for name, why in traced.whole.items() if any(map(is_quantizable, model.get_submodule(name).modules()))
    }
    calls = [
        _owner(node) or type(model).__name__
        for node in traced.graph.nodes
        if node.op == "call_function" and node.target in _FUNCTIONAL
    ]
    notes = []
    if blocks:
        listed = "; ".join(f"{name} ({why})" for name, why in blocks.items())
        notes.append(f"of these blocks only the layers are quantized, not additions, gates or pooling: {listed}")
    if calls:
        notes.append(
            "convolutions and linear layers that are called as functions stay in float; make them modules of torch.nn: "
            f"{len(calls)} in {', '.join(dict.fromkeys(calls))}"
        )
    if notes:
        _log.warning("%s", ". ".join(notes))


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    """Yield the quantized layers in the order of the state dict."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            yield module


def reserve_ranges(model: nn.Module) -> None:
    """Register a buffer for every range, so that a PTQ or QAT state dict loads with ``strict=True``.

    Without it, the library creates missing buffers while loading, and only on a GPU.
    """
    for _, quantizer in quantizers(model):
        if quantizer.of_activation and quantizer.enabled:
            quantizer.set_amax(torch.ones(()))
    for layer in quantized_layers(model):
        if layer.idle:
            continue
        layer.weight_quantizer.set_amax(torch.ones(channel_shape(layer)))


def _swap_layers(model: nn.Module, spec: QuantizationSpec) -> None:
    twins: dict[nn.Module, QuantizedLayer | None] = {}
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if layer not in twins:  # one layer in two places stays one layer
            twins[layer] = None if spec.skips(path) else quantized_twin(layer, path, spec)
        twin = twins[layer]
        if twin is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, twin)
    _call_every_layer(model)


def _call_every_layer(model: nn.Module) -> None:
    """Keep torch's encoder layers from their fast path, which in inference reads weights past the quantized layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def _insert(model: nn.Module, graph: fx.Graph, placement: Placement, toolkit: Toolkit) -> None:
    """Put one quantizer behind each wanted tensor, right before the first node that reads its result."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    names: dict[fx.Node, str] = {}
    made: dict[fx.Node, fx.Node] = {}
    for site in sorted(placement.sites, key=lambda site: order[site.node]):
        group = placement.representative[site.tensor]
        if group not in names:
            names[group] = _name_of(model, site, toolkit)
        if site.tensor not in made:
            with graph.inserting_before(site.node):
                made[site.tensor] = graph.create_node("call_module", names[group], (site.tensor,))
        site.node.replace_input_with(site.tensor, made[site.tensor])
        if site.reason == "input":
            layer, quantizer = model.get_submodule(str(site.node.target)), model.get_submodule(names[group])
            assert isinstance(layer, QuantizedLayer)
            assert isinstance(quantizer, Quantizer)
            if layer.quantizes_input:
                layer.share_input(quantizer)


def _name_of(model: nn.Module, site: Wanted, toolkit: Toolkit) -> str:
    """Return the name of the quantizer of a site, after the layer or the block that reads it; make it if need be."""
    if site.reason == "input":
        layer = model.get_submodule(str(site.node.target))
        assert isinstance(layer, QuantizedLayer)
        if "_input_quantizer" not in layer._modules:  # the layer is used twice, and shares with another reader
            shared = layer.input_quantizer
            return next(name for name, quantizer in quantizers(model) if quantizer is shared)
        return f"{site.node.target}._input_quantizer"
    owner = _owner(site.node)
    role = _ROLES[site.reason]
    name, count = role, 1
    parent = model.get_submodule(owner)
    while hasattr(parent, f"_{name}_quantizer"):
        count += 1
        name = f"{role}{count}"
    label = f"{owner}.{name}" if owner else name
    parent.add_module(f"_{name}_quantizer", make_quantizer(label, axis=None, toolkit=toolkit))
    return f"{owner}._{name}_quantizer" if owner else f"_{name}_quantizer"


def _owner(node: fx.Node) -> str:
    """Return the name of the module whose forward made a node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _keep_the_rest(model: nn.Module, quantized: fx.GraphModule) -> None:
    """Give the traced network the parameters that no node of its graph uses: the state dict keeps its keys."""
    known = quantized.state_dict()
    for key in model.state_dict():
        if key in known:
            continue
        path, _, name = key.rpartition(".")
        source = model.get_submodule(path)
        try:
            target = quantized.get_submodule(path)
        except AttributeError:
            quantized.add_submodule(path, source)
            continue
        if name in source._parameters:
            target.register_parameter(name, source._parameters[name])
        elif name in source._buffers:
            target.register_buffer(name, source._buffers[name])
