"""Post-training quantization of an ONNX model, from nothing but that and some samples."""

from trtdeploy.quantizing.options import PtqOptions as PtqOptions
from trtdeploy.quantizing.quantize import Quantized as Quantized
from trtdeploy.quantizing.quantize import quantize as quantize
