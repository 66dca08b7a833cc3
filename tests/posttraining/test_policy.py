"""runtime/posttraining/policy.py: what a step of reinforcement learning does to the weights."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import threading
import weakref

import pytest
import torch

import train
from runtime.checkpoint.changed import with_config
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.posttraining import policy
from runtime.posttraining.policy import Grpo, GrpoConfig
from runtime.posttraining.rollouts import Sampler
from scripts import grpo
from tests.builders_inference import MODELS
from tests.builders_posttraining import QUICK, in_folder, tiny_base
from tests.numeric import before_ties

# Half of the answers earn something, by chance.
PARITY = """
def score(messages, text, ended, number):
    return {"low": float(sum(map(ord, text)) % 2), "long": 0.25 * (len(text) > number)}
"""


def files(folder, body: str = PARITY, count: int = 12) -> dict:
    """Write prompts and a reward; return the settings that name them."""
    rows = [json.dumps({"prompt": f"say {i}", "number": i % 3}) for i in range(count)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "mine.py").write_text(body, encoding="utf-8")
    return {"data": (str(folder / "prompts.jsonl"),), "reward": f"{folder}/mine.py:score"}


def task_and_model(folder, dtype=torch.float32, body=PARITY, base=None, **settings):
    """Return a task, its settings, and a model of random weights, large enough to matter."""
    path = tiny_base(folder / "base", aux_loss_coef=0.0, z_loss_coef=0.0, **(base or {}))
    source = read_checkpoint(path)
    values = dict(
        init_from=str(path), group_size=4, batch_size=4, max_new_tokens=6, score_prompts=0
    )
    values |= dict(max_steps=3, warmup_steps=1, lr=1e-2, min_lr=1e-2, dtype="float32")
    config = GrpoConfig(**(values | files(folder, body) | settings))
    task = Grpo(config, source)
    whole = with_config(source, task.adapted(source.model_config, source), task.new_ids(source))
    model = build_model(whole, torch.device("cpu")).to(dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    return task, config, model


def gradients(task, model, config) -> dict[str, torch.Tensor]:
    """Return the gradient of the first step, as train_step adds it up."""
    model.zero_grad(set_to_none=True)
    task.restore({})
    task.started(model)
    loader = task.loader(model.config, config)
    batches = [loader.batch(i * config.batch_size) for i in range(config.grad_accum)]
    divisor = sum(task.count(batch) for batch in batches)
    for batch in batches:
        train.forward_backward(model, task, batch, torch.float32, divisor, config.grad_accum)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(ours: dict, expected: dict) -> None:
    size = max(grad.abs().max() for grad in expected.values())
    assert size > 0
    for name, grad in expected.items():
        assert (ours[name] - grad).abs().max() <= 1e-12 * size, name


# ----------------------------------------------------------------------------------- the gradient
@pytest.mark.parametrize("std", [False, True])
def test_the_gradient_is_that_of_reinforce(tmp_path, std):
    """-A log p of each answer read alone, over all tokens; p without the ids that are banned."""
    task, config, model = task_and_model(tmp_path, torch.float64, advantage_std=std)
    ours = gradients(task, model, config)
    groups = task.roll(range(4), config)
    assert {group.has_signal for group in groups} >= {True}
    model.zero_grad(set_to_none=True)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        rewards = torch.tensor([earned.total for earned in group.earned], dtype=torch.float64)
        advantages = rewards - rewards.mean()
        if std:
            advantages = advantages / advantages.square().mean().sqrt().clamp(min=1e-300)
        for answer, advantage in zip(group.answers, advantages, strict=True):
            prompt = group.asked.ids
            logits_TV = model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1]
            masked_TV = logits_TV.index_fill(1, torch.tensor(task.banned_ids), -torch.inf)
            log_probs_T = masked_TV.log_softmax(dim=1)[range(len(answer.ids)), answer.ids]
            total = total - advantage * log_probs_T.sum()
            tokens += len(answer.ids)
    (total / tokens).backward()
    assert_equal_gradients(ours, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"updates_per_rollout": 2},
        {"updates_per_rollout": 2, "ratio": "sequence"},
        {"kl_coef": 0.1},
    ],
    ids=["plain", "ratio", "sequence", "kl"],
)
def test_any_split_into_micro_batches_has_the_same_gradient(tmp_path, settings):
    task, config, model = task_and_model(tmp_path, torch.float64, batch_size=8, **settings)
    if settings.get("kl_coef"):
        task.started(model)
        with torch.no_grad():
            model.out_head.weight.add_(0.1)
    expected = gradients(task, model, config)
    for size in (4, 2, 1):
        split = dataclasses.replace(config, batch_size=size, grad_accum=8 // size)
        assert_equal_gradients(gradients(task, model, split), expected)


def test_answers_without_advantage_change_nothing_but_the_divisor(tmp_path, monkeypatch):
    """They are left out of the pass, and their tokens count."""
    # All earn the same on a third of the prompts.
    body = PARITY.replace("% 2)", "% 2) * number").replace("> number", "> 99")
    task, config, model = task_and_model(tmp_path, torch.float64, body, batch_size=8)
    ours = gradients(task, model, config)
    batch = task.loader(model.config, config).batch(0)
    groups = task.roll(range(8), config)
    assert not all(advantage for group in groups for advantage in group.advantages)
    assert task.count(batch) == sum(len(a.ids) for group in groups for a in group.answers)
    assert len(batch[3]) < task.count(batch)
    pack = policy.pack_groups
    monkeypatch.setattr(
        policy, "pack_groups", lambda groups, tokens, share, keep: pack(groups, tokens, share, True)
    )
    whole = task.loader(model.config, config).batch(0)
    assert len(whole[3]) == task.count(whole) == task.count(batch)
    assert_equal_gradients(gradients(task, model, config), ours)


def test_a_learned_attention_bias_has_one_answer_a_row(tmp_path):
    task, config, model = task_and_model(tmp_path, base={"use_attention_bias": True})
    task.started(model)
    ids_BT, _, _, _, segments_M = task.loader(model.config, config).batch(0)[:5]
    assert len(ids_BT) == segments_M.max() + 1 and ids_BT.shape[1] < task.context


# -------------------------------------------------------------------- the sampler is the trainer
@pytest.mark.parametrize(
    ("changes", "rank"),
    [*((changes, 0) for changes in MODELS.values()), (MODELS["gpt-oss"], 4)],
    ids=[*MODELS, "lora"],
)
def test_the_trainers_log_probs_are_the_samplers(tmp_path, changes, rank):
    """In each step, so also after updates, in packed rows, with ids that are never drawn.

    Adapters are merged for the sampler, and the trainer has them apart.
    """
    lora = {"lora_rank": rank} if rank else {}
    task, config, model = task_and_model(tmp_path, base=changes, lr=3e-2, **lora)
    task.prepare(model)
    gaps, own = [], task.loss

    def loss(model, batch):
        with torch.no_grad():
            ours_M = task.forward(model, batch[:5]).log_probs
            logits_BTV = model(batch[0], starts_BT=batch[2]).logits
            sure_M = before_ties(model, batch[0]).flatten()[batch[3]]
        gaps.append(((ours_M - batch[6]).abs()[sure_M] / logits_BTV.abs().max()).max().item())
        return own(model, batch)

    task.loss = loss
    train.fit(model, task, config)
    assert len(gaps) == 3 and max(gaps) <= 1e-5


def test_ids_that_stand_for_no_text_are_never_drawn(tmp_path):
    """Nor trained: the softmax leaves them out, and their bias's gradient is 0."""
    task, config, model = task_and_model(tmp_path, base={"head_bias": True})
    chat, end = task.tokenizer.chat, task.tokenizer.end_of_text_id
    assert task.stop_ids == [chat.end]
    assert {chat.start, chat.message, end} <= set(task.banned_ids)
    grads = gradients(task, model, config)
    assert (grads["out_head.bias"][task.banned_ids] == 0).all()
    assert (grads["out_head.bias"] != 0).sum() == len(grads["out_head.bias"]) - len(task.banned_ids)


