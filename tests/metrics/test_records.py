"""Records: what they derive, what they refuse, and the way to a file and back."""

import dataclasses
import json
import math

import pytest
from metric_cases import HEADER, request, run, step, train

from flexjax.metrics import RunRecord, load_runs


def test_latencies_of_a_request():
    found = request(due_s=1.0, token_times_s=(1.5, 1.75, 2.5), admitted_s=1.25)
    assert found.ttft_s == 0.5
    assert found.tpot_s == 0.5
    assert found.itl_s == (0.25, 0.75)
    assert found.e2e_s == 1.5
    assert found.admission_wait_s == 0.25
    assert found.is_complete


def test_a_late_generator_adds_to_ttft():
    # Due at 1, sent at 4 and answered 0.5 s later.
    assert request(due_s=1.0, token_times_s=(4.5,)).ttft_s == 3.5


def test_a_single_token_has_no_tpot_and_no_gap():
    found = request(token_times_s=(2.0,))
    assert (found.ttft_s, found.tpot_s, found.itl_s, found.e2e_s) == (2.0, None, (), 2.0)


def test_an_unfinished_request_has_no_end():
    found = request(token_times_s=(2.0, 3.0), status="unfinished", output_tokens=9)
    assert (found.ttft_s, found.tpot_s, found.e2e_s) == (2.0, 1.0, None)
    empty = request(status="failed")
    assert (empty.ttft_s, empty.tpot_s, empty.itl_s, empty.e2e_s) == (None, None, (), None)
    assert empty.admission_wait_s is None


@pytest.mark.parametrize(
    ("times_s", "more", "is_complete"),
    [
        ((1.0, 2.0), {}, True),
        ((1.0, 2.0), {"output_tokens": 3}, False),
        ((1.0, 2.0), {"output_tokens": 3, "finish_reason": "stop"}, True),
        ((), {"finish_reason": "stop"}, False),
        ((1.0, 2.0), {"status": "failed"}, False),
        ((1.0, 2.0), {"status": "unfinished"}, False),
    ],
)
def test_complete_means_every_token(times_s, more, is_complete):
    assert request(token_times_s=times_s, **more).is_complete == is_complete


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"due_s": math.inf}, "`due_s` must be finite; got inf"),
        ({"due_s": 2.0, "token_times_s": (1.0,)}, "`token_times_s` must be finite, in order and"),
        ({"token_times_s": (2.0, 1.0)}, "`token_times_s` must be finite, in order and"),
        ({"token_times_s": (2.0, math.nan)}, "`token_times_s` must be finite, in order and"),
        ({"token_times_s": (1.0, 2.0), "output_tokens": 1}, "at most `output_tokens`=1 times; got"),
        ({"status": "done"}, "`status` must be one of finished, failed, refused, unfinished; got"),
        ({"status": "refused", "token_times_s": (1.0,)}, "must be empty for a refused request"),
        ({"output_tokens": 0}, "`output_tokens` must be >= 1; got 0"),
        ({"prompt_tokens": -1}, "`prompt_tokens` must be >= 0; got -1"),
        ({"due_s": 2.0, "admitted_s": 1.0}, "`admitted_s` must be >= `due_s`=2.0; got 1.0"),
        ({"ttft_target_ms": 0.0}, "`ttft_target_ms` must be > 0 or None; got 0.0"),
    ],
)
def test_a_request_refuses(fields, reason):
    with pytest.raises(ValueError) as error:
        request(**fields)
    assert reason in str(error.value)


