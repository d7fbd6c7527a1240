"""Heads that do the same GRPO work: ours, plain PyTorch, and the peers as their own trainers call them.

Legend: ``T`` completion tokens, one hidden row each; ``S`` sequences of ``T / S`` tokens; ``D`` width;
``V`` vocabulary; ``C`` tokens of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnigrpo_kernels.grpo_head import grpo_head
from omnigrpo_kernels.grpo_objective import ObjectiveConfig, TokenBatch
from omnigrpo_kernels.linear_logprob import linear_logprob

NUM_SEQUENCES = 8
CHUNK_ROWS = 256
"""Rows that the chunked head holds logits for."""
CLIP, KL_COEFFICIENT = 0.2, 0.04
LOGIT_STD = 5.0
"""Of the random logits: the mean log-prob of a sampled token is about -2, as in a trained model's completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadProblem:
    """One update of the head; every sequence has the same length."""

    hidden_TD: Tensor
    """``[T, D]``, a leaf."""
    weight_VD: Tensor
    """``[V, D]``, a leaf of the same dtype."""
    targets_T: Tensor
    """int64 ``[T]``, sampled from the head itself."""
    advantage_S: Tensor
    """float32 ``[S]``."""
    advantage_T: Tensor
    """float32 ``[T]``: the same at every token."""
    token_weight_T: Tensor
    """float32 ``[T]``: GRPO's 1 / (S * length), which is 1 / T."""
    sequence_T: Tensor
    """int64 ``[T]``."""
    old_T: Tensor
    """float32 ``[T]``: log-prob under the old policy, near the current one."""
    reference_T: Tensor
    """float32 ``[T]``: log-prob under the reference policy."""

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.targets_T)

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weight_VD)

    @property
    def by_sequence(self) -> tuple[int, int]:
        """``(S, T / S)``."""
        return len(self.advantage_S), self.num_rows // len(self.advantage_S)

    def on_own_leaves(
        self, *, dtype: torch.dtype | None = None, grad_dtype: torch.dtype | None = None
    ) -> "HeadProblem":
        """The same problem on leaves of its own, in another dtype or with weight gradients in another one."""
        hidden_TD, weight_VD = (x.detach().to(dtype or x.dtype) for x in (self.hidden_TD, self.weight_VD))
        weight_VD.requires_grad_()
        if grad_dtype is not None:
            weight_VD.grad_dtype = grad_dtype
        return replace(self, hidden_TD=hidden_TD.requires_grad_(), weight_VD=weight_VD)

    def drop_gradients(self) -> None:
        """Free both gradients."""
        self.hidden_TD.grad = self.weight_VD.grad = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """One way to compute a problem's loss."""

    name: str
    loss: Callable[[HeadProblem], Tensor]
    """Scalar; its backward gives the gradients of hidden and weight."""
    logprob: Callable[[HeadProblem], Tensor]
    """float32 ``[T]``."""
    grad_dtype: torch.dtype | None = None
    """Dtype of the weight's gradient where it is not the weight's."""
    note: str = ""
    """What it does otherwise than the rest."""


