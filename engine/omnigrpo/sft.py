"""Supervised training (the cold start): the GRPO path with one given completion per prompt."""

from collections.abc import Sequence

import torch

from omnigrpo.algorithm.packing import pack, split_by_budget
from omnigrpo.algorithm.policy import completion_rows
from omnigrpo.data.prompt_stream import PromptStream
from omnigrpo.metrics import Metric
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.prefix_source import PrefixSource
from omnigrpo.runtime.distributed import World
from omnigrpo.runtime.optimizer import Optimizer
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import Completion, Group, PrefixInputs, Prompt, StepReport, VersionSpan
from omnigrpo_kernels.linear_token_loss import linear_token_loss


class SupervisedTrainer:
    """Maximises the log-likelihood of given responses; the loss is the mean over all response tokens of a step."""

    def __init__(
        self,
        *,
        policy: HumanOmni,
        prompts: PromptStream,
        prompt_encoder: PromptEncoder,
        source: PrefixSource,
        optimizer: Optimizer,
        spans: SpanRecorder,
        world: World,
        budget_rows: int,
    ) -> None:
        self.policy = policy
        self.prompts = prompts
        self.prompt_encoder = prompt_encoder
        self.source = source
        self.optimizer = optimizer
        self.spans = spans
        self.world = world
        self.budget_rows = budget_rows
        self.steps_done = 0

    def step(self) -> StepReport:
        """One update on one batch of prompts and their responses."""
        batch = self.source.read(self.batch, self.steps_done)
        with self.spans.span(Phase.PACK):
            groups = [self.target(inputs) for inputs in batch.inputs]
            packs = [pack(run) for run in split_by_budget(groups, self.budget_rows)]
            num_tokens = int(self.world.sum(torch.tensor(sum(len(p.completion_ids_C) for p in packs))))
        loss_sum = entropy_sum = 0.0
        for packed in packs:
            with self.spans.span(Phase.FORWARD):
                rows = completion_rows(self.policy, packed)
            with self.spans.span(Phase.HEAD):
                head = linear_token_loss(
                    rows.hidden_RD,
                    self.policy.head_weight_VD,
                    rows.targets_C,
                    lambda _, logprob_C, entropy_C: -logprob_C.sum() / num_tokens,
                    rows_C=rows.rows_C,
                )
            with self.spans.span(Phase.BACKWARD):
                head.loss.backward()
            loss_sum += head.loss.item()
            entropy_sum += head.entropy_C.sum().item()
        with self.spans.span(Phase.OPTIMIZER):
            self.world.sum_gradients(self.optimizer.parameters)
            grad_norm = self.optimizer.step()
        self.steps_done += 1
        return StepReport(
            step=self.steps_done,
            metrics=batch.metrics
            | {
                Metric.LOSS: loss_sum,
                Metric.ENTROPY: entropy_sum / max(num_tokens, 1),
                Metric.LEARNING_RATE: self.optimizer.learning_rate,
                Metric.GRAD_NORM: grad_norm,
                Metric.SAMPLES: float(len(groups)),
                Metric.DROPPED: float(len(batch.dropped)),
            },
            dropped=batch.dropped,
        )

    def batch(self, step: int) -> Sequence[Prompt]:
        """This rank's prompts of a step."""
        return self.prompts.batch(step)[self.world.rank :: self.world.size]

    def target(self, inputs: PrefixInputs) -> Group:
        """The prompt with its response as the only completion, end token included."""
        response = inputs.prompt.response
        if response is None:
            raise ValueError(f"prompt {inputs.prompt.prompt_id!r} has no response to imitate")
        ids = tuple(self.prompt_encoder.encode_response(response))
        completion = Completion(
            token_ids=ids,
            logprobs=(0.0,) * len(ids),
            finish_reason="stop",
            version_spans=(VersionSpan(version=0, num_tokens=len(ids)),),
            cached_tokens=0,
        )
        return Group(inputs=inputs, completions=(completion,), texts=(response,))