# ------------------------------------------------------------------------------------- learning
def test_a_bandit_learns_its_best_arm(tmp_path):
    """Three ids with rewards 0, 0.5 and 1: in 40 steps nearly all answers are the third."""
    reward = """
def score(messages, text, ended, number):
    # The check before the first step tries other texts.
    return {"a": 0.0, "b": 0.5, "c": 1.0}.get(text, 0.0)
"""
    task, config, model = task_and_model(
        tmp_path, body=reward, max_new_tokens=1, max_steps=40, group_size=8, log_interval=1
    )
    arms = [task.tokenizer.encode(text)[0] for text in "abc"]
    task.stop_ids = arms
    task.text = task.tokenizer.decode
    task.banned_ids = [i for i in range(model.config.vocabulary_size) if i not in arms]
    means = []
    train.fit(
        model, task, config, train.Hooks(on_log=lambda record: means.append(record["metrics"]))
    )
    assert means[0]["reward"] < 0.75 and means[-1]["reward"] > 0.95


def test_each_step_samples_with_the_weights_of_then(tmp_path, monkeypatch):
    """A thread that fetches ahead would sample with older weights, and while they are written."""
    task, config, model = task_and_model(tmp_path)
    events, sample = [], Sampler.sample

    def watched(self, *args):
        events.append(("sample", threading.current_thread() is threading.main_thread()))
        return sample(self, *args)

    monkeypatch.setattr(Sampler, "sample", watched)
    hooks = train.Hooks(on_step=lambda: events.append(("step", True)))
    train.fit(model, task, config, hooks)
    assert events == [("sample", True), ("step", True)] * 3


