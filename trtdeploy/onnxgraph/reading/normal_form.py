"""One form of a model, whatever an exporter has made of it: the one place where a model is repaired on reading.

What ONNX Runtime and TensorRT take, and what has one meaning, is no reason to refuse a model. Weights that need no
repair are neither copied nor changed, and a model that needs none stays as it is, to the byte.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx_ir.passes import common as passes

from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.graph import ONNX_DOMAINS, let_constants_stand_alone, node_name, unused
from trtdeploy.onnxgraph.reading.constant_folding import fold_constants
from trtdeploy.onnxgraph.tensor_types import without_weights
from trtdeploy.tensors import Array

logger = logging.getLogger(__name__)

_SAYS_NOTHING = re.compile(r"[\W\d_]*|none|unk|unknown|dynamic|any", re.IGNORECASE)
"""Names of sizes that mean only that a size is open: "?" of Paddle2ONNX, "-1", "None"."""
_FREE_INITIALIZERS = 4
"""The first version of the format in which an initializer that is an input may get another value."""


def to_normal_form(model: onnx.ModelProto) -> tuple[str, ...]:
    """Repair a model in place.

    - Initializers are no inputs; sparse ones, and Constants with sparse values, are dense.
    - Open sizes of inputs that share a name which says nothing, as "?", have names of their own: TensorRT takes equal
      names for equal sizes, and refuses a profile in which they differ.
    - Calls of the model's local functions are replaced by what these do, where their opset fits the model's.
    - Nodes stand behind what they read, and no two have the same name.
    - What feeds scales, zero-points and weights is a constant; see ``constant_folding``.
    - Every output has a type and a shape, as far as ONNX's inference knows it.

    Returns:
        What was done, a phrase each; nothing was changed if it is empty, but for initializers as inputs in versions
        of the format that want it so.

    Raises:
        ModelError: The nodes form a cycle, or local functions call each other in one.
    """
    repairs: list[str] = []
    initializers = {tensor.name for tensor in model.graph.initializer}
    constants = [value.name for value in model.graph.input if value.name in initializers]
    wanted_so = model.ir_version < _FREE_INITIALIZERS
    let_constants_stand_alone(model)
    if constants and not wanted_so:
        repairs.append(f"initializers that were inputs, too, are constants: {_some(constants)}")
    repairs += _densify(model.graph)
    repairs += _name_open_sizes(model.graph)
    repairs += _repair_nodes(model)
    repairs += _infer_outputs(model)
    return tuple(repairs)


def _repair_nodes(model: onnx.ModelProto) -> list[str]:
    if not _reads_only_what_is_made(model.graph):
        return []  # ONNX's checker names the fault
    try:
        return _repaired(model, ir.from_proto(model))
    except ir.serde.SerdeError:
        return []  # no text where one belongs: the checker refuses it, or a runtime does


def _repaired(model: onnx.ModelProto, nodes: ir.Model) -> list[str]:
    """Repair ``nodes``, which are the model's, and write them back once all of it has worked."""
    repairs: list[str] = []
    if model.functions:
        calls = _inline(nodes)
        if calls:
            counted = ", ".join(f"{name} ({number})" for name, number in sorted(calls.items()))
            repairs.append(f"local functions are inlined: {counted}")
    before = list(ir.traversal.RecursiveGraphIterator(nodes.graph))
    try:
        passes.TopologicalSortPass()(nodes)
    except ValueError as error:
        raise ModelError(f"The nodes of the graph cannot be put in order: {error}") from error
    if list(ir.traversal.RecursiveGraphIterator(nodes.graph)) != before:
        repairs.append("nodes that stood before what they read are in order")
    folded = fold_constants(nodes)
    if folded:
        repairs.append(f"computed ahead, as all that they depend on is constant: {_some(folded)}")
    if repairs:
        _take_over(model, nodes)
    renamed = _rename_duplicates(model.graph)
    if renamed:
        repairs.append(f"nodes that shared a name have names of their own: {_some(renamed)}")
    return repairs


def _reads_only_what_is_made(graph: onnx.GraphProto) -> bool:
    made = {value.name for value in [*graph.input, *graph.initializer]} | {""}
    made.update(name for node in graph.node for name in node.output)
    return all(name in made for node in graph.node for name in node.input)


def _inline(model: ir.Model) -> dict[str, int]:
    """Inline local functions whose opsets fit the model's, and return how often each is called in the graph."""
    given = list(model.functions)
    calls = Counter(node.op_identifier() for node in ir.traversal.RecursiveGraphIterator(model.graph))
    for function in model.functions.values():
        for node in function:
            node.name = node.name or f"{function.name}.{node.op_type}"
    try:
        passes.InlinePass(criteria=lambda function: _fits(function, model.opset_imports))(model)
    except (ir.passes.PassError, ValueError) as error:
        raise ModelError(f"The model's local functions cannot be inlined: {error.__cause__ or error}") from error
    passes.RemoveUnusedOpsetsPass()(model)
    for name in (function[1] for function in model.functions if calls[function]):
        logger.warning("Local function %s uses another opset than the model; what it holds is not looked into", name)
    inlined = [function for function in given if function not in model.functions and calls[function]]
    return {function[1]: calls[function] for function in inlined}