def test_rows_and_padding_of_a_step():
    found = step(0.0, 0.1, rows=(5, 30, 10, 100), buckets=(8, 64, 128))
    assert found.rows == 145
    assert found.padding_rows == 3 + 24 + 28
    # Of 24 rows of padding that prefill and finetuning share, a quarter is finetuning's.
    assert found.finetuning_padding_rows == 28 + 6
    assert step(0.0, 0.1, buckets=(8, 64, 0)).finetuning_padding_rows == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"end_s": -1.0}, "`end_s` must be finite and >= `begin_s`=0.0; got -1.0"),
        ({"rows": (9, 0, 0, 0)}, "`decode_bucket` must be at least the rows in use, 9; got 8"),
        ({"rows": (0, 40, 25, 0)}, "`chunk_bucket` must be at least the rows in use, 65; got 64"),
        ({"rows": (0, 0, 0, 17)}, "`window_bucket` must be at least the rows in use, 17; got 16"),
        ({"rows": (0, -1, 0, 0)}, "`prefill_rows` must be >= 0; got -1"),
        ({"predicted_ms": 0.0}, "`predicted_ms` must be finite and > 0, or None; got 0.0"),
        ({"host_ms": -1.0}, "`host_ms` must be finite and >= 0; got -1.0"),
        ({"backward_target_tokens": 1.0}, "must be at most `backward_rows`=0; got 1.0"),
    ],
)
def test_a_step_refuses(fields, reason):
    with pytest.raises(ValueError) as error:
        step(**{"begin_s": 0.0, "end_s": 1.0, "buckets": (8, 64, 16), "measured_ms": 1.0, **fields})
    assert reason in str(error.value)


def test_an_optimizer_step_refuses():
    with pytest.raises(ValueError, match=r"`target_tokens` must be in \[0, `tokens`=3\]; got 4"):
        train(1.0, 4, tokens=3)
    with pytest.raises(ValueError, match="`step` must be >= 1; got 0"):
        train(1.0, 4, number=0)


def full_run(**header):
    return dataclasses.replace(
        run(
            [
                request(0, 0.1, (1 / 3, 0.7), adapter="a", slo_class="batch", ttft_target_ms=5.5),
                request(1, 0.2, status="refused", finish_reason="full", output_tokens=7),
                request(2, 0.3, (0.9,), status="unfinished", output_tokens=7, admitted_s=0.4),
            ],
            [step(0.0, 0.1, (1, 2, 3, 4), (1, 8, 4), predicted_ms=99.9), step(0.2, 0.3)],
            [train(0.5, 7, tokens=9), train(0.7, 8, number=2, loss=math.inf)],
            until_s=9.5,
            **header,
        ),
        summary={"ttft": [1.5, None]},
    )


def test_a_run_comes_back_from_its_file_exactly(tmp_path):
    for saved in (full_run(), run(rate=None, device="TPU", sizes=[1, 2], kind="header")):
        saved.save(tmp_path / "run.jsonl")
        assert RunRecord.load(tmp_path / "run.jsonl") == saved
        lines = (tmp_path / "run.jsonl").read_text().splitlines()
        kinds = [json.loads(line)["kind"] for line in lines]
        assert kinds[0] == "header"
        assert kinds.count("request") == len(saved.requests)
        assert kinds.count("summary") == (saved.summary is not None)
    assert (saved.rate, saved.device_name) == (None, "TPU")
    assert full_run().device_name == "NVIDIA H200"
    cpu = {"platform": "cpu", "kind": "cpu", "cpu": "EPYC"}
    assert full_run(device=cpu).device_name == "EPYC"


def test_a_loss_that_diverged_is_kept(tmp_path):
    run(training=[train(1.0, 4, loss=math.nan)]).save(tmp_path / "run.jsonl")
    assert math.isnan(RunRecord.load(tmp_path / "run.jsonl").training[0].loss)
    assert "NaN" not in (tmp_path / "run.jsonl").read_text()


def test_a_file_holds_several_runs(tmp_path):
    path = tmp_path / "runs.jsonl"
    first, second = full_run(), run(rate=4.0)
    first.save(path)
    second.save(path, append=True)
    assert load_runs(path) == (first, second)
    with pytest.raises(ValueError, match="must hold one run; got 2"):
        RunRecord.load(path)
    second.save(path)
    assert load_runs(path) == (second,)


