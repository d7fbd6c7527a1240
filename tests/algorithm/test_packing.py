from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omnigrpo.algorithm.packing import pack, split_by_budget
from omnigrpo.schema import Clip, ClipFeatures, Completion, Group, PrefixInputs, Prompt, VersionSpan
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


def make_group(prefix_length: int, completion_lengths: list[int], first_token: int = 100) -> Group:
    prompt = Prompt(
        prompt_id=f"p{prefix_length}",
        clip=Clip(path=Path("clip.mp4")),
        question="?",
        modalities=(),
        solution="happy",
    )
    inputs = PrefixInputs(
        prompt=prompt,
        token_ids_P=torch.arange(prefix_length),
        question_ids=torch.tensor([1, 2]),
        features=ClipFeatures(vision_FND=None, audio_AD=None),
    )
    completions, token = [], first_token
    for length in completion_lengths:
        ids = tuple(range(token, token + length))
        token += length
        completions.append(
            Completion(
                token_ids=ids,
                logprobs=tuple(-float(i) for i in ids),
                finish_reason="stop",
                version_spans=(VersionSpan(version=0, num_tokens=length),),
                cached_tokens=0,
            )
        )
    return Group(inputs=inputs, completions=tuple(completions), texts=("",) * len(completions))


def loop_pack(groups: list[Group]):
    """The packed row spelt out token by token."""
    positions, prefix_rows, rows, ids, predictors, sequences = [], [], [], [], [], []
    sequence = 0
    for group in groups:
        prefix_length = len(group.inputs.token_ids_P)
        prefix_rows += range(len(positions), len(positions) + prefix_length)
        positions += range(prefix_length)
        last_prefix_row = len(positions) - 1
        for completion in group.completions:
            for at, token in enumerate(completion.token_ids):
                predictors.append(last_prefix_row if at == 0 else len(positions) - 1)
                rows.append(len(positions))
                positions.append(prefix_length + at)
                ids.append(token)
                sequences.append(sequence)
            sequence += 1
    return positions, prefix_rows, rows, ids, predictors, sequences


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, [2, 4])],
        [(1, [1])],
        [(3, [2, 1, 5]), (7, [1]), (2, [3, 3])],
        [(4, [0, 2, 0]), (2, [1, 0])],
        [(5, []), (2, [2])],
    ],
    ids=["one group", "smallest", "uneven", "empty completions", "group without completions"],
)
def test_pack_equals_the_loop(shapes):
    groups = [make_group(p, r, first_token=100 * i) for i, (p, r) in enumerate(shapes)]
    packed = pack(groups)
    got = (
        packed.positions_T,
        packed.prefix_rows,
        packed.completion_rows_C,
        packed.completion_ids_C,
        packed.predictor_rows_C,
        packed.sequence_C,
    )
    for mine, spelt in zip(got, loop_pack(groups), strict=True):
        assert mine.tolist() == spelt
    assert packed.rollout_logprob_C.tolist() == [-float(i) for i in packed.completion_ids_C.tolist()]
    assert packed.num_rows == len(packed.positions_T) == packed.layout.num_rows
    assert packed.num_sequences == sum(len(r) for _, r in shapes)


def test_pack_refuses_nothing():
    with pytest.raises(ValueError, match="at least one group"):
        pack([])


def test_budget_keeps_groups_whole_and_in_order():
    groups = [make_group(4, [3, 3]), make_group(5, [2]), make_group(2, [1]), make_group(6, [4])]
    runs = split_by_budget(groups, 17)
    assert [[len(g.inputs.token_ids_P) for g in run] for run in runs] == [[4, 5], [2, 6]]


def test_a_group_over_the_budget_is_a_run_of_its_own():
    groups = [make_group(4, [3, 3]), make_group(5, [2]), make_group(3, [2, 2, 2]), make_group(2, [1])]
    runs = split_by_budget(groups, 8)
    assert [[len(g.inputs.token_ids_P) for g in run] for run in runs] == [[4], [5], [3], [2]]


def test_budget_names_the_prompt_that_never_fits():
    split_by_budget([make_group(4, [3, 3])], 7)
    with pytest.raises(
        ValueError, match=r"'p4' has a prefix of 4 rows and a completion of 3.*budget_rows is 6"
    ):
        split_by_budget([make_group(4, [3, 3])], 6)


def with_positions(group: Group, positions_3P: torch.Tensor) -> Group:
    return replace(group, inputs=replace(group.inputs, positions_3P=positions_3P))


def test_completions_go_on_above_the_largest_of_three_positions():
    grid = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 9], [0, 1, 2, 2]])
    packed = pack([with_positions(make_group(4, [2, 1]), grid), make_group(3, [2])])
    rows = [
        [0, 1, 1, 2, 10, 11, 10, 0, 1, 2, 3, 4],
        [0, 1, 1, 9, 10, 11, 10, 0, 1, 2, 3, 4],
        [0, 1, 2, 2, 10, 11, 10, 0, 1, 2, 3, 4],
    ]
    assert packed.positions_T.tolist() == rows


@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 4)])
def test_positions_of_another_number_of_rows_are_refused(shape):
    with pytest.raises(ValueError, match=rf"'p4' has positions of shape \({shape[0]}.*for 4 rows"):
        with_positions(make_group(4, [1]), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions_T": torch.arange(6)}, r"positions of shape \(6,\) for a layout of 7 rows"),
        ({"prefix_rows": torch.tensor([0, 1, 2, 3])}, "row 3 of 7 is in 2 segments"),
        ({"prefix_rows": torch.tensor([0, 1])}, "row 2 of 7 is in 0 segments"),
        ({"prefix_rows": torch.tensor([0, 1, 7])}, "row 7 lies outside a layout of 7 rows"),
        ({"completion_ids_C": torch.arange(3)}, "'completion_ids_C': 3"),
        ({"rollout_logprob_C": torch.zeros(5)}, "'rollout_logprob_C': 5"),
        (
            {"layout": SharedPrefixLayout(prefix_lengths=(3,), completion_lengths=((2, 1),))},
            "for a layout of 6 rows",
        ),
    ],
    ids=["positions", "overlap", "gap", "outside", "too few ids", "too many log-probs", "layout"],
)
def test_parts_that_do_not_make_up_the_layout_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(pack([make_group(3, [2, 2])]), **change)