def random_problem(
    num_rows: int, width: int, vocabulary: int, *, device: torch.device, dtype: torch.dtype
) -> HeadProblem:
    """Peaked rows, targets from the policy, old and reference policies a few percent away from it."""
    torch.manual_seed(0)
    hidden_TD = torch.randn(num_rows, width, device=device).to(dtype)
    weight_VD = (torch.randn(vocabulary, width, device=device) * (LOGIT_STD * width**-0.5)).to(dtype)
    chosen = [_sample(rows_CD, weight_VD) for rows_CD in hidden_TD.split(64)]
    targets_T, logprob_T = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    advantage_S = torch.randn(NUM_SEQUENCES, device=device)
    sequence_T = torch.arange(NUM_SEQUENCES, device=device).repeat_interleave(num_rows // NUM_SEQUENCES)
    return HeadProblem(
        hidden_TD=hidden_TD.requires_grad_(),
        weight_VD=weight_VD.requires_grad_(),
        targets_T=targets_T,
        advantage_S=advantage_S,
        advantage_T=advantage_S[sequence_T],
        token_weight_T=torch.full_like(logprob_T, 1 / num_rows),
        sequence_T=sequence_T,
        old_T=logprob_T + 0.05 * torch.randn_like(logprob_T),
        reference_T=logprob_T + 0.2 * torch.randn_like(logprob_T),
    )


def ours() -> Head:
    """The op that is measured; its weight gradient is float32."""
    config = ObjectiveConfig(
        loss="grpo", clip_low=CLIP, clip_high=CLIP, kl_coefficient=KL_COEFFICIENT, kl_estimator="k3"
    )

    def loss(problem: HeadProblem) -> Tensor:
        batch = TokenBatch(
            advantage_C=problem.advantage_T,
            weight_C=problem.token_weight_T,
            sequence_C=problem.sequence_T,
            old_C=problem.old_T,
            reference_C=problem.reference_T,
        )
        return grpo_head(problem.hidden_TD, problem.weight_VD, problem.targets_T, batch, config).loss

    def logprob(problem: HeadProblem) -> Tensor:
        return linear_logprob(problem.hidden_TD, problem.weight_VD, problem.targets_T).logprob_T

    return Head(name="ours", loss=loss, logprob=logprob, grad_dtype=torch.float32)


def naive() -> Head:
    """float32 log_softmax of all logits at once, and autograd."""
    return _on_logprob("naive", lambda problem: _naive_logprob(*_inputs(problem)))


def chunked() -> Head:
    """The naive one in chunks of rows, recomputed in backward, gradients of the weight summed in float32."""
    return _on_logprob("chunked", lambda problem: _ChunkedLogprob.apply(*_inputs(problem)))


def compiled() -> Head:
    """The naive one, objective included, under torch.compile; compiles when it is first run."""
    compiled_logprob = torch.compile(_naive_logprob, dynamic=False)
    compiled_loss = torch.compile(_naive_loss, dynamic=False)

    def loss(problem: HeadProblem) -> Tensor:
        constants = (problem.advantage_T, problem.old_T, problem.reference_T)
        return compiled_loss(*_inputs(problem), *constants)

    return Head(name="torch.compile", loss=loss, logprob=lambda problem: compiled_logprob(*_inputs(problem)))


def liger() -> Head:
    """LigerFusedLinearGRPOLoss with its defaults: one sequence per chunk, gradients in forward, loss compiled."""
    module = import_module("liger_kernel.chunked_loss")
    streamed = import_module("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase
    fused_loss = module.LigerFusedLinearGRPOLoss(
        beta=KL_COEFFICIENT, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo"
    )

    def loss(problem: HeadProblem) -> Tensor:
        targets, old, reference = (
            x_T.view(problem.by_sequence) for x_T in (problem.targets_T, problem.old_T, problem.reference_T)
        )
        total, _ = fused_loss(
            problem.hidden_TD.view(*targets.shape, -1),
            problem.weight_VD,
            targets,
            torch.ones_like(old),
            problem.advantage_S,
            ref_per_token_logps=reference,
            old_per_token_logps=old,
        )
        return total

    def logprob(problem: HeadProblem) -> Tensor:
        targets = problem.targets_T.view(1, -1)
        return streamed.chunk_forward(problem.hidden_TD[None], problem.weight_VD, targets).view(-1)

    note = "logits recomputed, gradient GEMMs in float32, one sequence at a time"
    return Head(name=f"Liger {version('liger-kernel')}", loss=loss, logprob=logprob, note=note)


def trl() -> Head:
    """The chunked log-prob that GRPOTrainer patches into its model, entropy included, and the trainer's loss."""
    chunk_columns = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    function = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def logprob(problem: HeadProblem) -> Tensor:
        hidden_TD, weight_VD, targets_T = _inputs(problem)
        constants = (1.0, chunk_columns, None, 1.0, ("log_probs", "entropy"))
        logprob_T, *_ = function.apply(hidden_TD, weight_VD, None, targets_T, *constants)
        return logprob_T

    note = "logits recomputed; on a CPU its row kernels are plain PyTorch and its gradient GEMMs float32"
    return _on_logprob(f"TRL {version('trl')}", logprob, note)


def cut_cross_entropy() -> Head:
    """Its per-token NLL at its defaults, which leave small gradients out; the objective on top is ours to add."""
    cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    return _on_logprob(
        f"cut-cross-entropy {version('cut-cross-entropy')}",
        lambda problem: -cross_entropy(*_inputs(problem), reduction="none").float(),
        "log-prob alone, no ratio, clip, KL, entropy or temperature: the objective is this benchmark's; "
        "logits recomputed, tiles of small gradients skipped",
    )


PEERS: dict[str, Callable[[], Head]] = {
    "liger": liger,
    "trl": trl,
    "cut-cross-entropy": cut_cross_entropy,
}
HEADS: dict[str, Callable[[], Head]] = {
    "ours": ours,
    "naive": naive,
    "chunked": chunked,
    "compile": compiled,
    **PEERS,
}
"""By the name to ask for; a peer raises ImportError where it is not installed."""


def refusals() -> tuple[type[Exception], ...]:
    """What a head raises on a device, a compiler or a version that it does not support."""
    try:
        return RuntimeError, import_module("triton.errors").TritonError
    except ImportError:
        return (RuntimeError,)


def _on_logprob(name: str, logprob: Callable[[HeadProblem], Tensor], note: str = "") -> Head:
    def loss(problem: HeadProblem) -> Tensor:
        return _grpo_loss(logprob(problem), problem.advantage_T, problem.old_T, problem.reference_T)

    return Head(name=name, loss=loss, logprob=logprob, note=note)


def _grpo_loss(logprob_T: Tensor, advantage_T: Tensor, old_T: Tensor, reference_T: Tensor) -> Tensor:
    """GRPO over sequences of one length, as TRL's trainer states it (arXiv:2402.03300, equation 3)."""
    ratio_T = torch.exp(logprob_T - old_T)
    surrogate_T = torch.min(ratio_T * advantage_T, ratio_T.clamp(1 - CLIP, 1 + CLIP) * advantage_T)
    kl_T = torch.exp(reference_T - logprob_T) - (reference_T - logprob_T) - 1
    return (KL_COEFFICIENT * kl_T - surrogate_T).mean()


def _naive_logprob(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    logits_TV = hidden_TD @ weight_VD.T
    stat_dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return logits_TV.to(stat_dtype).log_softmax(dim=-1).gather(1, targets_T[:, None]).squeeze(1)


def _naive_loss(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *constants_T: Tensor) -> Tensor:
    return _grpo_loss(_naive_logprob(hidden_TD, weight_VD, targets_T), *constants_T)


class _ChunkedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T)
        chunks = zip(hidden_TD.split(CHUNK_ROWS), targets_T.split(CHUNK_ROWS), strict=True)
        return torch.cat([_naive_logprob(hidden_CD, weight_VD, targets_C) for hidden_CD, targets_C in chunks])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_T: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        hidden_TD, weight_VD, targets_T = ctx.saved_tensors
        weight_VD = weight_VD.detach().requires_grad_()
        grads_hidden: list[Tensor] = []
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=grad_T.dtype)
        chunks = (x.split(CHUNK_ROWS) for x in (hidden_TD, targets_T, grad_T))
        for hidden_CD, targets_C, grad_C in zip(*chunks, strict=True):
            leaf_CD = hidden_CD.detach().requires_grad_()
            with torch.enable_grad():
                logprob_C = _naive_logprob(leaf_CD, weight_VD, targets_C)
            grad_hidden, grad_weight = torch.autograd.grad(logprob_C, (leaf_CD, weight_VD), grad_C)
            grads_hidden.append(grad_hidden)
            grad_weight_VD += grad_weight
        return torch.cat(grads_hidden), grad_weight_VD.to(weight_VD.dtype), None


def _inputs(problem: HeadProblem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.hidden_TD, problem.weight_VD, problem.targets_T


@torch.no_grad()
def _sample(hidden_CD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and their log-probs."""
    logprob_CV = (hidden_CD @ weight_VD.T).float().log_softmax(dim=-1)
    targets_C1 = torch.multinomial(logprob_CV.exp(), 1)
    return targets_C1.squeeze(1), logprob_CV.gather(1, targets_C1).squeeze(1)
