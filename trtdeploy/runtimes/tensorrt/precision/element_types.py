"""The element types in the words of TensorRT's inspector, of its kernels' names and of its plans."""

from __future__ import annotations

import re

from trtdeploy.onnxgraph.qdq.quantized_types import WEIGHT_ONLY

QUANTIZED = frozenset({"int8", "fp8", "int4", "fp4"})

_WORDS = {
    **dict.fromkeys(("int8", "i8", "s8"), "int8"),
    **dict.fromkeys(("fp8", "float8", "e4m3"), "fp8"),
    **dict.fromkeys(("int4", "i4", "s4"), "int4"),
    **dict.fromkeys(("fp4", "fp4e2m1", "e2m1"), "fp4"),
    **dict.fromkeys(("uint8", "u8"), "uint8"),
    **dict.fromkeys(("half", "fp16", "f16", "float16"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    "tf32": "tf32",
    **dict.fromkeys(("float", "fp32", "f32", "float32"), "float32"),
    **dict.fromkeys(("double", "fp64", "f64", "float64"), "float64"),
    **{name: name for name in ("int32", "int64", "bool")},
}
_OPERAND = "(bf16|tf32|f16|f32|f64|i8|u8|i4|i32|e4m3|e2m1)"
# first operand and result, second operand and accumulator, epilogue
_XMMA = re.compile(rf"(?:^|_){_OPERAND}{_OPERAND}_{_OPERAND}{_OPERAND}_{_OPERAND}(?:_|$)")
# Instructions and types in the names of older kernels, the most telling first.
_KERNEL_WORDS = (
    ("int8", re.compile(r"int8(x\d+)?|imma|i8816\w*|i16832\w*|i8i8\w*|s8")),
    ("fp8", re.compile(r"e4m3|fp8")),
    ("float16", re.compile(r"fp16|f16|hmma|hgemm|h884\w*|h1688\w*|h16816\w*")),
    ("bfloat16", re.compile(r"bf16")),
    ("float32", re.compile(r"fp32|f32|tf32|sgemm\w*|scudnn\w*|ffma")),
)


def type_in(text: str) -> str | None:
    """Return the element type that a text names by a whole word, or None.

    ``Thirty-two wide channel vectorized row major Int8 format`` (TensorRT up to 10) and ``Int8`` are INT8,
    ``Row major linear UINT8 format`` is not, and ``N/A due to dynamic shapes`` names none.
    """
    return next((_WORDS[word] for word in re.findall(r"[a-z0-9]+", text.lower()) if word in _WORDS), None)


def operands_of(kernel: str) -> tuple[str, str] | None:
    """Return the types of the two factors that a kernel multiplies, as its name says them, or None.

    ``sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw...`` multiplies INT8 by INT8 into INT32.
    """
    name = kernel.lower()
    operands = _XMMA.search(name)
    if operands:
        return _WORDS[operands[1]], _WORDS[operands[3]]
    words = name.split("_")
    for kind, pattern in _KERNEL_WORDS:
        if any(map(pattern.fullmatch, words)):
            return kind, kind
    return None


def product_type(first: str, second: str) -> str:
    """Return the type of a product of two factors; one of the two may be the weights alone."""
    quantized = [kind for kind in (first, second) if kind in QUANTIZED]
    if len(quantized) == 1:
        return quantized[0] + WEIGHT_ONLY
    if quantized:
        return first if first == second else f"{second} weights, {first} input"
    return "tf32" if "tf32" in (first, second) else first
