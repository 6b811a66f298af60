"""Reading the engine inspector: what each layer runs in, in the words of TensorRT 10 and of TensorRT 11."""

from __future__ import annotations

from typing import Any

import pytest

from trtdeploy.errors import BuildError
from trtdeploy.plan import LayerPrecision, PrecisionFacts
from trtdeploy.runtimes.tensorrt.precision.element_types import operands_of, type_in
from trtdeploy.runtimes.tensorrt.precision.inspector import facts_from_layers
from trtdeploy.runtimes.tensorrt.precision.precision import require_int8
from trtdeploy.runtimes.tensorrt.precision.weighted_layers import WeightedLayers

LAYERS = WeightedLayers(
    {"/stem/Conv": 300, "/body/Conv": 600, "/head/Gemm": 100}, frozenset({"/stem/Conv", "/body/Conv"})
)
ONE = WeightedLayers({"conv": 100}, frozenset({"conv"}))
WEIGHT_ONLY = WeightedLayers({"conv": 100}, frozenset(), {"conv": "int8 weight-only"})
INT8_KERNEL = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_t1r1s1"


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


def engine_layer(*inputs: str, nodes: tuple[str, ...] = ("conv",), **fields: Any) -> dict[str, Any]:
    """A layer as the inspector of TensorRT 10 lists it."""
    return {
        "Name": "a layer",
        "LayerType": "gemm",
        "Inputs": [{"Name": "t", "Format/Datatype": kind} for kind in inputs],
        "Metadata": "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes),
        **fields,
    }


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
    assert (facts.asked_for, facts.runs_in) == ({"int8": 90.0}, {"int8": 30.0, "float16": 70.0})
    assert facts.unknown_percent == 0.0
    assert (facts.weighted_layers, facts.quantized_layers, facts.integer_kernels) == (3, 2, 1)
    assert facts.reformats == ("Reformatting CopyNode for input",)
    assert list(facts.fallbacks) == ["/body/Conv"]
    assert half in facts.fallbacks["/body/Conv"]
    require_int8(facts, model="m.onnx")
    assert {name: (found.asked_for, found.runs_in) for name, found in facts.layers.items()} == {
        "/stem/Conv": ("int8", "int8"),
        "/body/Conv": ("int8", "float16"),
        "/head/Gemm": (None, "float16"),
    }
    assert WeightedLayers.of(facts) == LAYERS


def test_a_layer_that_hides_its_parts_is_unknown_and_no_reason_to_refuse() -> None:
    names = tuple(LAYERS.macs)
    found = [layer("{ForeignNode[/stem/Conv.../head/Gemm]}", "Float", release=10, type_="Myelin", nodes=names)]
    for listed in (found, [layer("{ForeignNode[all]}", "Float", release=10, type_="Myelin")]):
        facts = facts_from_layers(listed, LAYERS)
        assert (facts.runs_in, facts.unknown_percent) == ({}, 100.0)
        assert set(facts.unknown) == set(names)
        assert facts.fallbacks == {}
        require_int8(facts, model="m.onnx")


def test_no_int8_where_int8_was_asked_for_is_refused_with_the_layers() -> None:
    found = [layer(name, "Float", release=10, nodes=(name,)) for name in LAYERS.macs]
    with pytest.raises(BuildError, match=r"asks for INT8 .*/stem/Conv runs on"):
        require_int8(facts_from_layers(found, LAYERS), model="m.onnx")
    # the second of the two layers is nowhere to be seen: it may run in INT8
    require_int8(facts_from_layers(found[:1], LAYERS), model="m.onnx")


