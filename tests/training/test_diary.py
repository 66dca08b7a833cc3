"""runtime/training/diary.py and runtime/inference/short_answers.py: events and samples of a run."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref

import pytest
import torch

import train
from model import LLM
from runtime.base.ranks import ONE_PROCESS
from runtime.data.chat import prompt_ids, with_chat
from runtime.data.tokenizers import load_tokenizer
from runtime.inference import short_answers as module
from runtime.inference.short_answers import short_answers
from runtime.training import rollback
from runtime.training.curves import read_run
from runtime.training.diary import Diary
from tests.builders import tiny_config
from tests.builders_runs import Run, assert_same, poison, prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"))


def lines(run: Run, name: str) -> list[dict]:
    return [json.loads(line) for line in (run.graph_dir / name).read_text().splitlines()]


def kinds(run: Run) -> list[tuple[str, int]]:
    """Events of these runs, whose experts are drawn at random, without those of experts."""
    events = [(event["kind"], event["step"]) for event in lines(run, "events.jsonl")]
    return [event for event in events if event[0] not in ("starved", "balanced")]


# ------------------------------------------------------------------------------------------- events
def test_a_run_and_its_resume_are_events(data, tmp_path):
    run, before = Run(data, tmp_path), time.time()
    assert not run("--max_steps", "4", "--save_interval", "2")
    assert not run("--max_steps", "6", "--resume", fresh=False)
    assert kinds(run) == [
        ("start", 0),
        ("save", 2),
        ("save", 4),
        ("done", 4),
        ("resume", 4),
        ("save", 6),
        ("done", 6),
    ]
    events = lines(run, "events.jsonl")
    assert {event["run_id"] for event in events} == {run.records()[0]["run_id"]}
    assert before - 1 <= events[0]["time"] <= events[-1]["time"] <= time.time() + 1
    assert "the best so far" in events[1]["text"]
    assert read_run(run.graph_dir).events == events


def test_a_stop_is_an_event(data, tmp_path, monkeypatch):
    run = Run(data, tmp_path)
    monkeypatch.setattr(train.StopRequest, "requested", lambda self: True)
    assert run("--max_steps", "9")
    assert kinds(run) == [("start", 0), ("save", 1), ("stop", 1)]


def test_skipped_steps_are_an_event_each_time(data, tmp_path, monkeypatch):
    """They were printed once, at the end."""
    poison(monkeypatch, range(4, 6))
    run = Run(data, tmp_path)
    assert not run("--max_steps", "8")
    (skipped,) = [e for e in lines(run, "events.jsonl") if e["kind"] == "skipped"]
    assert skipped["step"] == 4 and skipped["text"] == "1 step was skipped: 1 not finite"


def test_skipped_steps_that_no_record_tells_are_an_event_before_the_run_ends(
    data, tmp_path, monkeypatch
):
    """A run gave up between two records, and no event said how many of its steps were spikes."""
    monkeypatch.setattr(train, "MOST_SKIPPED_IN_A_ROW", 2)
    # Two micro-batches a step: step 62 is a spike, those after it are not finite.
    poison(monkeypatch, range(124, 125), lambda loss: 50 * loss)
    poison(monkeypatch, range(126, 200))
    run = Run(data, tmp_path)
    flags = ["--max_steps", "90", "--log_interval", "50", "--spike_sigmas", "6"]
    with pytest.raises(train.TrainingDiverged):
        run(*flags, "--save_interval", "60", "--max_rollbacks", "0")
    *_, skipped, diverged = lines(run, "events.jsonl")
    assert (skipped["kind"], diverged["kind"]) == ("skipped", "diverged")
    assert skipped["text"] == "4 steps were skipped: 3 not finite, 1 spike of the loss"
    assert skipped["step"] == diverged["step"] == 66


def test_skipped_steps_are_an_event_also_when_a_signal_comes_first(data, tmp_path, monkeypatch):
    """The resumed run begins to count at its checkpoint: nothing would have told of them."""
    poison(monkeypatch, range(0, 1))
    monkeypatch.setattr(train.StopRequest, "requested", lambda self: True)
    run = Run(data, tmp_path)
    assert run("--max_steps", "9", "--log_interval", "5")
    assert kinds(run)[-2:] == [("skipped", 1), ("stop", 1)]


def test_an_event_tells_a_spike_from_what_is_not_finite(data, tmp_path, monkeypatch, capsys):
    """A run with --spike_sigmas said "not finite, or a spike of the loss" of each skipped step.

    One is a matter of the data, the other of the numbers: what to do differs. The counts survive a
    resume.
    """
    # Two micro-batches a step: step 62 is a spike, steps 64 and 65 are not finite.
    losses = {124: lambda loss: 50 * loss, 128: None, 130: None}
    for first, change in losses.items():
        poison(monkeypatch, range(first, first + 1), *([change] if change else []))
    run = Run(data, tmp_path)
    flags = ["--max_steps", "66", "--log_interval", "2", "--spike_sigmas", "6"]
    assert not run(*flags, "--save_interval", "64")
    told = [(e["step"], e["text"]) for e in lines(run, "events.jsonl") if e["kind"] == "skipped"]
    assert told == [
        (64, "1 step was skipped: 1 spike of the loss"),
        (66, "2 steps were skipped: 2 not finite"),
    ]
    assert "3 steps were skipped: 2 not finite, 1 spike of the loss\n" in capsys.readouterr().out
    assert run.final().run["skipped_steps"] == 3 and run.final().run["skipped_spikes"] == 1


def test_a_rollback_is_an_event(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MOST_SKIPPED_IN_A_ROW", 2)
    poison(monkeypatch, range(16, 100))
    run = Run(data, tmp_path)
    with pytest.raises(train.TrainingDiverged):
        run("--max_steps", "40", "--save_interval", "4", "--max_rollbacks", "1")
    told = [event for event in kinds(run) if event[0] not in ("save", "skipped")]
    assert told[0] == ("start", 0) and [kind for kind, _ in told] == [
        "start",
        "diverged",
        "rollback",
        "resume",
        "diverged",
    ]
    assert told[2] == ("rollback", 8) and told[3] == ("resume", 8)


def test_a_rollback_holds_one_model(data, tmp_path, monkeypatch):
    """The reporter knows the model for its samples: two may not fit a device."""
    monkeypatch.setattr(train, "MOST_SKIPPED_IN_A_ROW", 2)
    poison(monkeypatch, range(16, 100))
    made, alive, real = [], [], train.set_up

    def set_up(*given):
        model, *more = real(*given)
        made.append(weakref.ref(model))
        return model, *more

    def release(device):
        gc.collect()
        alive.append(sum(model() is not None for model in made))

    monkeypatch.setattr(train, "set_up", set_up)
    monkeypatch.setattr(rollback, "release_memory", release)
    with pytest.raises(train.TrainingDiverged):
        Run(data, tmp_path)("--max_steps", "40", "--save_interval", "4", "--max_rollbacks", "1")
    assert len(made) == 2 and alive == [0, 0]


def test_starved_experts_are_an_event(data, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.training.reporter.HEALTHY_LOAD", (0.999, 1.001))
    run = Run(data, tmp_path)
    assert not run("--max_steps", "6", "--warmup_steps", "1")
    (starved,) = [e for e in lines(run, "events.jsonl") if e["kind"] == "starved"]
    assert starved["text"].split(", ")[0].endswith("of their fair share")


def test_a_torn_line_is_ended_first(tmp_path):
    """The line after a kill would be glued to it, and both lost."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1, "ki')
    mine = Diary(tmp_path, "me", pytest.fail)
    mine.event(2, "save", "a")
    mine.event(3, "save", "b")
    torn, *whole = path.read_bytes().splitlines()
    assert torn == b'{"step": 1, "ki' and [json.loads(line)["step"] for line in whole] == [2, 3]


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path):
    said = []
    (tmp_path / "file").touch()
    mine = Diary(tmp_path / "file", "me", said.append)
    mine.event(1, "save", "a")
    mine.event(2, "save", "b")
    (line,) = said
    assert line.startswith("no more events.jsonl: ") and line.endswith("(training continues)")


