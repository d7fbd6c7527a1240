"""Means over the completion tokens of a step, kept on the device until they are read."""

import torch
from torch import Tensor

from omnigrpo.algorithm.objective import TokenTerms


class TokenMetrics:
    """Adds up token statistics over packs; `summary` is the only host synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._num_tokens = 0

    def add(
        self, terms: TokenTerms, *, entropy_C: Tensor, logprob_C: Tensor, rollout_C: Tensor, loss: Tensor
    ) -> None:
        """Count one pack; all tensors are detached, ``[C]``, and ``loss`` is the pack's share of the loss."""
        difference_C = (logprob_C - rollout_C).abs()
        sums = {
            "kl/mean": terms.kl_C.sum(),
            "entropy/mean": entropy_C.sum(),
            "ratio/mean": terms.ratio_C.sum(),
            "clip/fraction": terms.clipped_C.sum(),
            "logprob_difference/mean": difference_C.sum(),
        }
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._sums["loss"] = self._sums.get("loss", torch.zeros_like(loss)) + loss
        for name, value in {
            "ratio/max": terms.ratio_C.max(),
            "logprob_difference/max": difference_C.max(),
        }.items():
            self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
        self._num_tokens += len(logprob_C)

    def summary(self) -> dict[str, float]:
        """Return the means and maxima by name; empty when nothing was added."""
        means = {
            name: float(value) / (1 if name == "loss" else self._num_tokens)
            for name, value in self._sums.items()
        }
        return means | {name: float(value) for name, value in self._maxima.items()}
