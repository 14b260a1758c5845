import json
import time

import pytest

from flexjax.bench.harness import (
    Cost,
    Timing,
    alternate,
    commit,
    header,
    measure,
    ratio_of_medians,
    table,
    timings,
    write_jsonl,
)


def test_header_names_what_repeats_the_run():
    found = header({"page_size": 16}, seed=7, command=["bench.py", "--quick"])
    assert found["kind"] == "header"
    assert found["command"] == "bench.py --quick"
    assert found["config"] == {"page_size": 16}
    assert found["seed"] == 7
    assert found["device"]["platform"] == "cpu"
    assert found["device"]["cores"] >= 1
    assert found["versions"]["jax"].split(".")[0].isdigit()
    assert found["commit"] == commit()
    json.dumps(found, allow_nan=False)


def test_median_is_not_the_best_nor_the_mean():
    timing = Timing("x", "s", (1.0, 9.0, 2.0, 3.0, 100.0))
    assert timing.median == 3.0
    assert Timing("x", "s", (1.0, 2.0)).median == 1.5


def test_p99_is_a_sample():
    assert Timing("x", "s", tuple(float(n) for n in range(1, 101))).p99 == 99.0
    assert Timing("x", "s", (3.0, 5.0, 4.0)).p99 == 5.0


def test_record_holds_every_sample_and_the_run_count():
    record = Timing("decode", "s", (2.0, 1.0, 3.0)).record(side="peer")
    assert record["samples"] == [2.0, 1.0, 3.0]
    assert (record["median"], record["runs"], record["side"]) == (2.0, 3, "peer")


def test_timing_refuses_no_samples():
    with pytest.raises(ValueError, match="`samples` of 'x' must not be empty"):
        Timing("x", "s", ())


def test_alternate_takes_turns():
    calls = []
    runs = {name: lambda n=name: calls.append(n) for name in ("a", "b")}
    costs = alternate(runs, 3)
    assert calls == ["a", "b"] * 3
    assert [len(costs[name]) for name in ("a", "b")] == [3, 3]
    assert min(min(cost) for cost in costs["a"]) >= 0


def test_cpu_seconds_do_not_count_waiting():
    cost = measure(lambda: time.sleep(0.2))
    assert cost.wall_s >= 0.2
    assert cost.cpu_s < 0.1


def test_costs_become_two_timings():
    wall, cpu = timings("x", [Cost(3.0, 1.0), Cost(5.0, 2.0) - Cost(1.0, 0.5)])
    assert (wall.samples, wall.unit) == ((3.0, 4.0), "s")
    assert (cpu.samples, cpu.unit) == ((1.0, 1.5), "cpu s")


def test_ratio_is_of_medians():
    slow = Timing("slow", "s", (2.0, 4.0, 100.0))
    fast = Timing("fast", "s", (1.0, 2.0, 3.0))
    assert ratio_of_medians(slow, fast) == 2.0


def test_jsonl_has_one_object_a_line(tmp_path):
    path = tmp_path / "out.json"
    write_jsonl(path, [{"kind": "header"}, {"kind": "timing", "median": 1.5}])
    lines = path.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["header", "timing"]


def test_jsonl_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_jsonl(tmp_path / "out.json", [{"median": float("nan")}])


def test_table_aligns_columns():
    assert table([("a", "ratio"), ("long", "1")]) == "a     ratio\n----  -----\nlong  1"
