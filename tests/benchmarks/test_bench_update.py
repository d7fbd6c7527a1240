"""bench_update: a smoke run, that its variants do the same work, and its checks."""

import pytest
import torch

SHAPE = "P=24 R=4 G=3"


@pytest.fixture
def bench(bench_module):
    return bench_module("bench_update")


@pytest.fixture
def work(bench_module):
    return bench_module("update_work")


def test_smoke(run):
    report = run()
    rows = {(row["section"], row["name"]): row for row in report["rows"]}
    split = f"split, {SHAPE}, budget 32 rows"
    assert list(rows) == [
        (f"decoder, {SHAPE}", "packed"),
        (f"decoder, {SHAPE}", "dense"),
        (split, "whole"),
        (split, "split"),
        (split, "split, twice the completions"),
        (f"update, {SHAPE}", "ours"),
        (f"update, {SHAPE}", "transformers"),
    ]
    dense = rows[f"decoder, {SHAPE}", "dense"]
    assert dense["figures"]["token ratio"] == pytest.approx(3 * 28 / 36)
    assert 1 < dense["ideal_ratio"] < 3
    assert rows[split, "split"]["ideal_ratio"] == 1
    assert all(row["figures"]["useful TFLOP/s"] > 0 and row["peak_bytes"] > 0 for row in report["rows"])
    checks = {check["name"]: check for check in report["checks"]}
    assert {name: check["target"] for name, check in checks.items()} == {
        f"|packed - dense| hidden states, {SHAPE}": "<= 0.02",
        f"dense / packed time, {SHAPE}": ">= 4.8",
        f"packed / dense peak memory, {SHAPE}": "<= 0.35",
        f"split: peak of 2 G / peak of G, {SHAPE}, budget 32 rows": "<= 1.05",
        f"|ours - transformers'| mean log-prob, {SHAPE}": "<= 0.05",
        f"transformers' time / ours, {SHAPE}": ">= 4.5",
    }
    assert checks[f"|packed - dense| hidden states, {SHAPE}"]["ok"]
    assert checks[f"|ours - transformers'| mean log-prob, {SHAPE}"]["ok"]


def test_parts_and_sizes_are_chosen(run):
    report = run("--parts", "decoder", "--sizes", "5,2,2", "3,4,1", "--dtype", "float32", "--layers", "1")
    sections = list(dict.fromkeys(row["section"] for row in report["rows"]))
    assert sections == ["decoder, P=5 R=2 G=2", "decoder, P=3 R=4 G=1"]
    assert report["notes"] == ["1 decoder layers of the smoke geometry, random weights"]


def test_own_tests_exist(bench, bench_module):
    root = bench_module("report").ROOT
    assert [test for test in bench.OWN_TESTS if not (root / test).is_file()] == []


def problem(bench, work, samples=3):
    config = bench.GEOMETRIES["smoke"]
    policy = work.TextPolicy(config, device=torch.device("cpu"), dtype=torch.float32)
    sizes = work.Sizes(prompts=1, prefix=9, completion=4, samples=samples)
    machine = type("Machine", (), {"device": torch.device("cpu")})
    return policy, bench._training_pack(machine, sizes, config.vocab_size), sizes


def taken_gradients(policy) -> list[torch.Tensor]:
    grads = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    return grads


def test_the_update_is_that_of_transformers_and_of_the_split(bench, work):
    policy, item, _ = problem(bench, work)
    theirs, ids_GL = work.transformers_policy(policy), bench._sequence_ids(item)
    advantage_G = item.batch.advantage_C.view(3, 4)[:, 0]
    reference_GR = item.batch.reference_C.view(3, 4)
    runs = (
        lambda: work.update(policy, item, 100),
        lambda: work.update(policy, item, 9 + 4),
        lambda: work.reference_update(theirs, ids_GL, advantage_G, reference_GR),
    )
    (loss, grads), *others = [(run(), taken_gradients(policy)) for run in runs]
    for other_loss, other_grads in others:
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
        for mine, other in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-3, atol=1e-6)


def test_dense_is_packed_by_sequence(bench, work):
    policy, item, sizes = problem(bench, work)
    rows_TD = torch.randn(item.pack.num_rows, policy.decoder.config.width)
    sequences_GL = bench._sequence_rows(sizes)
    packed = policy.decoder(rows_TD, item.pack.positions_T, item.pack.layout)[sequences_GL]
    dense = work.dense_hidden(policy.decoder, rows_TD[sequences_GL])
    torch.testing.assert_close(dense, packed.flatten(0, 1), rtol=0, atol=1e-5)


def test_a_size_that_is_none_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--smoke", "--sizes", "5,0,2"])
    assert "P,R,G is 5,0,2: give three numbers of at least 1" in capsys.readouterr().err
