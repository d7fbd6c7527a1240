"""AdamW, its learning-rate schedule, and gradient clipping that refuses to go on from a broken gradient."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omnigrpo.runtime.state_tree import State

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and the schedule of its learning rate; the defaults are R1-Omni's GRPO."""

    learning_rate: float = 1e-6
    """Peak of the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; on matrices only, never on norms and biases."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 only measures it."""
    warmup_steps: int = 0
    """Updates that climb to ``learning_rate``; the first one already moves."""
    warmup_ratio: float = 0.0
    """The same as a share of the run's updates, rounded up; in place of ``warmup_steps``."""
    schedule: Schedule = "linear"
    """Course from the end of the warm-up to the end of the run."""
    min_lr_ratio: float = 0.0
    """Share of ``learning_rate`` where the schedule ends."""

    def __post_init__(self) -> None:
        """Reject values that AdamW or the schedule cannot honour."""
        for name in ("learning_rate", "eps", "weight_decay", "max_grad_norm", "warmup_steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        for name in ("min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and warmup_ratio {self.warmup_ratio}: give one of them"
            )
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule must be constant, linear or cosine, got {self.schedule!r}")


class Optimizer:
    """AdamW with its schedule, clipping and count of updates.

    Parameters of half precision are updated through float32 copies: at a learning rate of 1e-6 most updates
    are smaller than half a bfloat16 step of the weight, and would be rounded away every time. Their gradients
    add up in float32 for the same reason (``grad_dtype``), over the packs of a step and over tied uses.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        *,
        total_steps: int,
    ) -> None:
        """Optimise the parameters that require gradients, over a run of ``total_steps`` updates."""
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        self._trained = {name: item for name, item in named_parameters if item.requires_grad}
        for parameter in self._trained.values():
            parameter.grad_dtype = _wide(parameter.dtype)
        self._masters = {name: _master(parameter) for name, parameter in self._trained.items()}
        self._adamw = build_optimizer(self._masters.items(), config)
        self._config = config
        self._total_steps = total_steps
        self.steps_done = 0
        """Updates so far."""
        self.learning_rate = learning_rate(config, 0, total_steps)
        """Of the last update, or of the first one before it."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is optimised, in a fixed order."""
        return tuple(self._trained.values())

    def step(self) -> float:
        """Clip, update, and drop the gradients; return their norm from before clipping.

        Without any gradient (every prompt of the step was dropped) the weights stay and the norm is 0. Raises
        ``FloatingPointError`` before anything changes when the norm is not finite.
        """
        norm = clip_gradients(self._trained.items(), self._config.max_grad_norm)
        self.learning_rate = learning_rate(self._config, self.steps_done, self._total_steps)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        copied = [(self._masters[n], p) for n, p in self._trained.items() if self._masters[n] is not p]
        for master, parameter in copied:
            master.grad = parameter.grad
        self.steps_done += 1  # Before any weight moves: an interrupt from here on shows in the count.
        self._adamw.step()
        with torch.no_grad():
            for master, parameter in copied:
                parameter.copy_(master)
        for parameter in (*self._trained.values(), *self._masters.values()):
            parameter.grad = None
        return norm

    def state_dict(self) -> State:
        """Everything that the next update depends on besides the weights."""
        masters = {n: m.detach() for n, m in self._masters.items() if m is not self._trained[n]}
        return {"steps_done": self.steps_done, "adamw": self._adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from a ``state_dict``; raises ``ValueError`` when it is of other parameters."""
        copies = {name for name, master in self._masters.items() if master is not self._trained[name]}
        if set(state["masters"]) != copies:
            raise ValueError(
                f"the saved optimizer has float32 copies of {len(state['masters'])} parameters, this one of "
                f"{len(copies)}; resume with the same model, dtype and trained parts"
            )
        self._adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for name in copies:
                self._masters[name].copy_(state["masters"][name])
        self.steps_done = state["steps_done"]
        self.learning_rate = learning_rate(self._config, max(0, self.steps_done - 1), self._total_steps)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update with this index, counted from 0, in a run of ``total_steps``.

    Warm-up is ``peak * (step + 1) / warmup`` over ``warmup_steps``, or ``ceil(warmup_ratio * total_steps)``; then the
    schedule runs from the peak at the first update after it to ``min_lr_ratio * peak`` at ``total_steps`` and stays
    there.
    """
    peak = config.learning_rate
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; only those of two dimensions and more decay."""
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("build_optimizer got no parameter that requires a gradient; unfreeze some first")
    groups = [
        {"params": [item for item in trained if item[1].ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [item for item in trained if item[1].ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def clip_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]], max_norm: float) -> float:
    """Scale all gradients in place to a global 2-norm of at most ``max_norm``; return the norm from before.

    ``max_norm`` 0 only measures; without gradients the norm is 0. Raises ``FloatingPointError``, and leaves
    the gradients alone, when the norm is not finite. Waits for the device once.
    """
    gradients = {name: item.grad for name, item in named_parameters if item.grad is not None}
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(item, dtype=_wide(item.dtype)) for item in gradients.values()]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if not math.isfinite(norm):
        raise FloatingPointError(_describe_broken(norm, gradients))
    if 0 < max_norm < norm:
        for gradient in gradients.values():
            gradient.mul_(max_norm / norm)
    return norm


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself, or its float32 copy."""
    wide = _wide(parameter.dtype)
    return parameter if parameter.dtype == wide else nn.Parameter(parameter.detach().to(wide))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _describe_broken(norm: float, gradients: Mapping[str, Tensor]) -> str:
    broken = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    where = "every entry is finite, but the sum of their squares overflows"
    if broken:
        where = f"{len(broken)} of {len(gradients)} parameters have such entries, first {broken[:3]}"
    return (
        f"the gradient norm is {norm}, not finite: {where}; nothing was updated. Look at the loss of this "
        "step and its inputs, or lower the learning rate"
    )