def test_one_type_does_not_stand_for_another() -> None:
    layers = WeightedLayers.asking({"conv": 1, "gemm": 1}, {"conv": "int8", "gemm": "fp8"})
    gemm = engine_layer("FP8", "FP8", nodes=("gemm",))
    facts = facts_from_layers([engine_layer("Half", "Half"), gemm], layers)
    assert facts.runs_in == {"float16": 50.0, "fp8": 50.0}
    with pytest.raises(BuildError, match="asks for INT8"):
        require_int8(facts, model="m.onnx")
    swapped = [engine_layer("Int8", "Int8"), engine_layer("Half", "Half", nodes=("gemm",))]
    with pytest.raises(BuildError, match="asks for FP8"):
        require_int8(facts_from_layers(swapped, layers), model="m.onnx")
    require_int8(facts_from_layers([engine_layer("Int8", "Int8"), gemm], layers), model="m.onnx")


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (engine_layer("Float", "Int8", "Int8"), "int8"),
        (engine_layer("N/A due to dynamic shapes", TacticName=INT8_KERNEL), "int8"),
        (engine_layer("N/A due to dynamic shapes", Weights={"Type": "Int8", "Count": 9}), "int8"),
        (engine_layer("Int8", Constants=[{"Name": "w", "Datatype": "Int8"}]), "int8"),
        (engine_layer("Half", TacticName="sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_by_fusion_tactic"), "int8"),
        (engine_layer("FP8", TacticName="sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x64x64"), "fp8"),
        (engine_layer("Row major linear UINT8 format", LayerType="CaskConvolution"), "float"),
        (engine_layer("Int8", TacticName="sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc"), "float16"),
        (engine_layer("N/A", Weights={"Type": "Half", "Count": 9}), "float16"),
        (engine_layer("Half", "Half"), "float16"),
        (engine_layer("Float", LayerType="CaskConvolution"), "float32"),
        # it may quantize what it reads, compute in float, or hold its weights as constants that it does not list
        (engine_layer("Half", "Int8"), None),
        (engine_layer("Half", Weights={"Type": "Int8", "Count": 9}), None),
        (engine_layer("Half"), None),
        (engine_layer("N/A due to dynamic shapes"), None),
        (engine_layer(), None),
        (engine_layer("Half", "Half", LayerType="fusion"), None),
        # a generated kernel beside the product names the layer too and tells nothing of it
        (engine_layer("Float", "Float", LayerType="kgen", Name="__myl_MulAddRelu_myl0_3"), None),
        (engine_layer("Int8", LayerType="Reformat"), None),
        (engine_layer("Float", LayerType="Shuffle"), None),
        (engine_layer("Float", "Float", LayerType="PointWiseV2"), None),
    ],
)
def test_every_evidence_of_a_layer_counts(found: dict[str, Any], kind: str | None) -> None:
    facts = facts_from_layers([found], ONE)
    assert facts.layers["conv"].runs_in == kind
    assert ("conv" in facts.unknown) == (kind is None)
    assert facts.integer_kernels == (kind == "int8")
    if kind is not None and "float" in kind:
        with pytest.raises(BuildError, match="would have none"):
            require_int8(facts, model="m.onnx")
    else:
        require_int8(facts, model="m.onnx")


def test_a_scaling_kernel_after_an_int8_product_does_not_hide_it() -> None:
    scaling = engine_layer("Float", "Float", LayerType="kgen", Name="__myl_Mul_myl0_4")
    for found in ([engine_layer("Int8", "Int8"), scaling], [scaling, engine_layer("Int8", "Int8")]):
        assert facts_from_layers(found, ONE).runs_in == {"int8": 100.0}


def test_weights_alone_are_weight_only() -> None:
    for found in (
        engine_layer("Half", "Int8"),
        engine_layer("Half", TacticName="sm80_xmma_gemm_f16f16_i8f32_f32_tn_n"),
    ):
        facts = facts_from_layers([found], WEIGHT_ONLY)
        assert facts.asked_for == facts.runs_in == {"int8 weight-only": 100.0}
        assert facts.int8_macs_percent == 0.0
    float_weights = facts_from_layers([engine_layer("Half", "Half")], WEIGHT_ONLY)
    assert list(float_weights.fallbacks) == ["conv"]
    require_int8(float_weights, model="m.onnx")  # its arithmetic was float in either case


