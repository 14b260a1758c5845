"""A workload's description and its file; the papers' loads."""

import json
import math
import subprocess
import sys

import pytest

from flexjax.workload import (
    FLEXLLM_RATES,
    Arrival,
    ConstantLength,
    IndependentLengths,
    LognormalLength,
    Workload,
    flexllm_load,
    gamma_arrivals,
    loquetier_changing_load,
    loquetier_four_adapters,
    loquetier_one_adapter,
    uniform_arrivals,
    with_adapters,
    with_lengths,
    with_slo_classes,
)

LENGTHS = IndependentLengths(LognormalLength(200, 1.2, 8000), LognormalLength(150, 0.8, 2000))


def example():
    arrivals = gamma_arrivals(3.0, 200, 5, burstiness=0.4)
    arrivals = with_lengths(arrivals, LENGTHS, 5)
    arrivals = with_adapters(arrivals, ["a", "b\u2028\u00e9"], "uniform", 5, base_share=0.2)
    arrivals = with_slo_classes(arrivals, {"interactive": 0.5, "batch": 0.5}, 5)
    return Workload("example", arrivals, 5, {"burstiness": 0.4, "names": ("a", "b")})


def test_description():
    arrivals = [
        Arrival(1.0, 10, 5, "a", "batch"),
        Arrival(2.0, 30, None, "b"),
        Arrival(5.0, 20, None, "b"),
        Arrival(7.0),
    ]
    described = Workload("w", arrivals, 3).description
    gap_cv = math.sqrt(((1 - 2) ** 2 + (3 - 2) ** 2 + 0) / 3) / 2
    assert described.pop("gap_cv") == pytest.approx(gap_cv)
    assert described == {
        "name": "w",
        "seed": 3,
        "num_requests": 4,
        "first_s": 1.0,
        "last_s": 7.0,
        "rate": 0.5,
        "prompt_tokens": {"num_known": 3, "mean": 20.0, "min": 10, "max": 30, "total": 60},
        "output_tokens": {"num_known": 1, "mean": 5.0, "min": 5, "max": 5, "total": 5},
        "adapters": {"b": 2, "a": 1},
        "num_base": 1,
        "slo_classes": {"batch": 1},
        "num_without_class": 3,
    }
    single = Workload("w", [Arrival(1.0)]).description
    assert single["rate"] is None and single["gap_cv"] is None and single["prompt_tokens"] is None


