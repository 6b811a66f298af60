"""Weights that are computed from others, such as those of weight norm, as the plain parameters that an export has."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from training.quantization.layers import QuantizedLayer, plain_twin_of


def with_plain_weights(model: nn.Module) -> nn.Module:
    """Return a network that computes the same, in evaluation, from plain parameters.

    Args:
        model: With or without parametrizations (``torch.nn.utils.parametrize``, or the older weight and spectral norm
            that hang on the forward). It is returned itself if it has none, and is not changed.
    """
    if not any(map(_is_computed, model.modules())):
        return model
    with torch.no_grad():
        plain = deepcopy(model)
        for module in plain.modules():
            if parametrize.is_parametrized(module):
                _fix_parametrized(module)
            for key, hook in _norms(module).items():
                _fix_hooked(module, hook)
                del module._forward_pre_hooks[key]
    return plain


def _is_computed(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or bool(_norms(module))


def _norms(module: nn.Module) -> dict[int, WeightNorm | SpectralNorm]:
    hooks = module._forward_pre_hooks.items()
    return {key: hook for key, hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}


def _fix_parametrized(module: nn.Module) -> None:
    """Do what ``parametrize.remove_parametrizations`` does, which would change the class of the original, too."""
    parametrizations: Any = module.parametrizations
    values = {name: getattr(module, name).clone() for name in parametrizations}
    del module._modules["parametrizations"]
    module.__class__ = plain_twin_of(module) if isinstance(module, QuantizedLayer) else type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _fix_hooked(module: nn.Module, norm: WeightNorm | SpectralNorm) -> None:
    value = (
        norm.compute_weight(module)
        if isinstance(norm, WeightNorm)
        else norm.compute_weight(module, do_power_iteration=False)
    )
    module.__dict__.pop(norm.name, None)
    for tensors in (module._parameters, module._buffers):
        for name in [name for name in tensors if name.startswith(f"{norm.name}_")]:
            del tensors[name]
    module.register_parameter(norm.name, nn.Parameter(value.clone()))
