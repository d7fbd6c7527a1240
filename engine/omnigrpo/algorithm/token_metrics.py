"""Statistics over the completion tokens of a step, kept on the device until they are read."""

import torch
from torch import Tensor

from omnigrpo.algorithm.objective import TokenTerms


class TokenMetrics:
    """Adds up token statistics over packs and iterations; `summary` is the only host synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._maxima: dict[str, Tensor] = {}
        self._loss: Tensor | None = None

    def add_loss(self, share: Tensor) -> None:
        """Add a pack's share of the step's loss."""
        self._loss = share if self._loss is None else self._loss + share

    def add(self, terms: TokenTerms, *, entropy_C: Tensor) -> None:
        """Count one pack of one iteration; tensors are detached, ``[C]``."""
        values = {
            "entropy/mean": entropy_C,
            "ratio/mean": terms.ratio_C,
            "clip/fraction": terms.clipped_C.to(entropy_C.dtype),
        }
        if terms.kl_C is not None:
            values["kl/mean"] = terms.kl_C
        for name, value_C in values.items():
            self._add_mean(name, value_C)
        self._add_max("ratio/max", terms.ratio_C)

    def add_rollout_difference(self, logprob_C: Tensor, rollout_C: Tensor) -> None:
        """Compare the log-probs of the weights that generated, as trainer and rollout engine see them."""
        difference_C = (logprob_C - rollout_C).abs()
        self._add_mean("logprob_difference/mean", difference_C)
        self._add_max("logprob_difference/max", difference_C)

    def summary(self) -> dict[str, float]:
        """Return the means and maxima by name; empty when nothing was added."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        if self._loss is not None:
            means["loss"] = float(self._loss)
        return means | {name: float(value) for name, value in self._maxima.items()}

    def _add_mean(self, name: str, value_C: Tensor) -> None:
        total = value_C.sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + len(value_C)

    def _add_max(self, name: str, value_C: Tensor) -> None:
        largest = value_C.max()
        self._maxima[name] = torch.maximum(self._maxima.get(name, largest), largest)