def test_jsonl_gives_back_the_same(tmp_path):
    workload = example()
    file = tmp_path / "workload.jsonl"
    workload.to_jsonl(file)
    read = Workload.from_jsonl(file)
    assert read == workload
    assert read.description == workload.description
    assert read.settings == {"burstiness": 0.4, "names": ["a", "b"]}
    lines = [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]
    assert len(lines) == 201
    assert lines[0]["description"] == workload.description
    read.to_jsonl(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


def test_what_is_unknown_is_not_written(tmp_path):
    Workload("w", [Arrival(0.1)]).to_jsonl(tmp_path / "w.jsonl")
    assert (tmp_path / "w.jsonl").read_text("utf-8").split("\n")[1:] == ['{"arrival_s": 0.1}', ""]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:-1], "must hold 200 requests, as its first line says; got 199"),
        (lambda lines: [*lines, lines[-1]], "must hold 200 requests, .*; got 201"),
        (lambda lines: [], r"w\.jsonl:1: the line must be JSON"),
        (lambda lines: lines[1:], r"w\.jsonl:1: the first line must say \"format\""),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 2')], "-workload' and 2"),
        (lambda lines: [lines[0].replace('"seed": 5', '"seed": "5"')], ":1: `seed` must be an int"),
        (lambda lines: [lines[0].replace('"name": "ex', '"name": 1, "x": "ex')], "have the keys"),
        (lambda lines: [lines[0].replace('"seed"', '"sed"')], "the first line must have the keys"),
        (lambda lines: [lines[0].replace('"seed": 5', '"seed": -5'), *lines[1:]], "`seed` must be"),
        (lambda lines: [lines[0], "[1]"], r"w\.jsonl:2: the line must be a JSON object"),
        (lambda lines: [lines[0], '{"arrival_s": -1}'], r":2: `arrival_s` must be a number >= 0"),
        (lambda lines: [lines[0], '{"arrival_s": NaN}'], r":2: `arrival_s` must be a number >= 0"),
        (lambda lines: [lines[0], '{"arrival_s": "1"}'], r":2: `arrival_s` must be a number >= 0"),
        (lambda lines: [lines[0], '{"arrival_s": 1, "x": 2}'], ":2: a request must have `arrival"),
        (lambda lines: [lines[0], '{"prompt_tokens": 1}'], ":2: a request must have `arrival_s`"),
        (
            lambda lines: [lines[0], '{"arrival_s": 1, "prompt_tokens": 2.5}'],
            ":2: `prompt_tokens` must be an integer >= 1; got 2.5",
        ),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "in order of arrival; got"),
    ],
)
def test_unusable_files(tmp_path, edit, message):
    file = tmp_path / "w.jsonl"
    example().to_jsonl(file)
    lines = file.read_text("utf-8").split("\n")[:-1]
    file.write_text("".join(line + "\n" for line in edit(lines)), "utf-8")
    with pytest.raises(ValueError, match=message):
        Workload.from_jsonl(file)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope' is not a file"):
        Workload.from_jsonl(tmp_path / "nope")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workload("", [Arrival(0.0)]), "`name` must be a text that is not empty; got ''"),
        (lambda: Workload("w", []), "`arrivals` must hold at least one request"),
        (lambda: Workload("w", [Arrival(0.0)], -1), "`seed` must be an integer >= 0; got -1"),
        (lambda: Workload("w", [Arrival(1.0), Arrival(0.0)]), "got 0.0 after 1.0"),
        (lambda: Workload("w", [Arrival(0.0)], 0, {"x": {1}}), "`settings` must be what JSON can"),
        (lambda: Workload("w", [Arrival(0.0)], 0, {"x": math.nan}), "`settings` must be what JSON"),
        (lambda: Arrival(math.nan), "`arrival_s` must be a number >= 0; got nan"),
        (lambda: Arrival(-0.5), "`arrival_s` must be a number >= 0; got -0.5"),
        (lambda: Arrival(0.0, 0), "`prompt_tokens` must be an integer >= 1; got 0"),
        (lambda: Arrival(0.0, 1, -1), "`output_tokens` must be an integer >= 1; got -1"),
        (lambda: Arrival(0.0, adapter=""), "`adapter` must be a text that is not empty; got ''"),
        (lambda: Arrival(0.0, slo_class=""), "`slo_class` must be a text that is not empty"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_loquetier_one_adapter():
    workload = loquetier_one_adapter("x")
    times = [a.arrival_s for a in workload.arrivals]
    assert times == [float(second) for second in range(800)]
    assert workload.description["adapters"] == {"x": 800}
    assert workload.seed is None


def test_loquetier_four_adapters():
    names = ["a", "b", "c", "d"]
    workload = loquetier_four_adapters(names, time_scale=0.5)
    assert workload.description["adapters"] == dict.fromkeys(names, 200)
    assert [a.arrival_s for a in workload.arrivals] == [0.5 * index for index in range(800)]
    assert [a.adapter for a in workload.arrivals] == names * 200
    of_b = [a.arrival_s for a in workload.arrivals if a.adapter == "b"]
    assert of_b[:3] == [0.5, 2.5, 4.5]


@pytest.mark.parametrize("time_scale", [1.0, 0.1])
def test_loquetier_changing_load(time_scale):
    workload = loquetier_changing_load("x", time_scale=time_scale)
    expected = [
        *(1.0 * index for index in range(120)),
        *(120 + 0.4 * index for index in range(150)),
        *(180 + 0.5 * index for index in range(240)),
        *(300 + 1.0 * index for index in range(120)),
    ]
    times = [a.arrival_s for a in workload.arrivals]
    assert times == pytest.approx([time_scale * time_s for time_s in expected])
    assert workload.settings == {"time_scale": time_scale}


def test_loquetier_with_lengths():
    workload = loquetier_one_adapter("x", LENGTHS, seed=3)
    assert workload.seed == 3
    assert workload.description["output_tokens"]["num_known"] == 800
    assert loquetier_one_adapter("x", LENGTHS, seed=3) == workload
    assert loquetier_one_adapter("x", LENGTHS, seed=4) != workload


def test_flexllm_load_from_a_trace():
    trace = gamma_arrivals(2.5, 1000, 0, burstiness=0.3)
    for rate in FLEXLLM_RATES:
        workload = flexllm_load(rate, LENGTHS, trace=trace, adapter="x", duration_s=120.0)
        described = workload.description
        assert described["num_requests"] == 120 * rate
        assert 0 <= described["first_s"] and described["last_s"] <= 120
        assert described["adapters"] == {"x": described["num_requests"]}
        totals = [(a.prompt_tokens or 0) + (a.output_tokens or 0) for a in workload.arrivals]
        assert max(totals) <= 8192
    again = flexllm_load(5.0, LENGTHS, trace=trace, adapter="x", duration_s=120.0)
    assert again == workload
    other = flexllm_load(5.0, LENGTHS, trace=trace, adapter="x", duration_s=120.0, seed=1)
    assert [a.arrival_s for a in other.arrivals] != [a.arrival_s for a in workload.arrivals]


def test_flexllm_load_without_a_trace():
    workload = flexllm_load(4.0, LENGTHS, duration_s=500.0, max_total_tokens=500)
    described = workload.description
    assert described["num_requests"] == pytest.approx(2000, abs=4 * math.sqrt(2000))
    assert described["gap_cv"] == pytest.approx(1.0, abs=4 / math.sqrt(2000))
    assert described["num_base"] == described["num_requests"]
    assert max((a.prompt_tokens or 0) + (a.output_tokens or 0) for a in workload.arrivals) <= 500
    assert workload.settings["arrivals"] == "poisson"


CONSTANT = IndependentLengths(ConstantLength(9), ConstantLength(9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loquetier_one_adapter("x", time_scale=0.0), "`time_scale` must be a number > 0"),
        (lambda: loquetier_four_adapters("abcd"), "`adapters` must be a collection of names"),
        (lambda: loquetier_changing_load(""), "`adapter` must be a text that is not empty"),
        (lambda: flexllm_load(1.0, CONSTANT, adapter=""), "`adapter` must be a text that is not"),
        (lambda: loquetier_one_adapter(""), "`adapter` must be a text that is not empty"),
        (lambda: loquetier_four_adapters(["a"] * 4), "`adapters` must be four different names"),
        (lambda: flexllm_load(0.0, CONSTANT), "`rate` must be a number > 0; got 0.0"),
        (lambda: flexllm_load(1.0, CONSTANT, max_total_tokens=17), "`max_total_tokens` must leave"),
        (
            lambda: flexllm_load(1.0, CONSTANT, trace=uniform_arrivals(1.0, 600)),
            "`length_s` must be at most the trace's 599.0 s; got 600.0",
        ),
    ],
)
def test_bad_loads(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_imports_no_jax():
    code = "import sys, flexjax.workload; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