def _fits(function: ir.Function, opsets: dict[str, int]) -> bool:
    """Say whether a function's ops mean the same in the model's opset; if so, let it import that one."""
    for domain, version in function.opset_imports.items():
        wanted = opsets.get(domain, version)
        if version == wanted:
            continue
        used = {node.op_type for node in function.all_nodes() if node.domain == domain}
        if domain not in ONNX_DOMAINS or not all(_is_same(op, version, wanted) for op in used):
            return False
        function.opset_imports[domain] = wanted
    return True


def _is_same(op_type: str, version: int, other: int) -> bool:
    try:
        schemas = [onnx.defs.get_schema(op_type, each) for each in (version, other)]
    except onnx.defs.SchemaError:
        return False
    return schemas[0].since_version == schemas[1].since_version


def _take_over(model: onnx.ModelProto, changed: ir.Model) -> None:
    """Write nodes, new constants and opsets back; large weights stay where they are."""
    graph = model.graph
    nodes = [ir.serde.serialize_node(node) for node in changed.graph]
    kept = changed.graph.initializers
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in kept:
            del graph.initializer[place]
    present = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(
        ir.serde.serialize_tensor(value.const_value)
        for name, value in kept.items()
        if name not in present and value.const_value is not None
    )
    del graph.node[:]
    graph.node.extend(nodes)
    made = {name for node in nodes for name in node.output}
    for place in reversed(range(len(graph.value_info))):
        if graph.value_info[place].name not in made:
            del graph.value_info[place]
    functions = [ir.serde.serialize_function(function) for function in changed.functions.values()]
    del model.functions[:]
    model.functions.extend(functions)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*entry) for entry in changed.opset_imports.items())


def _rename_duplicates(graph: onnx.GraphProto) -> list[str]:
    used = {name for node in graph.node if (name := node_name(node))}
    seen: set[str] = set()
    renamed: list[str] = []
    for node in graph.node:
        name = node_name(node)
        if name and name in seen:
            renamed.append(name)
            node.name = unused(name, used)
        seen.add(name)
    return renamed


def _name_open_sizes(graph: onnx.GraphProto) -> list[str]:
    sizes = [size for value in graph.input for size in value.type.tensor_type.shape.dim if size.dim_param]
    counted = Counter(size.dim_param for size in sizes)
    shared = {name for name, count in counted.items() if count > 1 and _SAYS_NOTHING.fullmatch(name)}
    if not shared:
        return []
    used = set(counted)
    names: list[str] = []
    for value in graph.input:
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_param in shared:
                size.dim_param = unused(f"{value.name}_dim{axis}", used)
                names.append(size.dim_param)
    for value in [*graph.output, *graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in shared:
                size.ClearField("dim_param")
    called = " or ".join(repr(name) for name in sorted(shared))
    return [f"open sizes that were all called {called} are {', '.join(names)}"]


def _infer_outputs(model: onnx.ModelProto) -> list[str]:
    lacking = [value for value in model.graph.output if _lacks_shape(value)]
    if not lacking:
        return []
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model), data_prop=True)
    except onnx.shape_inference.InferenceError:
        return []  # its outputs stay without shapes, which the reader says
    known = {value.name: value for value in inferred.graph.output}
    repairs: list[str] = []
    for value in lacking:
        found = known[value.name]
        if not _lacks_shape(found):
            value.type.CopyFrom(found.type)
            shape = [size.dim_param or (size.dim_value if size.HasField("dim_value") else "?") for size in _dims(found)]
            repairs.append(f"output {value.name!r} had no shape and has [{', '.join(map(str, shape))}]")
    return repairs


def _lacks_shape(value: onnx.ValueInfoProto) -> bool:
    if value.type.WhichOneof("value") not in (None, "tensor_type"):
        return False  # a sequence or the like, which is refused elsewhere
    return not value.type.tensor_type.elem_type or not value.type.tensor_type.HasField("shape")


def _dims(value: onnx.ValueInfoProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    yield from value.type.tensor_type.shape.dim


def _densify(graph: onnx.GraphProto) -> list[str]:
    """Make dense what is stored sparsely, which TensorRT's parser does not read."""
    names: list[str] = []
    for sparse in graph.sparse_initializer:
        names.append(sparse.values.name)
        graph.initializer.append(numpy_helper.from_array(_dense(sparse), sparse.values.name))
    del graph.sparse_initializer[:]
    for node in graph.node:
        for entry in node.attribute if node.op_type == "Constant" and node.domain in ONNX_DOMAINS else ():
            if entry.name == "sparse_value":
                values = numpy_helper.from_array(_dense(entry.sparse_tensor), node.output[0])
                entry.CopyFrom(helper.make_attribute("value", values))
                names.append(node.output[0])
    return [f"sparse constants are dense: {_some(names)}"] if names else []


def _dense(sparse: onnx.SparseTensorProto) -> Array:
    """Return all values; the indices are linear, or one per dimension (https://onnx.ai/onnx/repo-docs/IR.html)."""
    values = np.asarray(numpy_helper.to_array(sparse.values))
    indices = np.asarray(numpy_helper.to_array(sparse.indices))
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    try:
        if indices.ndim == 2:
            dense[tuple(indices.T)] = values
        else:
            dense.reshape(-1)[indices] = values
    except (IndexError, ValueError) as error:
        raise ModelError(f"The sparse constant {sparse.values.name!r} does not fit its shape: {error}") from error
    return dense


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
