"""The numbered rules: what each is about, how bad it is, what to do, and who says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

_SYMMETRIC = "Quantize symmetrically: INT8, zero-point 0."
_HEADER = "IQuantizeLayer in TensorRT's NvInfer.h"
_RTX = "observed with the ONNX parser of TensorRT-RTX 1.7"
_GUIDE = "TensorRT guide, recommendations for Q/DQ placement"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: Its number, which never changes.
        name: Short name.
        severity: error: TensorRT refuses the model or computes something else; warning: slower or less accurate.
        reason: What is wrong with a model that breaks it.
        remedy: What to do.
        source: Who says so.
    """

    id: str
    name: str
    severity: Severity
    reason: str
    remedy: str
    source: str


_ALL = (
    Rule("Q001", "integer-op", "error", "An op on integers, which TensorRT does not take.",
         "Export Q/DQ (QuantizeLinear and DequantizeLinear around float ops) in place of integer ops.", _RTX),
    Rule("Q002", "opset", "error", "A scale per channel in an opset before 13, which has no axis for it.",
         "Export with opset 13 or later.", "ONNX QuantizeLinear-13; NVIDIA/TensorRT#1685"),
    Rule("Q003", "zero-point", "error", "A zero-point that is not a constant 0.", _SYMMETRIC, _HEADER),
    Rule("Q004", "code-type", "error", "Codes that are not INT8; UINT8 is silently taken as INT8.",
         _SYMMETRIC, f"{_HEADER}; {_RTX}"),
    Rule("Q005", "run-time-scale", "error", "A scale that is not a constant.",
         "Calibrate, so that every scale is a constant.", _RTX),
    Rule("Q006", "scale-value", "error", "A scale that is zero, negative or not finite.",
         "Calibrate again; give dead channels a small positive amax.", f"{_HEADER}; NVIDIA/TensorRT#2267"),
    Rule("Q007", "activation-per-channel", "error", "An activation with a scale per channel.",
         "Quantize activations per tensor.", _HEADER),
    Rule("Q008", "weight-axis", "error", "Scales of a weight along another axis than its output channels.",
         "Quantize weights per output channel, or per tensor.", _GUIDE),
    Rule("Q009", "scale-size", "error", "Scales whose number does not fit their axis.",
         "Give the scale one value, or one per channel of its axis.", _HEADER),
    Rule("Q010", "weight-in-float", "warning", "A layer whose input has Q/DQ and whose weight has none.",
         "Put Q/DQ on the weight, too: per output channel, amax / 127.", _GUIDE),
    Rule("Q011", "input-in-float", "warning", "A layer whose weight has Q/DQ and whose input has none.",
         "Calibrate the input and put Q/DQ on it, or take it off the weight.", _GUIDE),
    Rule("Q012", "layer-in-float", "warning", "A layer without Q/DQ between layers that have it.",
         "Quantize it, or leave it in float on purpose and ignore this rule.", _GUIDE),
    Rule("Q013", "both-residual-inputs", "warning", "An Add with Q/DQ on the branch of a convolution, too.",
         "Take the Q/DQ off the branch that comes from the convolution; keep it on the other.", _GUIDE),
    Rule("Q014", "before-activation", "warning", "Q/DQ between a convolution and its BN or activation.",
         "Take it out, so that they fuse; quantize the activation's result.", _GUIDE),
    Rule("Q015", "concat-scales", "warning", "A Concat with unequal scales on its inputs and before its readers.",
         "Give them one scale, the largest.", "NVIDIA-AI-IOT/yolo_deepstream, yolov7_qat guidance"),
    Rule("Q016", "double-pair", "warning", "Q/DQ of what Q/DQ has just made.", "Keep one of the two pairs.", _GUIDE),
    Rule("Q017", "output-pair", "warning", "Q/DQ whose result nothing but a graph output reads.",
         "Take it out: it costs time and accuracy and gains nothing.", _GUIDE),
    Rule("Q018", "not-quantized", "warning", "No Q/DQ at all: TensorRT runs the model in float.",
         "Quantize the model; ignore this rule if it is meant to be float.", _GUIDE),
    Rule("Q019", "residual-in-float", "warning", "A residual Add behind a quantized convolution whose other input has "
         "no Q/DQ: the fused layer's output stays in float.", "Calibrate that input and put Q/DQ on it.", _GUIDE),
    Rule("Q020", "gate-in-float", "warning", "A squeeze-and-excitation multiply with an input without Q/DQ, between "
         "quantized layers.", "Calibrate both inputs and put Q/DQ on them.", _GUIDE),
    Rule("Q021", "pooling-in-float", "warning", "Average pooling without Q/DQ on its input, between quantized layers.",
         "Calibrate its input and put Q/DQ on it.", _GUIDE),
    Rule("Q022", "concat-in-float", "warning", "A Concat with an input without Q/DQ, before a quantized layer.",
         "Put Q/DQ with one scale on every input.", "NVIDIA-AI-IOT/yolo_deepstream, yolov7_qat guidance"),
    Rule("Q023", "unfused-bn", "warning", "A BN that no convolution can take in: before a layer, or behind Q/DQ.",
         "Fold it into the layer behind it by hand, or put it behind a convolution.", "NVIDIA/TensorRT#3104"),
    Rule("Q024", "unused-pair", "warning", "Q or DQ whose result nothing reads.", "Take it out.", _GUIDE),
    Rule("Q025", "codes-read", "warning", "Codes that something else than a DequantizeLinear reads.",
         "Put the DequantizeLinear right behind the QuantizeLinear.", _GUIDE),
    Rule("Q026", "old-opset", "warning", "Q/DQ in an opset before 13, with one scale for all of a weight.",
         "Export with opset 13 or later, and a scale per output channel.", "ONNX QuantizeLinear-13"),
    Rule("Q027", "subgraph", "warning", "If, Loop or Scan: what their bodies hold is not checked.",
         "Check it by hand, or export without control flow.", "this linter"),
    Rule("Q028", "bias-overflow", "warning", "A bias that the scales of input and weight leave no room in INT32, "
         "where integer kernels add it.", "Give the weight, or its dead channel, a larger scale. TensorRT itself adds "
         "a float bias; ONNX Runtime does not.",
         "ONNX Runtime's WeightBiasQuantization; TensorFlow Lite's quantization specification"),
    Rule("Q029", "transposed-axis", "warning", "A ConvTranspose whose weight has a scale per channel: tools write them "
         "along axis 0 or 1, and which one TensorRT's kernels want is contradicted.", "Give the weight one scale, or "
         "compare the plan with the model.", "NVIDIA/TensorRT#1694, #1699, #1519, #2380"),
)  # fmt: skip

RULES = {rule.name: rule for rule in _ALL}
"""Every rule, by short name, in the order of their numbers."""


@dataclass(frozen=True)
class Finding:
    """One place in a model that breaks a rule.

    Attributes:
        rule: The rule's short name.
        node: The node, by name.
        reason: What is wrong there.
    """

    rule: str
    node: str
    reason: str

    @property
    def id(self) -> str:
        """The rule's number."""
        return RULES[self.rule].id

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return RULES[self.rule].severity

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return RULES[self.rule].remedy


def rules_table() -> str:
    """Return all rules as a Markdown table."""
    rows = ["| id | name | severity | what | remedy | source |", "|---|---|---|---|---|---|"]
    rows += [f"| {r.id} | {r.name} | {r.severity} | {r.reason} | {r.remedy} | {r.source} |" for r in _ALL]
    return "\n".join(rows) + "\n"
