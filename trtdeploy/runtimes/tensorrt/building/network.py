"""From ONNX to a TensorRT network, with every complaint of the parser in one message."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from trtdeploy.errors import ModelError, RuntimeUnavailableError
from trtdeploy.runtimes.tensorrt.bindings import Bindings

if TYPE_CHECKING:
    import tensorrt

    from trtdeploy.onnxgraph.reading.source import SourceModel

_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_SHOWN_ERRORS = 5


@dataclass
class ParsedNetwork:
    """A network with what must live as long as it.

    Attributes:
        builder: Made it.
        network: What the parser read.
        parser: Holds the weights that the network refers to.
    """

    builder: tensorrt.Builder
    network: tensorrt.INetworkDefinition
    parser: tensorrt.OnnxParser


def parse(bindings: Bindings, source: SourceModel, *, strongly_typed: bool = True) -> ParsedNetwork:
    """Parse a model.

    Args:
        bindings: The library.
        source: The model.
        strongly_typed: Whether types come from the model alone. Only TensorRT <= 10 knows another way.

    Raises:
        ModelError: The parser refuses the model; the message names each node, its operator and the reason.
        RuntimeUnavailableError: The library cannot make a builder here.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    with bindings.messages.capture() as capture:
        try:
            builder = trt.Builder(bindings.messages.logger)
        except (RuntimeError, TypeError) as error:
            raise RuntimeUnavailableError(
                f"{bindings.flavour.title} {bindings.version} cannot make a builder on this machine: {error}.",
                hint="Look at the driver and the GPU: trtdeploy doctor",
                log_lines=capture.lines,
            ) from error
        # Where networks are always strongly typed the flag is accepted and changes nothing.
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strongly_typed else 0
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, bindings.messages.logger)
        with _serialized(source) as (content, path):
            parsed = parser.parse(content) if path is None else parser.parse_from_file(str(path))
        if not parsed:
            raise ModelError(
                f"{bindings.flavour.title} {bindings.version} refuses {source.path}: {_reasons(parser)}",
                hint="Change the model there, or build it for ONNX Runtime: --runtime onnxruntime",
                log_lines=() if parser.num_errors else capture.errors,
            )
    return ParsedNetwork(builder, network, parser)


@contextmanager
def _serialized(source: SourceModel) -> Iterator[tuple[bytes, Path | None]]:
    """Give the model as bytes, or, beyond protobuf's limit, as a file with its weights beside it."""
    if source.proto.ByteSize() <= _PROTOBUF_LIMIT_BYTES:
        yield source.proto.SerializeToString(), None
        return
    with tempfile.TemporaryDirectory(prefix="trtdeploy-build-") as folder:
        path = Path(folder) / "model.onnx"
        copy = onnx.ModelProto()
        copy.CopyFrom(source.proto)
        onnx.save_model(copy, str(path), save_as_external_data=True, location="weights.bin")
        yield b"", path


def _reasons(parser: tensorrt.OnnxParser) -> str:
    reasons: list[str] = []
    for index in range(parser.num_errors):
        error: tensorrt.ParserError = parser.get_error(index)
        node = error.node_name() or (f"number {error.node()}" if error.node() >= 0 else "")
        where = f"node {node} ({error.node_operator()})" if node else "the model"
        code = str(error.code()).rpartition(".")[2]
        reasons.append(f"{where}: {error.desc().strip()} [{code}]")
    shown = list(dict.fromkeys(reasons))
    more = f"; and {len(shown) - _SHOWN_ERRORS} more" if len(shown) > _SHOWN_ERRORS else ""
    return "; ".join(shown[:_SHOWN_ERRORS]) + more if shown else "the parser gives no reason."
