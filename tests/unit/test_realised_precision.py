"""Reading the engine inspector: what runs in INT8, in the words of TensorRT 10 and of TensorRT 11."""

from __future__ import annotations

from typing import Any

import pytest

from trtdeploy.errors import BuildError
from trtdeploy.plan import PrecisionFacts
from trtdeploy.runtimes.tensorrt.precision import WeightedLayers, facts_from_layers, require_int8

LAYERS = WeightedLayers(
    {"/stem/Conv": 300, "/body/Conv": 600, "/head/Gemm": 100}, frozenset({"/stem/Conv", "/body/Conv"})
)


def layer(
    name: str, kind: str, *, release: int, nodes: tuple[str, ...] = (), type_: str = "Convolution"
) -> dict[str, Any]:
    tensor = {"Name": "t", "Dimensions": [1, 32, 8, 8]}
    if release == 10:
        tensor["Format/Datatype"] = f"Thirty-two wide channel vectorized row major {kind} format"
    else:
        tensor |= {"Format": "Channel major FP32 format where channel % 4 == 0", "DataType": kind}
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "LayerType": type_, "Inputs": [tensor], "Outputs": [tensor], "Metadata": metadata}


@pytest.mark.parametrize(("release", "int8", "half"), [(10, "Int8", "FP16"), (11, "INT8", "HALF")])
def test_shares_reformats_and_fallbacks(release: int, int8: str, half: str) -> None:
    found = [
        layer("Reformatting CopyNode for input", half, release=release, type_="Reformat"),
        layer("/stem/Conv + /act/Relu", int8, release=release, nodes=("/stem/Conv", "/act/Relu")),
        layer("/body/Conv", half, release=release, nodes=("/body/Conv",)),
        layer("/head/Gemm", half, release=release, nodes=("/head/Gemm",)),
    ]
    facts = facts_from_layers(found, LAYERS)
    assert facts.evidence == "engine inspector"
    assert facts.int8_macs_percent == 30.0
    assert (facts.weighted_layers, facts.quantized_layers, facts.integer_kernels) == (3, 2, 1)
    assert facts.reformats == ("Reformatting CopyNode for input",)
    assert list(facts.fallbacks) == ["/body/Conv"]
    assert half in facts.fallbacks["/body/Conv"]
    require_int8(facts, model="m.onnx")
    assert [(layer.quantized, layer.runs_in is not None) for layer in facts.layers.values()] == [
        (True, True),
        (True, True),
        (False, True),
    ]
    assert facts.layers["/stem/Conv"].runs_in == "int8"
    assert half in str(facts.layers["/body/Conv"].runs_in)
    assert WeightedLayers.of(facts) == LAYERS


def test_a_layer_that_hides_its_parts_counts_as_a_fallback() -> None:
    facts = facts_from_layers([layer("{ForeignNode[all]}", "Float", release=10, type_="Myelin")], LAYERS)
    assert facts.int8_macs_percent == 0.0
    assert set(facts.fallbacks) == {"/stem/Conv", "/body/Conv"}


def test_no_int8_where_int8_was_asked_for_is_refused_with_the_layers() -> None:
    found = [layer("/stem/Conv", "Float", release=10, nodes=("/stem/Conv",))]
    with pytest.raises(BuildError, match="/stem/Conv runs on"):
        require_int8(facts_from_layers(found, LAYERS), model="m.onnx")


@pytest.mark.parametrize("found", [[], [{"Name": "a"}], [{"Name": "a"}, {"Name": "b"}]])
def test_without_details_nothing_is_claimed_and_nothing_refused(found: list[dict[str, Any]]) -> None:
    facts = facts_from_layers(found, LAYERS)
    assert facts.int8_macs_percent is None
    assert "verbosity" in facts.note
    require_int8(facts, model="m.onnx")


def test_facts_survive_the_manifest() -> None:
    facts = facts_from_layers([layer("/stem/Conv", "Int8", release=10, nodes=("/stem/Conv",))], LAYERS)
    assert PrecisionFacts.model_validate_json(facts.model_dump_json()) == facts