@pytest.mark.parametrize("name", ["a]b", "a | b", "x[ONNX Layer: y]", "blocks[0]/attn[1]", "é}", "a\nb", 'q"u'])
@pytest.mark.parametrize("separator", ["\x1e", "\x1f", " + ", ""])
def test_any_node_name_is_found(name: str, separator: str) -> None:
    layers = WeightedLayers({name: 1, "last": 1, "not here": 1, "a": 1}, frozenset())
    metadata = separator.join(f"[ONNX Layer: {node}]" for node in ("first", name, "last"))
    assert layers.named_in(metadata) == {name, "last"}


def test_a_node_of_a_local_function_is_found_by_its_own_name() -> None:
    # onnx-tensorrt, importerUtils.cpp, processMetadata
    assert ONE.named_in("[ONNX Layer: conv | call_1 (Block) | outer (Stage)]") == {"conv"}


@pytest.mark.parametrize("found", [[], [{"Name": "a"}], [{"Name": "a"}, {"Name": "b"}]])
def test_without_details_nothing_is_claimed_and_nothing_refused(found: list[dict[str, Any]]) -> None:
    facts = facts_from_layers(found, LAYERS)
    assert facts.int8_macs_percent is None
    assert (facts.runs_in, facts.unknown_percent) == ({}, 100.0)
    assert "verbosity" in facts.note
    require_int8(facts, model="m.onnx")


def test_facts_survive_the_manifest() -> None:
    facts = facts_from_layers([layer("/stem/Conv", "Int8", release=10, nodes=("/stem/Conv",))], LAYERS)
    assert PrecisionFacts.model_validate_json(facts.model_dump_json()) == facts


def test_a_manifest_of_one_share_is_read_as_what_it_meant() -> None:
    old: dict[str, Any] = {
        "weighted_layers": 2,
        "quantized_layers": 1,
        "integer_kernels": None,
        "int8_macs_percent": 40.0,
        "evidence": "parsed network",
        "layers": {"a": {"macs": 4, "quantized": True}, "b": {"macs": 6, "quantized": False, "runs_in": "Half"}},
        "note": "n",
    }
    asked = PrecisionFacts.model_validate(old)
    assert (asked.asked_for, asked.runs_in, asked.unknown_percent) == ({"int8": 40.0}, {}, 100.0)
    assert asked.layers["a"] == LayerPrecision(macs=4, quantized=True, asked_for="int8")
    assert asked.layers["b"].asked_for is None
    shown = PrecisionFacts.model_validate({**old, "evidence": "engine inspector"})
    assert (shown.runs_in, shown.unknown_percent, shown.int8_macs_percent) == ({"int8": 40.0}, 60.0, 40.0)
    counted = PrecisionFacts.model_validate({**old, "int8_macs_percent": None, "layers": {}})
    assert (counted.asked_for, counted.unknown_percent, counted.shares) == ({}, None, "")


@pytest.mark.parametrize(
    ("kernel", "operands"),
    [
        (INT8_KERNEL, ("int8", "int8")),
        ("volta_int8x4_icudnn_int8x4_128x32_relu_small_nn_v1", ("int8", "int8")),
        ("ampere_first_layer_filter3x3_imma_fwd_swish", ("int8", "int8")),
        ("cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16", ("int8", "int8")),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n", ("float32", "tf32")),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn", ("bfloat16", "bfloat16")),
        ("turing_h1688cudnn_256x64_sliced1x2_ldg8", ("float16", "float16")),
        ("ampere_scudnn_128x64_relu_xregs_large_nn_v1", ("float32", "float32")),
        ("__myl_FcAdd_0x1234", None),
        ("generatedNativePointwise", None),
        ("", None),
    ],
)
def test_kernels_spell_what_they_multiply(kernel: str, operands: tuple[str, str] | None) -> None:
    assert operands_of(kernel) == operands


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Channel major INT8 format where channel == 4 and column stride % 32 == 0", "int8"),
        ("Row major linear UInt8 format", "uint8"),
        ("Row major linear FP8 format", "fp8"),
        ("BFloat16", "bfloat16"),
        ("Int4", "int4"),
        ("N/A due to dynamic shapes", None),
        ("Unknown format", None),
    ],
)
def test_types_are_whole_words(text: str, kind: str | None) -> None:
    assert type_in(text) == kind
