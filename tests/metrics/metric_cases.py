"""Records that the tests of metrics build on."""

from flexjax.metrics import RequestRecord, RunRecord, StepRecord, TrainRecord

HEADER = {
    "command": "python bench.py --rate 2",
    "device": {"platform": "gpu", "kind": "NVIDIA H200"},
    "versions": {"jax": "0.10.2"},
    "commit": "abc",
    "seed": 3,
    "policy": "co_serve",
    "rate": 2.0,
    "workload": "poisson",
    "model": "tiny",
    "config": {"max_running": 8},
}


def request(request_id=0, due_s=0.0, token_times_s=(), status="finished", **more):
    fields = {
        "adapter": None,
        "slo_class": None,
        "prompt_tokens": 4,
        "output_tokens": max(1, len(token_times_s)),
        "finish_reason": "length" if status == "finished" else None,
    }
    return RequestRecord(
        request_id=request_id,
        due_s=due_s,
        token_times_s=tuple(token_times_s),
        status=status,
        **{**fields, **more},
    )


def step(begin_s, end_s, rows=(0, 0, 0, 0), buckets=(0, 0, 0), **more):
    fields = {"measured_ms": 1e3 * (end_s - begin_s), "host_ms": 1.0, **more}
    return StepRecord(begin_s, end_s, *rows, *buckets, **fields)


def train(time_s, target_tokens, job="job", number=1, tokens=None, loss=2.0):
    tokens = target_tokens if tokens is None else tokens
    return TrainRecord(time_s, job, number, tokens, target_tokens, loss)


def run(requests=(), steps=(), training=(), begin_s=0.0, end_s=10.0, until_s=None, **header):
    return RunRecord(
        {**HEADER, **header},
        begin_s,
        end_s,
        tuple(requests),
        tuple(steps),
        tuple(training),
        until_s,
    )