def test_a_step_without_signal_changes_nothing_and_is_said(tmp_path, capsys):
    """All rewards equal: the run goes on, and no moment or weight moves."""
    reward = "def score(messages, text, ended, number):\n    return 1.0\n"
    task, config, model = task_and_model(tmp_path, body=reward)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = train.fit(model, task, config)
    assert state.step == 3 and not state.skipped_steps and task.idle_steps == 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "earned the same: no update, 3 such steps so far" in capsys.readouterr().out


def test_what_nobody_earned_is_named(tmp_path, capsys):
    reward = PARITY.replace("0.25 * (len(text) > number)", "0.0")
    task, config, model = task_and_model(tmp_path, body=reward, log_interval=3)
    records = []
    train.fit(model, task, config, train.Hooks(on_log=records.append))
    output = capsys.readouterr().out
    assert "long: 0 of 48 answers earned it, no gradient" in output and "low: 0" not in output
    (record,) = [record for record in records if record["kind"] == "train"]
    shown = record["metrics"]
    assert shown["long"] == 0 < shown["low"] < 1 and shown["reward"] == pytest.approx(shown["low"])
    assert 0 < shown["with_signal"] <= 1 and 0 < shown["answer_tokens"] <= 6
    assert 0 <= shown["sampler_gap"] < 1e-4 and shown["entropy"] > 0
    assert record["is_likelihood"] is False


def test_groups_without_signal_are_replaced(tmp_path):
    """By answers to other prompts, so many times."""
    reward = """
def score(messages, text, ended, number):
    return 0.0 if number else float(sum(map(ord, text)) % 2)
"""
    task, config, model = task_and_model(tmp_path, body=reward)
    task.started(model)
    task.loader(model.config, config)
    plain = task.roll(range(8), config)
    task.config = dataclasses.replace(task.config, refill=6)
    filled = task.roll(range(8), config)
    assert sum(group.has_signal for group in plain) < sum(group.has_signal for group in filled)
    for group, other in zip(plain, filled, strict=True):
        assert group.number == other.number if group.has_signal else group.number != other.number


def test_expert_biases_do_not_move(tmp_path):
    task, config, model = task_and_model(tmp_path, base={"router_bias_rate": 0.1})
    train.fit(model, task, config)
    assert all((block.moe.router.selection_bias == 0).all() for block in model.layers)


# ------------------------------------------------------------------- several updates per rollout
def test_answers_serve_several_updates(tmp_path, monkeypatch):
    """The ratio is 1 in the first, whose weights the old log-probabilities are of, then not."""
    task, config, model = task_and_model(tmp_path, updates_per_rollout=3, max_steps=6)
    batches, own = [], task.loss
    ratios = []

    def loss(model, batch):
        batches.append(batch)
        with torch.no_grad():
            ratios.append((task.forward(model, batch[:5]).log_probs - batch[7]).abs().max().item())
        return own(model, batch)

    task.loss = loss
    train.fit(model, task, config)
    for first in (0, 3):
        assert ratios[first] == 0 and min(ratios[first + 1 : first + 3]) > 1e-4
        for other in batches[first + 1 : first + 3]:
            pairs = zip(batches[first][:-1], other[:-1], strict=True)
            assert all(torch.equal(one, two) for one, two in pairs)
    assert not torch.equal(batches[0][0], batches[3][0])


