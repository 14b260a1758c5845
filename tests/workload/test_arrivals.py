"""Arrival processes, traces and the scaling of lengths."""

import statistics

import pytest

from flexjax.workload import Arrival, load_trace, poisson_arrivals, rebase, scale_lengths


def test_poisson_has_the_asked_rate_and_follows_its_seed():
    arrivals = poisson_arrivals(4.0, 4000, seed=3)
    times = [arrival.arrival_s for arrival in arrivals]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert times == sorted(times)
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.08)
    assert poisson_arrivals(4.0, 4000, seed=3) == arrivals
    assert poisson_arrivals(4.0, 4000, seed=4) != arrivals


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_poisson_refuses_a_rate(rate):
    with pytest.raises(ValueError, match="`rate` must be a number > 0"):
        poisson_arrivals(rate, 3, 0)


def test_poisson_refuses_no_requests():
    with pytest.raises(ValueError, match="`n` must be an integer >= 1; got 0"):
        poisson_arrivals(1.0, 0, 0)


def test_csv_trace(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(
        "arrival_s,context_tokens,generated_tokens\n0.5,374,44\n\n1.25,396,109\r\n", "utf-8"
    )
    assert load_trace(file) == [Arrival(0.5, 374, 44), Arrival(1.25, 396, 109)]
    assert load_trace(file, 1) == [Arrival(0.5, 374, 44)]


def test_plain_trace(tmp_path):
    file = tmp_path / "trace.txt"
    file.write_text("2\n3\n3\n7.5\n", "utf-8")
    assert [arrival.arrival_s for arrival in load_trace(file)] == [2, 3, 3, 7.5]
    assert load_trace(file)[0].prompt_tokens is None


HEADER = "arrival_s,context_tokens,generated_tokens\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "0,1,1\nx,1,1\n", r"t\.csv:3: `arrival_s` must be a number >= 0; got 'x'"),
        (HEADER + "nan,1,1\n", r"t\.csv:2: `arrival_s` must be a number"),
        (HEADER + "-1,1,1\n", r"t\.csv:2: `arrival_s` must be a number >= 0; got '-1'"),
        (HEADER + "0,0,1\n", r"t\.csv:2: `context_tokens` must be an integer >= 1; got '0'"),
        (HEADER + "0,1,2.5\n", r"t\.csv:2: `generated_tokens` must be an integer"),
        (HEADER + "0,1\n", r"t\.csv:2: expected 3 fields"),
        (HEADER + "5,1,1\n4,1,1\n", r"t\.csv:3: arrival times must not decrease; got 4\.0 after"),
        ("0,1,1\n", r"t\.csv:1: a file of several columns must begin with the header"),
        ("", "holds no request"),
        (HEADER, "holds no request"),
    ],
)
def test_unusable_traces_name_file_and_line(tmp_path, content, message):
    file = tmp_path / "t.csv"
    file.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        load_trace(file)


def test_missing_and_binary_traces(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.csv' is not a file"):
        load_trace(tmp_path / "nope.csv")
    file = tmp_path / "binary"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_trace(file)


def test_scaling_keeps_proportions():
    arrivals = [Arrival(0.0, 100, 10), Arrival(1.0, 400, 30), Arrival(2.0, 1, 1)]
    scaled, scale = scale_lengths(arrivals, max_prompt_tokens=200, max_output_tokens=40)
    assert [a.prompt_tokens for a in scaled] == [50, 200, 1]
    assert [a.output_tokens for a in scaled] == [10, 30, 1]
    assert (scale.prompt, scale.output) == (0.5, 1.0)
    assert [a.arrival_s for a in scaled] == [0.0, 1.0, 2.0]


def test_scaling_never_exceeds_the_limit():
    arrivals = [Arrival(0.0, n, n) for n in range(1, 300, 7)]
    for limit in (1, 3, 17, 100):
        scaled, _ = scale_lengths(arrivals, max_prompt_tokens=limit, max_output_tokens=limit)
        assert max(a.prompt_tokens or 0 for a in scaled) == limit
        assert min(a.output_tokens or 0 for a in scaled) >= 1


def test_scaling_refuses_a_limit():
    with pytest.raises(ValueError, match="`max_output_tokens` must be an integer >= 1; got 0"):
        scale_lengths([Arrival(0.0)], max_prompt_tokens=1, max_output_tokens=0)


def test_rebase():
    arrivals = [Arrival(10.0, 1, 1), Arrival(14.0, 2, 2)]
    assert [a.arrival_s for a in rebase(arrivals, 0.5)] == [0.0, 2.0]
    with pytest.raises(ValueError, match="`time_scale` must be a number >= 0"):
        rebase(arrivals, float("nan"))
