"""The harness: order of runs, statistics, memory, checks, report, and its refusals."""

import json
import math
import time

import pytest
import torch


@pytest.fixture
def harness(bench_module):
    return bench_module("harness")


@pytest.fixture
def report(bench_module):
    return bench_module("report")


def make_bench(harness, *options: str):
    return harness.Bench("unit", harness.parse(harness.arguments("A test."), ["--smoke", *options]))


def test_rounds_alternate_their_direction_after_a_warm_up_and_a_memory_run(harness):
    calls = []
    variants = [
        harness.Variant(
            name=name, run=lambda name=name: calls.append(name), prepare=lambda: calls.append("-")
        )
        for name in "abc"
    ]
    timings = make_bench(harness, "--rounds", "3").measure(variants)
    assert "".join(calls) == "".join(f"-{name}" for name in "abc" + "abc" + "abc" + "cba" + "abc")
    assert [len(timings[name].seconds) for name in "abc"] == [3, 3, 3]


def test_compare_relates_every_row_to_the_first(harness):
    bench = make_bench(harness)
    variants = [
        harness.Variant(name="fast", run=lambda: time.sleep(0.02), flops=2e6),
        harness.Variant(name="slow", run=lambda: time.sleep(0.12)),
    ]
    bench.compare("sleep", variants, ideal_ratios={"slow": 6.0})
    fast, slow = bench.rows
    assert (fast.ratio, fast.ideal_ratio, slow.ideal_ratio) == (None, None, 6.0)
    assert 1.5 < slow.ratio <= 6.2
    assert min(fast.seconds) >= 0.02
    assert bench.ceiling_flops > 1e8


def test_prepare_is_not_timed(harness):
    variant = harness.Variant(name="a", run=lambda: None, prepare=lambda: time.sleep(0.05))
    assert min(make_bench(harness).measure([variant])["a"].seconds) < 0.02


def test_peak_counts_what_lives_at_once(harness):
    def together():
        first, second = torch.zeros(250_000), torch.zeros(500_000)
        return first, second

    def in_turn():
        torch.zeros(250_000)
        torch.zeros(500_000)

    variants = [harness.Variant(name=f.__name__, run=f) for f in (together, in_turn)]
    timings = make_bench(harness).measure(variants)
    assert timings["together"].peak_bytes == 3_000_000
    assert timings["in_turn"].peak_bytes == 2_000_000


def test_quartiles_and_paired_ratio_by_hand(report):
    assert report.quartiles_of((5.0, 1.0, 4.0, 2.0, 3.0)) == (2.0, 3.0, 4.0)
    assert report.quartiles_of((7.0,)) == (7.0, 7.0, 7.0)
    # The machine was ten times slower in the second round; the ratios of the rounds are 2, 3 and 4.
    assert report.paired_ratio((2.0, 30.0, 4.0), (1.0, 10.0, 1.0)) == 3.0


def test_share_of_the_ceiling_by_hand(report):
    row = report.Row(section="s", name="n", seconds=(0.5,), flops=1e9)
    written = report.row_json(row, ceiling_flops=4e9)
    assert (written["ideal_ms"], written["share_of_ceiling"]) == (250.0, 0.5)


@pytest.mark.parametrize(
    ("value", "at_least", "at_most"), [(1, False, True), (2, True, True), (3, True, False)]
)
def test_checks_include_their_bound(report, value, at_least, at_most):
    assert report.Check.at_least("x", value, 2).ok is at_least
    assert report.Check.at_most("x", value, 2).ok is at_most


def test_nan_passes_no_check(report):
    assert not report.Check.at_least("x", math.nan, 2).ok
    assert not report.Check.at_most("x", math.nan, 2).ok


def test_report_writes_what_it_measured(harness, report, tmp_path, capsys):
    path = tmp_path / "out.json"
    bench = make_bench(harness, "--json", str(path))
    bench.compare("nothing", [harness.Variant(name="pass", run=lambda: None, flops=1.0)])
    bench.notes.append("a [note]")
    bench.checks.append(report.Check.at_least("figure", 1.5, 1))
    assert bench.report() == 0
    text = path.read_text()
    written = json.loads(text)
    assert {"machine", "versions", "rows", "checks"} <= written.keys()
    assert written["checks"] == [{"name": "figure", "value": 1.5, "target": ">= 1", "ok": True}]
    assert written["rows"][0]["ms"].keys() == {"q1", "median", "q3", "rounds"}
    assert written["machine"].keys() == {
        *("cpu", "cores", "torch_threads", "memory_gib"),
        *("load_at_start", "gemm_gflops", "gemm_side", "dtype"),
    }
    assert written["versions"]["torch"] == torch.__version__
    assert str(report.ROOT) not in text
    assert str(tmp_path) not in text
    printed = capsys.readouterr().out
    assert "pass" in printed
    assert "a [note]" in printed


def test_a_failed_check_fails_the_run_unless_it_is_a_smoke_run(harness, report):
    status = []
    for options in (["--smoke"], []):
        bench = harness.Bench("unit", harness.parse(harness.arguments("A test."), options))
        bench.checks.append(report.Check.at_least("figure", 0, 1))
        status.append(bench.report())
    assert status == [0, 1]


def test_red_tests_refuse_the_measurement(harness, tmp_path):
    green, red = tmp_path / "test_green.py", tmp_path / "test_red.py"
    green.write_text("def test_it():\n    pass\n")
    red.write_text("def test_it():\n    assert 1 == 2\n")
    harness.require_green([str(green)])
    with pytest.raises(SystemExit, match=r"assert 1 == 2[\s\S]*nothing was measured"):
        harness.require_green([str(red)])


def test_a_test_that_does_not_exist_is_no_green_one(harness):
    with pytest.raises(SystemExit, match="nothing was measured"):
        harness.require_green(["tests/no_such_test.py"])


def test_two_variants_of_one_name_are_refused(harness):
    variants = [harness.Variant(name="a", run=lambda: None)] * 2
    with pytest.raises(ValueError, match="different names"):
        make_bench(harness).measure(variants)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--rounds", "0"], "at least 1, got 0"), (["--json", "no/such/out.json"], "no directory")],
    ids=["rounds", "json"],
)
def test_unusable_options_are_refused_before_any_work(harness, capsys, options, message):
    with pytest.raises(SystemExit):
        harness.parse(harness.arguments("A test."), options)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_says_so(harness):
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        make_bench(harness, "--device", "cuda")