def test_an_event_of_no_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        Diary(tmp_path, "me", print).event(1, "party", "")


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Diary(None, "me", pytest.fail).event(1, "save", "a")
    assert list(tmp_path.iterdir()) == []


def test_memory_is_in_the_training_records(data, tmp_path):
    run = Run(data, tmp_path)
    assert not run("--max_steps", "4")
    memory = [r["memory_bytes"] for r in run.records() if r["kind"] == "train"]
    # PyTorch alone holds more than this, and a peak never falls.
    assert 50 << 20 < memory[0] <= memory[1]


# ------------------------------------------------------------------------------------------ samples
def test_samples_are_written_at_each_validation(data, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("tom saw\n\na red ball\n")
    run, plain = Run(data, tmp_path / "with"), Run(data, tmp_path / "without")
    assert not run("--max_steps", "8", "--sample_prompts", prompts)
    samples = lines(run, "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (step, prompt) for step in (4, 8) for prompt in ("tom saw", "a red ball")
    ]
    assert all(isinstance(s["text"], str) and len(s["text"]) <= 64 for s in samples)
    assert samples[0]["text"] != samples[2]["text"]
    assert read_run(run.graph_dir).samples == samples
    # A sample changes nothing of the run.
    assert not plain("--max_steps", "8")
    assert_same(run.final(), plain.final())
    assert not (plain.graph_dir / "samples.jsonl").exists()
    # Nor does its absence end a resume.
    assert not run("--max_steps", "9", "--resume", "--sample_prompts", "", fresh=False)


def test_samples_draw_no_number_of_the_run_and_restore_its_mode(tmp_path):
    """They have a generator of their own; the global one is dropout's and the next batch's.

    A validation may find the model in either mode, and an error may end an answer.
    """
    tokenizer = load_tokenizer("byte")
    (tmp_path / "p.txt").write_text("hi\nho")
    answers = short_answers(
        str(tmp_path / "p.txt"), tokenizer.to_state(), False, torch.float32, ONE_PROCESS
    )
    model = LLM(tiny_config(vocabulary_size=tokenizer.vocabulary_size, dropout=0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = []
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(7)
        told = [answers(model) for _ in range(2)]
        states.append(torch.get_rng_state())
        # In eval mode: dropout would draw, and no two answers would agree.
        assert told[0] == told[1] and model.training is mode
        assert all(module.training is mode for module in model.modules())
    torch.manual_seed(7)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    model.train()
    with pytest.raises(ValueError, match="finite"):
        answers(model)
    assert model.training


def test_a_run_with_dropout_is_the_same_with_samples_and_without(data, tmp_path):
    """Bit for bit, weights and optimizer, also when it was resumed after a sample."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("tom saw")
    flags = ["--max_steps", "8", "--dropout", "0.2", "--schedule", "constant"]
    sampled, plain = Run(data, tmp_path / "with"), Run(data, tmp_path / "without")
    assert not sampled(*flags, "--max_steps", "4", "--sample_prompts", prompts)
    assert not sampled("--max_steps", "8", "--resume", fresh=False)
    assert not plain(*flags)
    assert_same(sampled.final(), plain.final())
    assert len(lines(sampled, "samples.jsonl")) == 2


def test_a_resumed_run_makes_the_same_samples(data, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("tom")
    whole, parts = Run(data, tmp_path / "whole"), Run(data, tmp_path / "parts")
    assert not whole("--max_steps", "8", "--sample_prompts", prompts, "--schedule", "constant")
    assert not parts("--max_steps", "4", "--sample_prompts", prompts, "--schedule", "constant")
    assert not parts("--max_steps", "8", "--resume", fresh=False)
    texts = [[s["text"] for s in lines(run, "samples.jsonl")] for run in (whole, parts)]
    assert texts[0] == texts[1] and len(texts[0]) == 2


def test_a_sample_is_what_the_model_draws(tmp_path, monkeypatch):
    """The start token first, one pass a token, the text up to its end."""
    tokenizer = load_tokenizer("byte")
    (tmp_path / "p.txt").write_text("hi")
    answers = short_answers(
        str(tmp_path / "p.txt"), tokenizer.to_state(), False, torch.float32, ONE_PROCESS
    )
    seen = []

    def drawn(model, ids_BT, tokens, **settings):
        seen.append((ids_BT.tolist(), tokens, settings["temperature"]))
        made = [*b"ok", tokenizer.end_of_text_id, *b"no"]
        yield from (torch.tensor([i]) for i in made)

    monkeypatch.setattr(module, "generate", drawn)
    model = LLM(tiny_config(vocabulary_size=tokenizer.vocabulary_size))
    assert answers(model) == [("hi", "ok")]
    assert seen == [([[tokenizer.start_id, *b"hi"]], module.MOST_NEW_TOKENS, module.TEMPERATURE)]


def test_a_chat_model_answers_its_prompts_as_messages(tmp_path, monkeypatch):
    tokenizer = with_chat(load_tokenizer("byte"))
    (tmp_path / "p.txt").write_text("hi")
    given = (str(tmp_path / "p.txt"), tokenizer.to_state(), True, torch.float32, ONE_PROCESS)
    seen = []

    def drawn(model, ids_BT, tokens, **settings):
        seen.append(ids_BT.tolist())
        yield from (torch.tensor([i]) for i in [*b"yes", tokenizer.chat.end, *b"no"])

    monkeypatch.setattr(module, "generate", drawn)
    model = LLM(tiny_config(vocabulary_size=tokenizer.vocabulary_size))
    assert short_answers(*given)(model) == [("hi", "yes")]
    assert seen == [[prompt_ids([{"role": "user", "content": "hi"}], tokenizer)]]


def test_a_compiled_model_is_not_compiled_again_for_samples(tmp_path):
    """It would be for each length, and a pass with a cache is no full graph."""
    (tmp_path / "p.txt").write_text("hi")
    tokenizer = load_tokenizer("byte")
    given = (str(tmp_path / "p.txt"), tokenizer.to_state(), False, torch.float32, ONE_PROCESS)
    model = LLM(tiny_config(vocabulary_size=tokenizer.vocabulary_size)).train()
    plain = short_answers(*given)(model)
    model.compile_in_place()
    counters = torch._dynamo.utils.counters
    before = dict(counters["frames"])
    assert short_answers(*given)(model) == plain and model.training
    assert dict(counters["frames"]) == before


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "holds no prompt"),
        ("a\n" * 17, "holds 17 prompts, and at most 16"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_of_prompts_is_one_line_before_the_run(data, tmp_path, text, words):
    prompts = tmp_path / "p.txt"
    if text is not None:
        prompts.write_text(text)
    run = Run(data, tmp_path)
    with pytest.raises(ValueError, match=words):
        run("--max_steps", "4", "--sample_prompts", prompts)
    assert not run.ckpt_dir.exists()


def test_data_without_a_tokenizer_has_no_samples(tmp_path):
    with pytest.raises(ValueError, match="needs text"):
        short_answers("p.txt", None, False, torch.float32, ONE_PROCESS)
    assert short_answers("", None, False, torch.float32, ONE_PROCESS) is None


def test_a_model_that_is_not_finite_has_no_samples_and_goes_on(data, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("tom")

    def broken(*args, **more):
        raise ValueError("the model's logits are not finite")
        yield

    monkeypatch.setattr(module, "generate", broken)
    run = Run(data, tmp_path)
    assert not run("--max_steps", "4", "--sample_prompts", prompts)
    assert "no samples: the model's logits are not finite" in capsys.readouterr().out
    assert math.isfinite(run.records()[-1]["loss"])
