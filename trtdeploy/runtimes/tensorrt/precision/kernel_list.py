"""Evidence in a plan itself, without a GPU: the kernels that it lists, by name, with the types that they read.

A plan holds the programs of its fused regions as text, and TensorRT-RTX compiles a network into such regions alone:

    tensor={ ... name="x_q" ... type=int8 }
    function={ name=__myl_MulMinMaxRounCast ... output_args={ "x_q" } layers="[ONNX Layer: x/QuantizeLinear]" }
    corrltn={ name="conv" output={"y"} input={"x_q" "w" ...} ... layers="[ONNX Layer: conv]..." }

No documentation describes it, so it is evidence and no proof: what is not understood stays unknown, and nothing is
refused by it. It was read from plans of TensorRT-RTX 1.7; a weight-only layer is a ``runtime_fusion`` that reads codes
beside a float input, and has a program of its own in which the product is float.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from trtdeploy.onnxgraph.qdq.quantized_types import WEIGHT_ONLY, quantizes_input
from trtdeploy.plan import PrecisionFacts
from trtdeploy.runtimes.tensorrt.precision.element_types import QUANTIZED, product_type, type_in
from trtdeploy.runtimes.tensorrt.precision.weighted_layers import WeightedLayers

_PROGRAM = b"header {\n"
_TARGETS = re.compile(rb"\n *accelerators=\{((?:sm\d+ ?)+)\}")
_PRODUCTS = frozenset({"corrltn", "deconvolution", "fully_connected"})
_UNREADABLE = "an unknown type"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
# one statement: word={ ... }, where the braces nest once and strings may hold any of them
_STATEMENT = re.compile(rf"^ *(\w+)=\{{ ((?:{_QUOTED}|\{{(?:{_QUOTED}|[^{{}}\"])*\}}|[^{{}}\"])*)\}}", re.MULTILINE)
_LIST = r"=\{((?:" + _QUOTED + r'|[^{}"])*)\}'
_READS = re.compile(r"\b(?:input_args|input)" + _LIST)
_NAME = re.compile(rf"\bname=({_QUOTED}|[^ ]+)")
_TYPE = re.compile(r"\btype=(\w+)")
_LAYERS = re.compile(rf"\blayers=({_QUOTED})")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a plan.

    Attributes:
        operation: What it is: ``corrltn`` (a convolution), ``fully_connected``, ``function`` (a generated one) ...
        name: Its name.
        reads: Element types of what it reads, in order; None for one that is not understood.
        metadata: The ONNX nodes that it comes from, as TensorRT names them.
    """

    operation: str
    name: str
    reads: tuple[str | None, ...]
    metadata: str


def kernels_of(content: bytes) -> Iterator[Kernel]:
    """Yield the kernels that a plan lists; none if it has no such text."""
    start = content.find(_PROGRAM)
    while start >= 0:
        end = content.find(b"\0", start)
        end = len(content) if end < 0 else end
        yield from _kernels(content[start:end].decode(errors="replace"))
        start = content.find(_PROGRAM, end)


def lowest_target(content: bytes) -> str | None:
    """Return the lowest compute capability that a plan says it is compiled for, as "8.9", or None if it does not."""
    targets = [int(number) for found in _TARGETS.findall(content) for number in re.findall(rb"\d+", found)]
    return f"{min(targets) // 10}.{min(targets) % 10}" if targets else None


def facts_from_kernels(content: bytes, layers: WeightedLayers, *, why: str) -> PrecisionFacts | None:
    """Say what a plan shows of its layers, or None if it lists no kernels.

    Args:
        content: The plan.
        layers: The weighted layers of the model.
        why: A sentence that says why the engine does not tell it.
    """
    products: dict[str, set[str]] = defaultdict(set)
    stored: dict[str, str] = {}
    kernels = 0
    for kernel in kernels_of(content):
        kernels += 1
        names = layers.named_in(kernel.metadata)
        if kernel.operation in _PRODUCTS and len(kernel.reads) > 1:
            first, second = kernel.reads[:2]
            for name in names:
                products[name].add(product_type(first, second) if first and second else _UNREADABLE)
        elif kernel.operation == "runtime_fusion":
            codes = next((kind for kind in kernel.reads if kind in QUANTIZED), None)
            stored |= dict.fromkeys(names, codes) if codes else {}
    if not kernels:
        return None
    types = {name: kind for name, (kind, *others) in products.items() if not others and kind != _UNREADABLE}
    for name, codes in stored.items():
        if name in types and not quantizes_input(types[name]):
            types[name] = codes + WEIGHT_ONLY
    unknown = {
        name: f"is in products of {' and '.join(sorted(products[name]))}"
        if name in products
        else "is in no product that the plan lists"
        for name in layers.macs
        if name not in types
    }
    fallen = {name: kind for name, kind in types.items() if layers.falls_back(name, kind)}
    asking = [name for name in layers.macs if layers.asked_for(name)]
    as_asked = sum(types.get(name) == layers.asked_for(name) for name in asking)
    return PrecisionFacts.of(
        layers.running_in(types),
        evidence="kernel names",
        fallbacks={name: f"multiplies {kind} in the plan's list of kernels" for name, kind in fallen.items()},
        unknown=unknown,
        note=f"{as_asked} of {len(asking)} quantized layers have kernels of the type that was asked for, by the list "
        f"of kernels in the plan, which is evidence and no proof. {why}",
    )


def _kernels(program: str) -> Iterator[Kernel]:
    types: dict[str, str | None] = {}
    for operation, body in _STATEMENT.findall(program):
        name = _NAME.search(body)
        kind = _TYPE.search(body)
        reads = _READS.search(body)
        if name and kind and operation in ("tensor", "sub_tensor"):
            types[_plain(name[1])] = type_in(kind[1])
        elif name and reads:
            sources = tuple(types.get(_plain(source)) for source in re.findall(_QUOTED, reads[1]))
            metadata = _LAYERS.search(body)
            yield Kernel(operation, _plain(name[1]), sources, _plain(metadata[1]) if metadata else "")


def _plain(text: str) -> str:
    """Return a string without its quotes and what stands for a quote or a backslash in it."""
    return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL) if text.startswith('"') else text