def changed(number, change):
    """The lines of a full run's file with one of them changed."""

    def change_line(path):
        lines = path.read_text().splitlines()
        row = json.loads(lines[number - 1])
        change(row)
        lines[number - 1] = json.dumps(row)
        path.write_text("\n".join(lines) + "\n")

    return change_line


def cut_off(path):
    path.write_text(path.read_text()[:-20])


def headless(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off, "line 9: not JSON"),
        (headless, "line 1: `kind` must be 'header' on the first line; got 'request'"),
        (lambda path: path.write_text(""), "line 1: `kind` must be 'header'; got 'an empty file'"),
        (lambda path: path.write_text("3\n"), "line 1: must be a JSON object; got '3'"),
        (lambda path: path.write_bytes(b"\xff\n"), "line 1: 'utf-8' codec can't decode"),
        (lambda path: path.write_text('{"a": NaN}\n'), "line 1: numbers must be finite; got NaN"),
        (changed(1, lambda row: row.pop("commit")), "line 1: `header` must be a mapping with comm"),
        (changed(1, lambda row: row.update(format=9)), "line 1: `format` must be 1; got 9"),
        (changed(1, lambda row: row.pop("end_s")), "line 1: `end_s` must be a number; got None"),
        (changed(1, lambda row: row.update(end_s=-1)), "line 1: `end_s` must be finite and > "),
        (changed(1, lambda row: row.update(rate=0)), "line 1: `rate` must be a number > 0 or None"),
        (changed(1, lambda row: row.update(policy="")), "line 1: `policy` must be a name; got ''"),
        (
            changed(2, lambda row: row.update(due_s="x")),
            "line 2: `due_s` must be a number; got",
        ),
        (
            changed(2, lambda row: row.update(due_s=None)),
            "line 2: `due_s` must be a number; got N",
        ),
        (changed(2, lambda row: row.update(adapter=1)), "line 2: `adapter` must be text or null"),
        (
            changed(2, lambda row: row.update(token_times_s=[True])),
            "line 2: `token_times_s` must be a list of numbers; got [True]",
        ),
        (changed(3, lambda row: row.pop("status")), "line 3: field `status` is missing"),
        (changed(3, lambda row: row.update(extra=1)), "line 3: field `extra` is unknown"),
        (changed(3, lambda row: row.update(kind="x")), "line 3: `kind` must be one of header, req"),
        (
            changed(5, lambda row: row.update(decode_rows=1.5)),
            "line 5: `decode_rows` must be an",
        ),
        (changed(4, lambda row: row.update(request_id=0)), "line 1: `request_id` must be unique"),
        (changed(9, lambda row: row.pop("figures")), "line 9: `figures` must be an object; got"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(damage, reason, tmp_path):
    path = tmp_path / "run.jsonl"
    full_run().save(path)
    damage(path)
    with pytest.raises(ValueError) as error:
        RunRecord.load(path)
    assert f"{path}, {reason}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"header": {"policy": "x"}}, "`header` must be a mapping with command, device"),
        ({"header": {**HEADER, "config": {1, 2}}}, "`header` must hold finite JSON values only"),
        ({"header": {**HEADER, "config": math.nan}}, "`header` must hold finite JSON values only"),
        ({"header": {**HEADER, "end_s": 3}}, "must be without the keys format, begin_s"),
        ({"header": {**HEADER, "device": {}}}, "`device` must be a name, or fields with `kind`"),
        ({"end_s": 0.0}, "`end_s` must be finite and > `begin_s`=0.0; got 0.0"),
        ({"measured_until_s": 11.0}, "`measured_until_s` must be in (`begin_s`=0.0, `end_s`=10.0]"),
        ({"requests": (request(1), request(1))}, "`request_id` must be unique in a run; got 1"),
    ],
)
def test_a_run_refuses(change, reason):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(run(), **change)
    assert reason in str(error.value)
