"""How well the rollout engine's log-probs agree with the trainer's, and when that is too bad to go on.

Legend: ``C`` completion tokens of a step.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from omnigrpo.schema import PackedGroups
from omnigrpo_kernels.grpo_objective import kl_penalty

MOST_WORST = 20
"""Tokens that the report of a disagreement lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreementConfig:
    """What counts as a disagreement, and what ends the run; the limits are off by default.

    Off-policy tokens differ by the updates since as well: limits must leave room for that.
    """

    bound: float = 0.1
    """Nats: tokens whose |log-prob difference| exceeds it are counted."""
    max_mean: float | None = None
    """Largest mean of |log-prob difference| over a step's tokens."""
    max_kl: float | None = None
    """Largest k3 estimate of KL(rollout || trainer), mean over a step's tokens."""
    max_share_beyond: float | None = None
    """Largest share of tokens beyond ``bound``."""

    def __post_init__(self) -> None:
        """Reject bounds that nothing, or everything, could exceed."""
        if not self.bound > 0:
            raise ValueError(f"agreement.bound must be above 0, got {self.bound}")
        for name in ("max_mean", "max_kl", "max_share_beyond"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"agreement.{name} must be at least 0, or left out, got {value}")

    @property
    def has_limits(self) -> bool:
        """Whether anything ends the run."""
        return any(limit is not None for limit in (self.max_mean, self.max_kl, self.max_share_beyond))


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """The difference of trainer and rollout over the tokens of one step, in nats."""

    mean: float
    p99: float
    """99th percentile of the absolute difference."""
    max: float
    kl: float
    """k3 estimate of KL(rollout || trainer), mean over tokens."""
    share_beyond: float
    """Tokens whose absolute difference exceeds the bound."""

    def violations(self, config: AgreementConfig) -> list[str]:
        """The limits that are exceeded, as phrases; one with NaN on either side is."""
        limits = {"mean": config.max_mean, "kl": config.max_kl, "share_beyond": config.max_share_beyond}
        return [
            f"{name} {getattr(self, name):.4g} > agreement.max_{name} {limit:.4g}"
            for name, limit in limits.items()
            if limit is not None and not getattr(self, name) <= limit
        ]


def agreement(logprob_C: Tensor, rollout_C: Tensor, bound: float) -> Agreement:
    """Compare log-probs of the same tokens by the same weights, float ``[C]``; waits for the device.

    The KL is ``exp(d) - 1 - d`` of ``d = trainer - rollout`` (Schulman's k3 with the rollout as the sampling policy).
    """
    difference_C = (logprob_C - rollout_C).abs()
    if not len(difference_C):
        return Agreement(mean=0.0, p99=0.0, max=0.0, kl=0.0, share_beyond=0.0)
    rank = max(1, -(-99 * len(difference_C) // 100))  # Nearest rank: quantile() takes 16 million at most.
    kl = kl_penalty(rollout_C.to(logprob_C), logprob_C, "k3").mean()
    beyond = (~(difference_C <= bound)).to(logprob_C.dtype).mean()
    figures = [difference_C.mean(), difference_C.kthvalue(rank).values, difference_C.max(), kl, beyond]
    mean, p99, largest, kl, share = torch.stack(figures).tolist()
    return Agreement(mean=mean, p99=p99, max=largest, kl=kl, share_beyond=share)


@dataclass(frozen=True, kw_only=True, slots=True)
class DisputedToken:
    """A token about which trainer and rollout disagree."""

    prompt_id: str
    sample: int
    """Index of the completion in its group."""
    position: int
    """Index of the token in its completion."""
    token_id: int
    trainer_logprob: float
    rollout_logprob: float

    def describe(self) -> str:
        """For a message."""
        return (
            f"token {self.position} of sample {self.sample} of prompt {self.prompt_id!r}, trainer "
            f"{self.trainer_logprob:.4f}, rollout {self.rollout_logprob:.4f}"
        )


class DisagreementError(RuntimeError):
    """Rollout and trainer disagree beyond a configured limit; nothing was learnt from the step."""

    def __init__(
        self, step: int, figures: Agreement, violations: Sequence[str], worst: Sequence[DisputedToken]
    ) -> None:
        worst = sorted(worst, key=lambda token: -abs(token.trainer_logprob - token.rollout_logprob))[
            :MOST_WORST
        ]
        example = f" The worst of this rank: {worst[0].describe()}." if worst else ""
        super().__init__(
            f"step {step}: rollout and trainer disagree: {'; '.join(violations) or 'so says another rank'}.{example} "
            "Check dtype, temperature and weights of the rollout engine, or raise the limit"
        )
        self.report = {
            "step": step,
            "violations": list(violations),
            "agreement": asdict(figures),
            "worst_tokens": [asdict(token) for token in worst],
        }
        """For a JSON file."""


def worst_tokens(pack: PackedGroups, logprob_C: Tensor, *, count: int) -> list[DisputedToken]:
    """The tokens of a pack with the largest differences, largest first."""
    difference_C = (logprob_C.cpu() - pack.rollout_logprob_C).abs().nan_to_num(nan=torch.inf)
    owners = [
        (inputs.prompt.prompt_id, sample)
        for inputs, lengths in zip(pack.inputs, pack.layout.completion_lengths, strict=True)
        for sample in range(len(lengths))
    ]
    first_S = torch.searchsorted(pack.sequence_C.contiguous(), torch.arange(pack.num_sequences))
    tokens = []
    for at in difference_C.topk(min(count, len(difference_C))).indices.tolist():
        sequence = int(pack.sequence_C[at])
        prompt_id, sample = owners[sequence]
        tokens.append(
            DisputedToken(
                prompt_id=prompt_id,
                sample=sample,
                position=at - int(first_S[sequence]),
                token_id=int(pack.completion_ids_C[at]),
                trainer_logprob=float(logprob_C[at]),
                rollout_logprob=float(pack.rollout_logprob_C[at]),
            )
        )
    return tokens
