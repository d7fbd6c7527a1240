"""The policy's log-probs of a group's completions under changed prompts, for rewards that read the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from omnigrpo.algorithm.packing import pack, split_by_budget
from omnigrpo.algorithm.split_group import frozen_logprobs
from omnigrpo.attribution.counterfactual import find_donor, swapped, without
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.reward.context import ModalityChange, TokenValues
from omnigrpo.schema import Group, PrefixInputs


@dataclass(kw_only=True, slots=True)
class PolicyScorer:
    """Implements `reward.context.CounterfactualScorer` with the weights that train."""

    policy: HumanOmni
    prompt_encoder: PromptEncoder
    temperature: float
    """The rollout's, so that its log-probs compare."""
    budget_rows: int
    """Packed rows of one forward."""
    passes: int = 0
    """Packed forwards so far."""

    def logprobs(
        self, group: Group, neighbours: Sequence[PrefixInputs], changes: Sequence[ModalityChange]
    ) -> list[TokenValues | None]:
        """Score the G completions after each changed prefix: per change one group, and all groups in one pack.

        More than ``budget_rows`` of them take several.
        """
        inputs = [self._changed(group.inputs, neighbours, change) for change in changes]
        groups = [replace(group, inputs=changed) for changed in inputs if changed is not None]
        scored = iter(self._score(groups))
        return [None if changed is None else next(scored) for changed in inputs]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.prompt_encoder.decode(token_ids)

    def _changed(
        self, inputs: PrefixInputs, neighbours: Sequence[PrefixInputs], change: ModalityChange
    ) -> PrefixInputs | None:
        if change.modality not in inputs.prompt.modalities:
            return None
        if change.baseline == "remove":
            return without(self.prompt_encoder, inputs, (change.modality,))
        donor = find_donor(inputs, neighbours, change.modality)
        return None if donor is None else swapped(inputs, donor, (change.modality,))

    def _score(self, groups: Sequence[Group]) -> list[TokenValues]:
        values: list[TokenValues] = []
        for run in split_by_budget(groups, self.budget_rows):
            self.passes += 1
            logprob_C = frozen_logprobs(
                self.policy, pack(run), self.budget_rows, temperature=self.temperature
            )
            lengths = [len(completion.token_ids) for group in run for completion in group.completions]
            pieces = iter([tuple(piece.tolist()) for piece in logprob_C.cpu().split(lengths)])
            values += [tuple(next(pieces) for _ in group.completions) for group in run]
        return values
