"""How far the outputs of two networks are apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trtdeploy.tensors import Array


def softmax_kl(reference: Array, other: Array) -> NDArray[np.float64]:
    """Return the Kullback-Leibler divergence of each sample's softmax from the reference's, in nats.

    ``sum_k p_k (log p_k - log q_k)`` with ``p`` the softmax of ``reference`` and ``q`` that of ``other``: what is lost
    by taking ``q`` for ``p``. Computed from log-softmax, so that no probability underflows.
    Source: Kullback and Leibler, "On information and sufficiency", Annals of Mathematical Statistics 22, 1951.

    Args:
        reference: Logits, ``(N, classes)``.
        other: Logits, the same shape.

    Returns:
        ``(N,)``, never negative.
    """
    if reference.shape != other.shape or reference.ndim != 2:
        raise ValueError(f"need logits of one shape (N, classes), got {reference.shape} and {other.shape}")
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    divergence: NDArray[np.float64] = np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    return divergence


def sqnr_db(reference: Array, other: Array) -> float:
    """Return the signal-to-quantization-noise ratio of ``other`` in dB: ``10 log10(sum x^2 / sum (x - y)^2)``.

    Returns:
        Infinity where nothing differs, minus infinity where the reference is all zeros and something does.
    """
    if reference.shape != other.shape:
        raise ValueError(f"need two arrays of one shape, got {reference.shape} and {other.shape}")
    exact = np.asarray(reference, dtype=np.float64)
    noise = float(np.square(exact - np.asarray(other, dtype=np.float64)).sum())
    signal = float(np.square(exact).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _log_softmax(logits: Array) -> NDArray[np.float64]:
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    log_probabilities: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probabilities
