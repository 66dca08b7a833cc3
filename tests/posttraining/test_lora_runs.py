"""Whole runs that train adapters: checkpoints, resume, rollback, what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
from config_model import ModelConfig
from model import LLM
from runtime.base import cli
from runtime.checkpoint.adapter import is_trained
from runtime.checkpoint.read import load_model, read_checkpoint
from runtime.data.tokenizers import load_tokenizer
from runtime.posttraining.config import PostTrainConfig
from runtime.posttraining.tuning import FineTuning
from runtime.training.plan import make_plan
from tests.builders import tiny_config
from tests.builders_checkpoint import save
from tests.builders_runs import Fixed

VOCABULARY = 257


class Texts(FineTuning):
    """Predict every token of texts that hold the chat ids."""

    kind, command, where, fingerprint = "sft", "python -m scripts.sft", "texts", "f00d"

    def loader(self, model_config, config):
        generator = torch.Generator().manual_seed(0)
        ids_NT = torch.randint(VOCABULARY + 3, (64, 13), generator=generator)
        return Fixed(ids_NT[:, :-1], ids_NT[:, 1:], config.batch_size)

    def loss(self, model: LLM, batch):
        return train.next_token_loss(model, batch)

    def validation(self, model_config: ModelConfig, config: PostTrainConfig):
        return [self.loader(model_config, config).batch(40)]


@pytest.fixture
def run(tmp_path):
    """Return a function that runs `Texts` with flags on a small base in base/."""
    tokenizer = load_tokenizer("byte")
    torch.manual_seed(0)
    model = LLM(tiny_config(vocabulary_size=VOCABULARY, router_bias_rate=1e-2, tie_embeddings=True))
    base = save(tmp_path / "base", 1, model, None, tokenizer_state=tokenizer.to_state())

    def run_(*flags: str, ckpt_dir: str = "run", fresh: bool = True) -> int:
        own = ["--ckpt_dir", str(tmp_path / ckpt_dir), "--graph_dir", str(tmp_path / "graphs")]
        if fresh:
            own += ["--init_from", str(base), "--lora_rank", "4", "--lora_alpha", "8"]
            own += ["--batch_size", "2", "--grad_accum", "2", "--max_steps", "8", "--lr", "1e-2"]
            own += ["--warmup_steps", "0", "--save_interval", "3", "--device", "cpu"]
        parser = cli.parser("")
        cli.add_config_flags(parser, ModelConfig, PostTrainConfig)
        args = parser.parse_args([*own, *flags])
        settings = cli.settings_from(args, ModelConfig, PostTrainConfig)
        return train.run(make_plan(settings, Texts, PostTrainConfig))

    run_.base = base
    return run_


def latest(folder: Path):
    return read_checkpoint(folder / "latest.pt", optimizer=True)


def same(one, other) -> bool:
    groups = ((one.trained, other.trained), (one.optimizer, other.optimizer))
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in groups)


def test_a_run_of_adapters_resumes_bit_for_bit(run, tmp_path, capsys):
    """Stopped at step 5, in another process it would be the same: nothing else is kept."""
    before = run.base.read_bytes()
    assert run() == 0
    assert run("--max_steps", "5", "--schedule", "constant", ckpt_dir="short") == 0
    printed = capsys.readouterr().out
    assert "lora     trains" in printed and "rows of 3 new ids" in printed
    assert "frozen weights" in printed
    assert run("--schedule", "constant", ckpt_dir="whole") == 0
    assert run("--resume", "--max_steps", "8", ckpt_dir="short", fresh=False) == 0
    whole, resumed = latest(tmp_path / "whole"), latest(tmp_path / "short")
    assert whole.step == resumed.step == 8 and same(whole, resumed)
    assert run.base.read_bytes() == before
    held = torch.load(tmp_path / "run/latest.pt", weights_only=True)
    assert all(is_trained(name) for name in held["model"])
    assert held["model"]["embed.new_rows"].shape == (3, 32)


def test_the_base_comes_back_with_its_expert_biases(run, tmp_path):
    """router_bias_rate moves them in full training; under adapters they are the base's."""
    run()
    model, checkpoint = load_model(tmp_path / "run/latest.pt")
    base, _ = load_model(run.base)
    assert model.config.vocabulary_size == VOCABULARY + 3
    there = base.state_dict()
    for name, tensor in model.state_dict().items():
        if "selection_bias" in name or "norm" in name or "router" in name:
            assert torch.equal(tensor, there[name]), name
    assert torch.equal(model.embed.weight[:VOCABULARY], base.embed.weight)
    assert checkpoint.stage["kind"] == "sft" and checkpoint.adapter.rank == 4


@pytest.mark.nightly
def test_a_run_that_diverges_goes_back_to_its_adapters(run, tmp_path, monkeypatch, capsys):
    """The rollback reads the run's own file, and its base again."""
    monkeypatch.setattr(train, "MOST_SKIPPED_IN_A_ROW", 2)
    real, calls = train.next_token_loss, [0]

    def loss(model, batch):
        out = real(model, batch)
        calls[0] += model.training
        # After the dry run and four steps of two micro-batches, for three steps.
        bad = model.training and 10 < calls[0] <= 18
        return out._replace(cross_entropy_sum=out.cross_entropy_sum * (float("nan") if bad else 1))

    monkeypatch.setattr(train, "next_token_loss", loss)
    assert run("--max_rollbacks", "1") == 0
    assert "back to step 3" in capsys.readouterr().out
    assert latest(tmp_path / "run").run["rollbacks"] == 1


def test_a_resume_without_its_base_says_which_file_is_missing(run):
    run("--max_steps", "3")
    for name in run.base.parent.glob("*.pt"):
        name.unlink()
    with pytest.raises(ValueError, match=f"{run.base} is missing"):
        run("--resume", "--max_steps", "5", fresh=False)


@pytest.mark.nightly
def test_a_second_tuning_starts_from_the_merged_weights(run, tmp_path):
    """Its base is the first run's file; the chat ids have rows already."""
    run()
    first = str(tmp_path / "run/latest.pt")
    flags = ["--init_from", first, "--lora_rank", "2", "--max_steps", "2", "--warmup_steps", "0"]
    assert run(*flags, "--device", "cpu", "--batch_size", "2", ckpt_dir="next", fresh=False) == 0
    second = read_checkpoint(tmp_path / "next/latest.pt")
    assert second.adapter.num_rows == 0
    assert Path(second.adapter.base).parent == tmp_path / "run"
    # All weights, from the merged ones.
    assert (
        run(
            "--init_from",
            first,
            "--max_steps",
            "1",
            "--warmup_steps",
            "0",
            "--device",
            "cpu",
            "--batch_size",
            "2",
            ckpt_dir="full",
            fresh=False,
        )
        == 0
    )
    assert read_checkpoint(tmp_path / "full/latest.pt").adapter is None
