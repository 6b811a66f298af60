"""Which layers of a quantized network cost accuracy."""

from training.sensitivity.chart import draw_chart
from training.sensitivity.measure import Effect, LayerSensitivity, Sensitivity, measure_sensitivity
from training.sensitivity.start import quantized_start

__all__ = ["Effect", "LayerSensitivity", "Sensitivity", "draw_chart", "measure_sensitivity", "quantized_start"]
