"""Post-training quantization of an ONNX model, from nothing but that and some samples."""

from trtdeploy.ptq.options import PtqOptions as PtqOptions
from trtdeploy.ptq.quantize import Quantized as Quantized
from trtdeploy.ptq.quantize import quantize as quantize
