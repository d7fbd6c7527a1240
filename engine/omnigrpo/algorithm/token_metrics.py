"""Statistics over the completion tokens of a step, kept on the device until they are read."""

from collections.abc import Callable

import torch
from torch import Tensor

from omnigrpo_kernels.grpo_head import GrpoHeadResult


class TokenMetrics:
    """Adds up token statistics over packs and iterations; `summary` is the only host synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._extremes: dict[str, Tensor] = {}
        self._loss: Tensor | None = None

    def add(self, head: GrpoHeadResult, *, loss_share: float) -> None:
        """Count one head pass (a pack, or a part of one) of one iteration, whose loss is that share of the step's."""
        terms = head.terms
        values = {
            "entropy/mean": head.entropy_C,
            "ratio/mean": terms.ratio_C,
            "clip/fraction": terms.clipped_C.to(head.entropy_C.dtype),
            "kl/mean": terms.kl_C,
            "importance/mean": terms.importance_C,
        }
        for name, value_C in values.items():
            if value_C is not None:
                self._add_mean(name, value_C)
        self._add_extreme("ratio/max", terms.ratio_C.max(), torch.maximum)
        self._add_extreme("ratio/min", terms.ratio_C.min(), torch.minimum)
        self._add_mean("head/dropped_rows", torch.full_like(head.entropy_C, head.dropped_share))
        loss = loss_share * head.loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def summary(self) -> dict[str, float]:
        """Return the means and extremes by name; empty when nothing was added."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        if self._loss is not None:
            means["loss"] = float(self._loss)
        return means | {name: float(value) for name, value in self._extremes.items()}

    def _add_mean(self, name: str, value_C: Tensor) -> None:
        total = value_C.sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + len(value_C)

    def _add_extreme(self, name: str, value: Tensor, extreme: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._extremes[name] = extreme(self._extremes.get(name, value), value)
