"""Measures how much video and audio contribute, clip by clip, for a few decoder passes each.

Per clip: a greedy completion under each of the 4 coalitions, whose 4 prefixes are prefilled once, and then one scene
per coalition in a packed forward (and two more for the claims when the baseline is ``remove``), in which every
log-prob and the attention mass is found. Towers never run: their outputs are given.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from omnigrpo.attribution.attention_mass import ROW_KINDS, visible_shares
from omnigrpo.attribution.clip_attribution import AttentionShares, ClaimCheck, ClipAttribution, Value
from omnigrpo.attribution.config import AttributionConfig
from omnigrpo.attribution.counterfactual import derangement, swapped, without
from omnigrpo.attribution.scoring import Scene, SceneScorer, ScoredScene
from omnigrpo.attribution.shapley import Coalition, shapley
from omnigrpo.attribution.spoken import Spoken, with_answer
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.reward.aliases import canonical_label
from omnigrpo.reward.modality_claims import find_claims
from omnigrpo.reward.tagged_answer import first_answer
from omnigrpo.rollout.interface import GroupRequest, Sampler, SamplingParams, collect
from omnigrpo.schema import Modality, Prefix, PrefixInputs

_OTHER: dict[Modality, Modality] = {"video": "audio", "audio": "video"}
_WITHOUT = {"video": Coalition.AUDIO, "audio": Coalition.VIDEO}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """One clip, and its prompts by coalition and with one modality of the donor."""

    inputs: PrefixInputs
    donor: PrefixInputs
    coalitions: dict[Coalition, PrefixInputs]
    swaps: dict[Modality, PrefixInputs]


class Attributor:
    """Measures clips with one model."""

    def __init__(
        self,
        *,
        model: HumanOmni,
        encoder: PromptEncoder,
        engine: Sampler,
        sampling: SamplingParams,
        scorer: SceneScorer,
        config: AttributionConfig,
    ) -> None:
        """``sampling`` gives the limits of the completions, drawn greedily; the engine has the model's weights."""
        self._model, self._encoder, self._engine, self._scorer = model, encoder, engine, scorer
        self._greedy = replace(sampling, temperature=0.0, top_k=0, top_p=1.0, token_budget=None)
        self._config = config

    def measure(
        self, clips: Sequence[PrefixInputs], *, on_clip: Callable[[int], None] | None = None
    ) -> list[ClipAttribution]:
        """Attribute every clip; they are each other's donors. ``on_clip`` is told how many are done.

        Raises ValueError for fewer than two clips, and for a prompt that does not ask for both modalities.
        """
        for inputs in clips:
            if inputs.prompt.modalities != ("video", "audio"):
                raise ValueError(
                    f"attribution compares video with audio, but prompt {inputs.prompt.prompt_id!r} asks for "
                    f"{' and '.join(inputs.prompt.modalities) or 'neither'}: leave it out of the data set"
                )
        donors = derangement([inputs.prompt.solution for inputs in clips], self._config.seed)
        cases = [self._case(inputs, clips[donor]) for inputs, donor in zip(clips, donors, strict=True)]
        measured: list[ClipAttribution] = []
        for first in range(0, len(cases), self._config.clips_per_call):
            measured += self._measure(cases[first : first + self._config.clips_per_call])
            if on_clip is not None:
                on_clip(len(measured))
        return measured

    def _case(self, inputs: PrefixInputs, donor: PrefixInputs) -> _Case:
        swaps: dict[Modality, PrefixInputs] = {m: swapped(inputs, donor, (m,)) for m in _OTHER}
        if self._config.baseline == "remove":
            coalitions = {c: without(self._encoder, inputs, c.absent) for c in Coalition}
        else:
            coalitions = {c: swapped(inputs, donor, c.absent) for c in Coalition}
        return _Case(inputs=inputs, donor=donor, coalitions=coalitions, swaps=swaps)

    def _measure(self, cases: Sequence[_Case]) -> list[ClipAttribution]:
        said = self._say([case.coalitions[coalition] for case in cases for coalition in Coalition])
        by_case = [
            dict(zip(Coalition, said[first : first + len(Coalition)], strict=True))
            for first in range(0, len(said), len(Coalition))
        ]
        scenes = [self._scenes(case, spoken) for case, spoken in zip(cases, by_case, strict=True)]
        scored = iter(self._scorer.score([scene for own in scenes for scene in own.values()]))
        return [
            self._result(case, spoken, own, {name: next(scored) for name in own})
            for case, spoken, own in zip(cases, by_case, scenes, strict=True)
        ]

    @torch.no_grad()
    def _say(self, inputs: Sequence[PrefixInputs]) -> list[Spoken]:
        """The greedy completion of each prompt."""
        rows = self._model.embed_prefixes(inputs).split([len(i.token_ids_P) for i in inputs])
        requests = [
            GroupRequest(prefix=Prefix(inputs=i, embeddings_PD=embeddings), seeds=(0,))
            for i, embeddings in zip(inputs, rows, strict=True)
        ]
        completions = collect(self._engine.generate(requests, self._greedy), len(requests))
        return [Spoken.of(self._encoder, only.token_ids) for (only,) in completions]

    def _scenes(self, case: _Case, spoken: dict[Coalition, Spoken]) -> dict[str, Scene]:
        """By name of its prefix: own completion, gold after its reasoning, gold after this prefix's reasoning."""
        own, label = spoken[Coalition.BOTH], case.inputs.prompt.solution
        gold = with_answer(self._encoder, own.text, label)
        scenes = {
            str(coalition): Scene(
                inputs=inputs,
                spoken=(own, gold, with_answer(self._encoder, spoken[coalition].text, label)),
                is_watched=coalition is Coalition.BOTH,
            )
            for coalition, inputs in case.coalitions.items()
        }
        if self._config.baseline == "remove":
            scenes |= {_swap(m): Scene(inputs=i, spoken=(own,)) for m, i in case.swaps.items()}
        return scenes

    def _result(
        self,
        case: _Case,
        spoken: dict[Coalition, Spoken],
        scenes: dict[str, Scene],
        scored: dict[str, ScoredScene],
    ) -> ClipAttribution:
        prompt, own = case.inputs.prompt, spoken[Coalition.BOTH]
        answers = {coalition: first_answer(words.text) for coalition, words in spoken.items()}
        values = {
            Value.ACCURACY: {
                c: float(canonical_label(answer) == canonical_label(prompt.solution))
                for c, answer in answers.items()
            }
        } | self._logprob_values(scenes, scored)
        mass_LCX = scored[Coalition.BOTH].mass_LCX
        assert mass_LCX is not None
        shares_CX = visible_shares(case.inputs.token_ids_P, len(own.token_ids))
        tokens = {"reasoning": own.reasoning_tokens, "answer": own.answer_tokens}
        return ClipAttribution(
            prompt_id=prompt.prompt_id,
            clip=str(prompt.clip.path),
            solution=prompt.solution,
            donor=case.donor.prompt.prompt_id,
            text=own.text,
            answers=answers,
            values=values,
            shapley={value: shapley(by_coalition) for value, by_coalition in values.items()},
            attention={
                name: _shares(mass_LCX[:, chosen], shares_CX[chosen])
                for name, chosen in tokens.items()
                if chosen
            },
            claims=self._claims(own, scored),
        )

    def _logprob_values(
        self, scenes: dict[str, Scene], scored: dict[str, ScoredScene]
    ) -> dict[Value, dict[Coalition, float]]:
        values: dict[Value, dict[Coalition, float]] = {}
        for coalition in Coalition:
            own, fixed, total = scenes[coalition].spoken
            own_logprobs, fixed_logprobs, total_logprobs = scored[coalition].logprobs
            found = {
                Value.GOLD: [total_logprobs[token] for token in total.answer_tokens],
                Value.GOLD_FIXED: [fixed_logprobs[token] for token in fixed.answer_tokens],
                Value.OWN_FIXED: [own_logprobs[token] for token in own.answer_tokens],
            }
            reasoning = [own_logprobs[token] for token in own.reasoning_tokens]
            for value, logprobs in found.items():
                if logprobs:
                    values.setdefault(value, {})[coalition] = sum(logprobs)
            if reasoning:
                values.setdefault(Value.REASONING, {})[coalition] = statistics.fmean(reasoning)
        return values

    def _claims(self, own: Spoken, scored: dict[str, ScoredScene]) -> tuple[ClaimCheck, ...]:
        """Log-probs of the citing sentences under the own prompt and with each modality of the donor."""
        name = _swap if self._config.baseline == "remove" else lambda modality: str(_WITHOUT[modality])
        before = scored[Coalition.BOTH].logprobs[0]
        after = {modality: scored[name(modality)].logprobs[0] for modality in _OTHER}
        checks: list[ClaimCheck] = []
        for claim in find_claims(own.text, self._config.lexicon):
            tokens = own.tokens(claim.span)
            drops = {m: statistics.fmean(before[t] - after[m][t] for t in tokens) for m in _OTHER}
            checks.append(
                ClaimCheck(
                    modality=claim.modality,
                    text=own.text[slice(*claim.span)],
                    num_tokens=len(tokens),
                    drop=drops[claim.modality],
                    drop_other=drops[_OTHER[claim.modality]],
                    is_unfounded=drops[claim.modality] < self._config.unfounded_below,
                )
            )
        return tuple(checks)


def _swap(modality: Modality) -> str:
    """Name of the scene with one modality of the donor."""
    return f"swapped {modality}"


def _shares(mass_LCX: torch.Tensor, shares_CX: torch.Tensor) -> AttentionShares:
    mass_LX, shares_X = mass_LCX.mean(1), shares_CX.mean(0)
    return AttentionShares(
        mass={kind: tuple(mass_LX[:, index].tolist()) for index, kind in enumerate(ROW_KINDS)},
        rows={kind: float(shares_X[index]) for index, kind in enumerate(ROW_KINDS)},
    )
