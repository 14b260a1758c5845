"""The shipped tiny model, the world it was trained on, and the script that trains it."""

import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flexjax.builtin_models import builtin_model_config
from flexjax.data import demo_dataset, demo_prompts, tiny_model_dir
from flexjax.io.hf_weights import load_decoder
from flexjax.io.tokenizer import Tokenizer
from flexjax.model_config import load_model_config

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import pretrain_tiny  # noqa: E402
import tiny_world  # noqa: E402
from tiny_tokenizer import ChatCodec  # noqa: E402


@pytest.fixture(scope="module")
def shipped():
    decoder = load_decoder(tiny_model_dir())
    return decoder.config, decoder.weights(), ChatCodec.load(tiny_model_dir())


@pytest.fixture(scope="module")
def world():
    return tiny_world.World(0)


def test_shipped_files_are_small_and_complete():
    files = {path.name: path.stat().st_size for path in tiny_model_dir().iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "pretrain_log.json",
        "README.md",
    } <= set(files)
    assert sum(files.values()) < 12e6


def test_builtin_tiny_is_the_shipped_architecture():
    config = load_model_config(tiny_model_dir())
    assert config == builtin_model_config("tiny")
    tokenizer = Tokenizer.from_pretrained(tiny_model_dir())
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.eos_token_id == config.eos_token_ids[0]


def test_tokenizer_encodes_any_text():
    tokenizer = Tokenizer.from_pretrained(tiny_model_dir())
    text = "Grüße, 東京! \t{x: 1}\n<b>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_writes_what_the_model_was_trained_on(shipped, world):
    _, _, codec = shipped
    tokenizer = Tokenizer.from_pretrained(tiny_model_dir())
    writer = tiny_world.Writer(world, 5)
    for messages in (writer.dialogue() for _ in range(20)):
        trained, _ = codec.encode_document(messages)
        ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
        assert [*ids, codec.endoftext_id] == trained
    question = [{"role": "user", "content": "Who is the baker?"}]
    ids = tokenizer.encode_chat(question, add_generation_prompt=True)
    assert ids == codec.encode_prompt("Who is the baker?")


def test_held_out_questions_are_answered(shipped, world):
    items = world.held_out(192)
    found = pretrain_tiny.exact_match(*shipped, items)
    assert pretrain_tiny.summarize(found)["exact_match"] >= 0.9


def test_greedy_decoding_answers_in_sentences(shipped, world):
    items = world.held_out(20, seed=2)
    questions = [question for _, question, _ in items]
    answers = pretrain_tiny.greedy_answers(*shipped, questions, max_tokens=20)
    hits = [answer == expected for answer, (_, _, expected) in zip(answers, items, strict=True)]
    assert np.mean(hits) >= 0.85, list(zip(questions, answers, strict=True))


def test_plain_text_goes_on(shipped, world):
    prompts = ["The baker of Saltmere", "After Monday comes"]
    answers = pretrain_tiny.greedy_answers(*shipped, prompts, raw=True, max_tokens=8)
    baker = next(person.name for person in world.people if person.trade == "baker")
    assert answers[0].startswith(f" is {baker}")
    assert answers[1].startswith(" Tuesday.")


def test_late_positions_are_trained(shipped, world):
    config, weights, codec = shipped
    documents = tiny_world.Writer(world, 77).documents(chat_share=1.0)
    tokens, parts = pretrain_tiny.Packer(documents, codec).batch(2, config.max_position)
    logits = jax.jit(lambda w, t: pretrain_tiny.decoder_logits(config, w, t))
    hits = np.asarray(logits(weights, tokens[:, :-1])).argmax(-1) == tokens[:, 1:]
    answers = parts[:, 1:] == 1.0
    assert hits[:, 768:][answers[:, 768:]].mean() > 0.9


def _text_hash(seed):
    world = tiny_world.World(seed)
    documents = tiny_world.Writer(world, seed).documents()
    text = json.dumps(list(itertools.islice(documents, 500)))
    return hashlib.sha256(text.encode()).hexdigest()


def test_generator_is_deterministic():
    assert _text_hash(0) == _text_hash(0)
    assert _text_hash(0) != _text_hash(1)


def test_held_out_questions_are_never_written(world):
    held_out = {question for _, question, _ in world.held_out(10_000)}
    assert len(held_out) > 300
    documents = tiny_world.Writer(world, 3).documents()
    for document in itertools.islice(documents, 5000):
        if not isinstance(document, str):
            assert not held_out & {message["content"] for message in document}


def test_no_question_has_two_answers(world):
    answers = {}
    for fact in world.facts:
        for question in fact.questions:
            assert answers.setdefault(question, fact.answer) == fact.answer, question


def test_demo_files_are_what_the_generator_writes(world):
    rows = [json.loads(line) for line in demo_dataset().read_text("utf-8").splitlines()]
    assert rows == tiny_world.demo_rows(world, 300, seed=100)
    assert all(row["messages"][1]["content"].startswith("Arr! ") for row in rows)
    assert demo_prompts() == tiny_world.demo_prompts(world, 40)


def test_training_lowers_the_loss(shipped, world):
    _, _, codec = shipped
    config = dataclasses.replace(
        builtin_model_config("tiny"), hidden_size=32, intermediate_size=64, num_layers=1
    )
    packer = pretrain_tiny.Packer(tiny_world.Writer(world, 0).documents(), codec)
    settings = pretrain_tiny.TrainSettings(
        steps=30, tokens_per_step=256, row_len=32, long_row_len=64, learning_rate=1e-2
    )
    _, log = pretrain_tiny.train(config, packer, settings, seed=0)
    assert log["tokens"] == 30 * 256
    assert np.mean(log["losses"][-5:]) < log["losses"][0] - 1.0


def test_script_writes_a_model(tmp_path):
    command = [sys.executable, str(SCRIPTS / "pretrain_tiny.py"), "--output", str(tmp_path)]
    command += ["--steps", "3", "--eval-questions", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPTS.parent)
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / "pretrain_log.json").read_text("utf-8"))
    assert log["steps"] == 3
    assert load_decoder(tmp_path).config == builtin_model_config("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tiny_model_dir() / name).read_bytes()
