"""The commands on a tiny random model."""

import dataclasses
import json
import struct

import pytest

from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig, SamplingParams
from flexjax.request import GenerationOutput

FIELDS = {field.name for field in dataclasses.fields(GenerationOutput)}
TRAINING = (
    "--window",
    32,
    "--max-steps",
    4,
    "--r",
    4,
    "--batch-size",
    4,
    "--learning-rate",
    "1e-2",
)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def adapter_dir(model_dir, data, tmp_path_factory):
    from flexjax.cli.main import main

    out = tmp_path_factory.mktemp("adapter") / "out"
    arguments = ("finetune", "--model", model_dir, "--data", data, "--output", out, *TRAINING)
    assert main([str(argument) for argument in arguments]) == 0
    return out


def test_generate_json(flexjax, model_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("third prompt\r\n\nfourth\n", "utf-8")
    status, out, err = flexjax(
        *("generate", "--model", model_dir, "--prompt", "What is 3", "What is", "--json"),
        *("--prompt-file", "prompts.txt", "--max-tokens", 5, "--logprobs", 2, "--ignore-eos"),
    )
    assert (status, err) == (0, "")
    outputs = lines(out)
    assert len(outputs) == 4
    for output in outputs:
        assert set(output) == FIELDS
        assert len(output["token_ids"]) == len(output["logprobs"]) == 5
        assert len(output["logprobs"][0]["top"]) == 2
        usage = output["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + 5
        assert output["ttft_s"] > 0 and len(output["itl_s"]) == 4
        assert output["finish_reason"] == "length"


def test_generate_text_and_chat(flexjax, model_dir):
    options = ("generate", "--model", model_dir, "--max-tokens", 4)
    status, out, _ = flexjax(*options, "--prompt", "What is 3")
    assert status == 0
    assert out.startswith("> What is 3\n") and out.endswith("\n\n")
    _, raw, _ = flexjax(*options, "--prompt", "What", "--json")
    _, chat, _ = flexjax(*options, "--prompt", "What", "--json", "--chat")
    assert lines(chat)[0]["usage"]["prompt_tokens"] > lines(raw)[0]["usage"]["prompt_tokens"]


def test_generate_with_an_adapter(flexjax, model_dir, adapter_dir):
    options = ("generate", "--model", model_dir, "--prompt", "What is 3", "--json")
    options = (*options, "--max-tokens", 4, "--logprobs", 0)
    _, base, _ = flexjax(*options)
    status, adapted, err = flexjax(*options, "--adapter", adapter_dir)
    assert status == 0, err
    assert lines(adapted)[0]["adapter"] == "adapter"
    assert lines(adapted)[0]["logprobs"] != lines(base)[0]["logprobs"]


def test_finetune_json(flexjax, model_dir, data, tmp_path):
    out = tmp_path / "out"
    status, stdout, err = flexjax(
        *("finetune", "--model", model_dir, "--data", data, "--output", out, *TRAINING, "--json"),
        *("--eval-data", data, "--schedule", "constant", "--no-shuffle"),
        *("--adapter-name", "pirate", "--alpha", 8, "--target-modules", "q_proj", "v_proj"),
    )
    assert (status, err) == (0, "")
    *steps, last = lines(stdout)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert {"loss", "tokens", "learning_rate", "grad_norm"} < set(step)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert last["steps"] == 4 and last["adapter"] == "pirate" and last["output"] == str(out)
    assert last["wall_s"] > 0 and last["evals"]
    config = json.loads((out / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}


def test_finetune_goes_on_from_an_adapter(flexjax, model_dir, data, adapter_dir, tmp_path):
    status, out, err = flexjax(
        *("finetune", "--model", model_dir, "--data", data, "--output", tmp_path / "more"),
        *(
            "--init-adapter",
            adapter_dir,
            "--window",
            32,
            "--max-steps",
            1,
            "--batch-size",
            12,
            "--json",
        ),
    )
    assert (status, err) == (0, "")
    config = json.loads((tmp_path / "more" / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == 4


def test_overlong_rows_are_reported(flexjax, model_dir, data, tmp_path):
    status, out, err = flexjax(
        *("finetune", "--model", model_dir, "--data", data, "--output", tmp_path / "out"),
        *("--max-context-len", 128, "--max-seq-len", 31, "--overlong", "truncate", "--json"),
        *TRAINING,
    )
    assert status == 0, err
    assert "truncated to 31 tokens" in err
    assert lines(out)[-1]["steps"] == 4


def assert_picture(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 800 and height > 600


def test_coserve(flexjax, model_dir, data, tmp_path):
    status, stdout, err = flexjax(
        *("coserve", "--model", model_dir, "--data", data, *TRAINING, "--json"),
        *("--num-requests", 10, "--rate", 50, "--max-tokens", 6),
    )
    assert (status, err) == (0, "")
    (summary,) = lines(stdout)
    out = tmp_path / "coserve-out"
    assert summary == json.loads((out / "summary.json").read_text("utf-8"))
    serving, finetuning = summary["serving"], summary["finetuning"]
    assert serving["num_requests"] == serving["num_planned"] == 10
    requests = lines((out / "requests.jsonl").read_text("utf-8"))
    assert len(requests) == 10 and all(r["finish_reason"] for r in requests)
    assert serving["output_tokens"] == sum(len(r["token_ids"]) for r in requests)
    assert serving["output_tokens_per_s"] * serving["duration_s"] == pytest.approx(
        serving["output_tokens"]
    )
    assert serving["ttft_s"]["p99"] >= serving["ttft_s"]["p50"] > 0
    assert serving["itl_s"]["count"] == serving["output_tokens"] - 10
    steps = lines((out / "steps.jsonl").read_text("utf-8"))
    assert finetuning["steps"] == len(steps) == 4
    assert finetuning["tokens"] == sum(step["tokens"] for step in steps)
    assert finetuning["target_tokens"] < finetuning["tokens"]
    assert finetuning["last_loss"] < finetuning["first_loss"]
    assert summary["engine_steps"]["both"] > 0
    assert len(summary["answers"]) == 6
    assert all(set(answer) == {"prompt", "before", "after"} for answer in summary["answers"])
    assert_picture(out / "coserve.png")
    status, answer, err = flexjax(
        *("generate", "--model", model_dir, "--adapter", out / "adapter", "--prompt", "What"),
        *("--max-tokens", 2, "--json"),
    )
    assert status == 0, err


def test_coserve_follows_a_trace(flexjax, model_dir, data, tmp_path):
    trace = tmp_path / "trace.csv"
    rows = [(7.0, 400, 100), (7.1, 40, 10), (7.2, 100, 50), (9.0, 1, 1)]
    text = "".join(f"{time},{prompt},{output}\n" for time, prompt, output in rows)
    trace.write_text("arrival_s,context_tokens,generated_tokens\n" + text, "utf-8")
    options = ("coserve", "--model", model_dir, "--data", data, *TRAINING)
    options = (*options, "--trace", trace, "--time-scale", "0.5")
    status, out, err = flexjax(*options, "--num-requests", 3)
    assert status == 0, err
    for part in ("Lengths scaled to the context", "none cut", "3 of 3 requests", "before", "after"):
        assert part in out
    requests = lines((tmp_path / "coserve-out" / "requests.jsonl").read_text("utf-8"))
    assert [round(r["due_s"], 3) for r in requests] == [0, 0.05, 0.1]
    assert [r["usage"]["prompt_tokens"] for r in requests] == [96, 10, 24]
    assert [r["usage"]["completion_tokens"] for r in requests] == [32, 3, 16]
    assert all(r["ttft_s"] is not None for r in requests)


def test_coserve_with_given_prompts_and_seeded_draws(flexjax, model_dir, data, tmp_path):
    options = ("coserve", "--model", model_dir, "--data", data, *TRAINING, "--num-requests", 3)
    options = (
        *options,
        "--prompt",
        "What is 3",
        "Hello",
        "--raw",
        "--temperature",
        1,
        "--rate",
        50,
    )
    texts = []
    for _ in range(2):
        status, _, err = flexjax(*options, "--max-tokens", 5, "--json")
        assert status == 0, err
        requests = lines((tmp_path / "coserve-out" / "requests.jsonl").read_text("utf-8"))
        assert [r["prompt"] for r in requests] == ["What is 3", "Hello", "What is 3"]
        texts.append([r["text"] for r in requests])
    assert texts[0] == texts[1]


def test_defaults_are_those_of_the_configuration():
    from flexjax.cli.options import CoserveOptions, FinetuneOptions, GenerateOptions

    renamed = {"r": "rank", "use_rslora": "rslora"}
    differs = {"adapter", "max_grad_norm", "target_modules", "stop", "seed", "max_tokens", "epochs"}
    seen = 0
    for options in (GenerateOptions, FinetuneOptions, CoserveOptions):
        defaults = {field.name: field.default for field in dataclasses.fields(options)}
        for config in (SamplingParams, EngineConfig, FinetuneConfig, LoraConfig):
            for field in dataclasses.fields(config):
                name = renamed.get(field.name, field.name)
                if name in defaults and name not in differs:
                    assert defaults[name] == field.default, name
                    seen += 1
    assert seen > 40