def test_a_rollout_can_be_resumed_in_other_micro_batches(tmp_path, monkeypatch):
    """The answers are those that were saved, whose old weights are gone: none is sampled again."""
    task, config, model = task_and_model(tmp_path, updates_per_rollout=2)
    task.started(model)
    batch = task.loader(model.config, config).batch(0)
    # As a checkpoint's file holds it.
    state = json.loads(json.dumps(task.state()))
    monkeypatch.setattr(Sampler, "sample", None)
    task.restore(state)
    split = dataclasses.replace(config, batch_size=2, grad_accum=2)
    loader = task.loader(model.config, split)
    parts = [loader.batch(4), loader.batch(6)]
    for of_tokens in (6, 7):
        ours = torch.cat([part[of_tokens] for part in parts])
        assert torch.equal(ours.sort().values, batch[of_tokens].sort().values)
    assert sum(map(task.count, parts)) == task.count(batch)
    # Nothing is left for a further update.
    assert "groups" not in task.state()


# ------------------------------------------------------------------------------- a run as a user's
def run(folder, *flags: object, base=None) -> int:
    start = ["--init_from", str(base)] if base else []
    return grpo.main([*start, *in_folder(folder), *QUICK, *map(str, flags)])


def flags_of(folder) -> list[str]:
    folder.mkdir(exist_ok=True)
    settings = files(folder)
    return ["--data", *settings["data"], "--reward", settings["reward"], "--group_size", "4"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        # Steps 3 and 6 are in the middle of a rollout.
        ["--updates_per_rollout", "2", "--grad_accum", "2"],
        ["--kl_coef", "0.1", "--updates_per_rollout", "4"],
        ["--lora_rank", "4"],
    ],
    ids=["plain", "inside a rollout", "kl", "lora"],
)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, more):
    base, flags = tiny_base(tmp_path / "base"), flags_of(tmp_path / "data")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        run(folder, *flags, *more, base=base)
    # The second half is lost.
    for name in ("latest.pt", "best.pt", "step_0000006.pt"):
        (parts / "ckpt" / name).unlink(missing_ok=True)
    assert grpo.main(["--resume", *in_folder(parts)]) == 0
    one, other = (read_checkpoint(f / "ckpt" / "latest.pt", optimizer=True) for f in (whole, parts))
    assert one.step == other.step == 6
    for group in (lambda c: c.trained or c.model, lambda c: c.optimizer):
        assert group(one).keys() == group(other).keys()
        assert all(torch.equal(tensor, group(other)[name]) for name, tensor in group(one).items())
    start = read_checkpoint(whole / "ckpt" / "step_0000003.pt")
    assert any(
        not torch.equal(tensor, (one.trained or one.model)[name])
        for name, tensor in (start.trained or start.model).items()
    )
    scores = [
        [
            r["score"]
            for r in map(json.loads, (f / "graphs" / "metrics.jsonl").open())
            if "score" in r
        ]
        for f in (whole, parts)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 3


@pytest.mark.parametrize("row_tokens", [0, 64, 200])
def test_answers_fill_rows_of_the_length_that_was_asked_for(tmp_path, row_tokens):
    """--row_tokens was read and changed nothing."""
    task, config, model = task_and_model(tmp_path, row_tokens=row_tokens)
    task.restore({})
    task.started(model)
    batch = task.loader(model.config, config).batch(0)
    assert batch[0].shape[1] == (row_tokens or 2 * task.context)


def test_a_run_says_what_it_does(tmp_path, capsys):
    base = tiny_base(tmp_path / "base")
    assert run(tmp_path, *flags_of(tmp_path / "data"), base=base) == 0
    output = capsys.readouterr().out
    assert "12 prompts" in output and "steps of 2 prompts x 4 answers" in output
    assert "it decides about answers without an end" in output
    assert re.search(r"^ended +\d\.\d{3} \(\d\.\d{3} to ", output, re.MULTILINE), "an interval"
    found = read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert found.stage["kind"] == "grpo" and found.stage["start"]["path"] == str(base)
    # Its place is taken by another file.
    run(tmp_path / "k", *flags_of(tmp_path / "data"), "--kl_coef", 0.1, base=base)
    base.unlink()
    tiny_base(tmp_path / "base", seed=5)
    with pytest.raises(ValueError, match="is not the file that this run started from"):
        grpo.main(["--resume", *in_folder(tmp_path / "k"), "--max_steps", "8"])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (dict(reward=""), "give --reward FILE.py:FUNCTION"),
        (dict(clip_low=0.1), "--clip_low has no effect with one update per rollout"),
        (dict(ratio="sequence"), "--ratio has no effect with one update"),
        (dict(train_on="last"), "--train_on has no effect"),
        (dict(compile=True), "compile wants batches of one shape"),
        (dict(spike_sigmas=3.0), "spike_sigmas is for a loss that falls"),
        (dict(group_size=1), "group_size must be at least 2"),
        (dict(max_new_tokens=64), "max_new_tokens 64 leaves no room for a prompt"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, settings, line):
    with pytest.raises(ValueError, match=line):
        task_and_model(tmp_path, **settings)


def test_dropout_is_refused(tmp_path):
    task, config, model = task_and_model(tmp_path)
    with pytest.raises(ValueError, match="give --dropout 0"):
        task.loader(dataclasses.replace(model.config, dropout=0.1), config)


def test_a_reward_that_fails_is_found_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.py:score failed: KeyError"):
        task_and_model(tmp_path, body="def score(messages, text, number):\n    return {}['a']\n")


def test_answers_without_a_layout_may_end_the_text_of_a_chat_model(tmp_path):
    """End-of-text was never drawn there, so that no answer could end."""
    base = tiny_base(tmp_path / "base", chats=True)
    source = read_checkpoint(base)
    config = GrpoConfig(init_from=str(base), raw=True, max_new_tokens=6, **files(tmp_path))
    task = Grpo(config, source)
    end = task.tokenizer.end_of_text_id
    assert end in task.stop_ids and end not in task.banned_ids
    chat = Grpo(dataclasses.replace(config, raw=False), source)
    assert end in chat.banned_ids and chat.stop_ids == [chat.tokenizer.chat.end]


def test_a_task_lets_go_of_its_model_before_another_is_made(tmp_path):
    """A roll back, or the next trial of --micro_batch auto, held two models in memory."""
    task, config, model = task_and_model(tmp_path)
    task.restore({})
    task.started(model)
    task.loader(model.config, config).batch(0)
    held = [weakref.ref(model), weakref.ref(task.plain(model))]
    task.planned(config, torch.float32)
    del model
    gc.collect()
    assert [one() for one in held] == [None, None]


def test_further_copies_of_the_weights_are_in_the_estimate_of_memory(tmp_path):
    """The merged weights that answers are drawn with, and those of the start, were left out."""
    settings = dict(lora_rank=2, kl_coef=0.1)
    task, _, model = task_and_model(tmp_path, **settings)
    whole = 4 * sum(p.numel() for p in model.parameters())
    needed = task.needed_bytes(dict.fromkeys(("weights", "gradients"), whole), model.config)
    task.prepare(model)
    merged = task.plain(model)
    own = {p.data_ptr() for p in model.parameters()}
    copied = sum(4 * p.numel() for p in merged.parameters() if p.data_ptr() not in own)
    assert needed["merged weights"] == copied > 0 and needed["reference"] == whole


def test_a_row_without_a_column_of_the_reward_is_found_before_the_first_step(tmp_path):
    """The run stopped when the row's turn came, and lost all steps since the last checkpoint."""
    base = tiny_base(tmp_path / "base")
    own = files(tmp_path)
    with open(own["data"][0], "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "and this?"}) + "\n")
    config = GrpoConfig(init_from=str(base), max_new_tokens=6, **own)
    with pytest.raises(ValueError, match=r"jsonl line 13: .*mine\.py:score cannot .*'number'"):
        Grpo(config, read_checkpoint(base))
