"""Guarantees about data, tokenizers, models, checkpoints and flags that do not belong together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import predict
import prepare_data
import test as size_report
import train
from config_model import ModelConfig, TrainConfig
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.reference import (
    _reference_shape,
    _reference_sources,
    expected_shapes,
    reference_config,
)
from runtime.checkpoint.write import save_checkpoint
from runtime.data import shards as shards
from runtime.data.tokenizers import load_tokenizer
from runtime.training.plan import FREE_ON_RESUME
from runtime.training.setup import set_up
from tests import builders, builders_inference, builders_runs
from tests.promises import Promise, Tally
from tests.promises.common import WorkBegan, attempt, byte_data, folder, no_work, one_line, tree


class World:
    """Data sets, runs and checkpoints that do not belong together, in one folder."""

    def __init__(self, at: Path):
        self.at = at
        self.a, self.b = byte_data(at, 0, "a"), byte_data(at, 10, "b")
        self.c, self.d = byte_data(at, 0, "c", "bpe:280"), byte_data(at, 20, "d", "bpe:280")
        self.run = builders_runs.Run(self.a, at / "run")
        assert self.run("--max_steps", 5, "--dropout", "0.1") == 0
        self.ckpt = str(self.run.ckpt_dir / "latest.pt")
        self.byte, bpe = load_tokenizer("byte"), load_tokenizer("bpe:280", self.c / "train")
        other = load_tokenizer("bpe:280", self.d / "train")
        build = builders_inference.biased_model
        self.bpe = self._save("bpe", build(vocabulary_size=280), bpe)
        self.other_bpe = self._save("other_bpe", build(vocabulary_size=280), other)
        self.wide = self._save("wide", build(vocabulary_size=300), self.byte)
        self.nameless = self._save("nameless", build(), None)
        self.narrow = self._save("narrow", build(vocabulary_size=97), None)
        self.table = self._save("table", build(use_attention_bias=True), self.byte)
        self.no_rope = self._save("no_rope", build(use_rope=False), self.byte)
        self.yarn = self._save(
            "yarn", build(rope_scaling="yarn", rope_scaling_factor=2.0), self.byte
        )
        self.plain = self._save("plain", build(qk_norm=False), self.byte)
        self.window = self._save("window", build(sliding_window=8), self.byte)
        # A tokenizer with more ids than the model.
        self.mistold = self._save("mistold", build(vocabulary_size=270), bpe)
        # Not the byte tokenizer that is here.
        self.misnamed = self._save(
            "misnamed", build(), None, self.byte.to_state() | {"fingerprint": "0" * 64}
        )
        self.reference = self._reference()
        self.halves = self._mix("halves", self.a / "train", self.b / "val")
        self.swapped = self._mix("swapped", self.a / "val", self.a / "train")
        self.tongues = self._mix("tongues", self.a / "train", self.c / "val")
        self.lone = at / "lone"
        shutil.copytree(self.a / "train", self.lone / "train")
        self.two_tokenizers = self._forge(
            "two_tokenizers",
            self.a,
            "val",
            lambda m: m.update(
                pair=shards.read_manifest(self.a / "train")["pair"],
                tokenizer=self.byte.to_state() | {"fingerprint": "1" * 64},
            ),
        )
        self.false_vocabulary = self._forge(
            "false_vocabulary", self.a, "train", lambda m: m.update(vocabulary_size=300)
        )
        self.small_ids = self._forge(
            "small_ids",
            self.c,
            "train",
            lambda m: m.update(
                vocabulary_size=270, tokenizer=m["tokenizer"] | {"vocabulary_size": 270}
            ),
        )
        self.later_version = self._forge(
            "later_version", self.a, "train", lambda m: m.update(version=2)
        )
        self.other_format = self._forge(
            "other_format", self.a, "val", lambda m: m.update(format="something")
        )
        self.foreign_shard = self._forge("foreign_shard", self.a, "train", lambda m: None)
        target = self.foreign_shard / "train" / "shard_0000.npy"
        content = bytearray(target.read_bytes())
        content[200:264] = content[400:464]
        target.write_bytes(content)
        self.foreign_tokenizer = self._forge("foreign_tokenizer", self.c, "train", lambda m: None)
        shutil.copy(
            self.d / "train" / "tokenizer.json", self.foreign_tokenizer / "train" / "tokenizer.json"
        )
        self.empty = at / "empty"
        self.empty.mkdir()
        self.not_ours = at / "not_ours"
        (self.not_ours / "train").mkdir(parents=True)
        (self.not_ours / "train" / "thesis.txt").write_text("mine")
        self.linked = at / "linked"
        self.linked.mkdir()
        (self.linked / "train").symlink_to(self.a / "train")
        for name in ("x.jsonl", "y.jsonl", "x.txt", "x.json"):
            (at / name).write_text('{"text": "a b c"}\n')
        (at / "prompts.jsonl").write_text('{"prompt": "x"}\n')
        (at / "toml").write_text("[train]\nd_model = 3\n")

    def _save(self, name: str, model, tokenizer, state=None) -> str:
        return str(
            save_checkpoint(
                self.at / name,
                1,
                model,
                None,
                train_config=TrainConfig(),
                tokenizer_state=state or tokenizer and tokenizer.to_state(),
            )
        )

    def _mix(self, name: str, train_split: Path, val_split: Path) -> Path:
        shutil.copytree(train_split, self.at / name / "train")
        shutil.copytree(val_split, self.at / name / "val")
        return self.at / name

    def _forge(self, name: str, source: Path, split: str, change) -> Path:
        shutil.copytree(source, self.at / name)
        manifest = shards.read_manifest(self.at / name / split)
        change(manifest)
        shards.write_manifest(self.at / name / split, manifest)
        return self.at / name

    def _reference(self) -> str:
        """A checkpoint in the original implementation's format, as the only one of a folder."""
        fields = dict(
            d_model=16,
            dropout=0.1,
            context_length=16,
            vocabulary_size=257,
            num_heads=2,
            transformer_blocks=1,
            num_kv_heads=1,
            qkv_bias=False,
            use_rope=True,
            use_attention_bias=False,
            d_ff=8,
            num_experts=2,
            top_k=1,
            aux_loss_coef=0.01,
            capacity_factor=1.25,
        )
        config = reference_config(fields)
        weights = {
            source: torch.ones(_reference_shape(name, shape))
            for name, shape in expected_shapes(config, 1 << 30).items()
            for source in _reference_sources(name, config.num_experts)
        }
        path = self.at / "reference" / "latest.pt"
        path.parent.mkdir()
        torch.save(
            {"step": 1, "val_loss": 3.0, "cfg": fields, "model": weights, "optimizer": {}}, path
        )
        assert read_checkpoint(path).is_reference_format
        return str(path)


def pairing_cases(w: World) -> list[tuple[str, Callable, list[str], str]]:
    """(name, a script's main, its arguments, a pattern that its error must match)."""
    cases = []

    def add(main, pattern: str, *argv, name: str = "") -> None:
        cases.append(
            (
                name or " ".join(a.replace(str(w.at) + os.sep, "") for a in map(str, argv)),
                main,
                list(map(str, argv)),
                pattern,
            )
        )

    # ---- a run and settings that are not its own: every setting that is not free on resume
    resume = ["--resume", *w.run.folders]
    saved = read_checkpoint(w.ckpt)
    own = saved.train_config | dataclasses.asdict(saved.model_config)
    for owner in (ModelConfig, TrainConfig):
        for f in dataclasses.fields(owner):
            if f.name in FREE_ON_RESUME | {"init_from"}:
                continue
            value = (
                not own[f.name]
                if isinstance(own[f.name], bool)
                else next((c for c in f.metadata["choices"] or () if c != own[f.name]), None)
            )
            value = builders.other_value(owner, f.name, [own[f.name]]) if value is None else value
            add(
                train.main,
                rf"^--{f.name} .* differs from the run in .*latest|^--{f.name} .* differs "
                r"from the run in .*step_",
                *resume,
                *builders.as_flags({f.name: value}),
                name=f"resume with {f.name} {value}",
            )
    # The same sequences per step may be cut otherwise; another number of them is another run.
    for batch_size, grad_accum in ((4, 2), (2, 1), (1, 2), (3, 1)):
        add(
            train.main,
            r"differs from the run in .*2 x 2 sequences a step.* whose product is 4",
            *resume,
            *builders.as_flags({"batch_size": batch_size, "grad_accum": grad_accum}),
            name=f"resume with {batch_size} x {grad_accum} sequences a step",
        )
    for preset in ("nano", "gptoss"):
        add(
            train.main,
            f"leave out --preset {preset}",
            *resume,
            "--preset",
            preset,
            name=f"resume with preset {preset}",
        )
    add(train.main, "not both", *resume, "--init_from", w.bpe, name="resume and init_from")
    add(
        train.main,
        "at step 5, beyond --max_steps 4",
        *resume,
        "--max_steps",
        4,
        name="resume with fewer steps than were taken",
    )
    add(
        train.main,
        "at step 5, beyond --max_steps 2",
        *resume,
        "--epochs",
        0.02,
        name="resume with fewer epochs than were taken",
    )
    # ---- a run and data that are not its own
    for name, pattern in (
        ("b", "is not the text that"),
        ("c", "is not the text that"),
        ("d", "is not the text that"),
        ("halves", "not written by the same run"),
        ("swapped", "holds the split 'val', not 'train'"),
        ("tongues", "not written by the same run"),
        ("lone", "has no prepared text .*val"),
        ("two_tokenizers", "different tokenizers"),
        ("false_vocabulary", "its vocabulary is not its tokenizer's"),
        ("later_version", "has version 2"),
        ("other_format", "was not written by this program"),
        ("foreign_shard", "shard_0000.npy is damaged"),
        ("empty", "has no prepared text .*train"),
        ("run", "has no prepared text"),
    ):
        add(
            train.main,
            pattern,
            "--resume",
            "--data_dir",
            w.at / name,
            *w.run.folders[2:],
            name=f"resume with data {name}",
        )
    for name, pattern in (
        ("small_ids", "holds id 2\\d\\d, beyond its vocabulary of 270|tokenizer"),
        ("foreign_tokenizer", "tokenizer.json is missing or damaged"),
    ):
        add(
            train.main,
            pattern,
            *builders_runs.MODEL,
            "--data_dir",
            w.at / name,
            "--ckpt_dir",
            w.at / "new",
            name=f"train with data {name}",
        )
    # ---- folders that hold no run, or another's
    for name, pattern in (
        ("empty", "holds no checkpoint"),
        ("a", "holds no checkpoint"),
        ("bpe", "no optimizer state.*--init_from"),
        ("reference", "original implementation's format.*--init_from"),
    ):
        add(
            train.main,
            pattern,
            "--resume",
            "--ckpt_dir",
            w.at / name,
            "--data_dir",
            w.a,
            name=f"resume from folder {name}",
        )
    add(
        train.main,
        "holds the checkpoints of another run",
        *builders_runs.MODEL,
        *w.run.folders,
        name="a new run into a used folder",
    )
    # ---- weights and data, or flags, of another kind
    new = ["--ckpt_dir", w.at / "new", "--graph_dir", w.at / "new_graphs"]
    for ckpt, name, pattern in (
        (w.ckpt, "c", "vocabulary_size 257 is smaller than the data's 280"),
        (w.bpe, "a", "trained with tokenizer bpe:280 and .* made with byte"),
        (w.bpe, "d", "bpe:280 of another text"),
        (w.other_bpe, "c", "bpe:280 of another text"),
        (w.wide, "c", "trained with tokenizer byte and .* bpe:280"),
        (w.narrow, "a", "vocabulary_size 97 is smaller than the data's 257"),
        (w.reference, "c", "vocabulary_size 257 is smaller than the data's 280"),
    ):
        add(train.main, pattern, "--init_from", ckpt, "--data_dir", w.at / name, *new)
    for flags in (
        ["--d_ff", 24],
        ["--d_model", 32],
        ["--num_experts", 8],
        ["--transformer_blocks", 2],
        ["--vocabulary_size", 300],
        ["--tie_embeddings"],
        ["--no-head_bias"],
        ["--qk_norm"],
        ["--no-use_attention_bias"],
        ["--no-expert_bias"],
        ["--expert_activation", "gelu"],
        ["--context_length", 32],
        ["--head_dim", 4],
        ["--num_kv_heads", 2],
        ["--qkv_bias"],
        ["--no-out_proj_bias"],
    ):
        add(
            train.main,
            "does not fit the weights",
            "--init_from",
            w.ckpt,
            "--data_dir",
            w.a,
            *new,
            *flags,
        )
    # the same shapes, another function: the weights mean nothing under them
    for ckpt, name, flags in (
        (w.plain, "head_dim", ["--num_heads", 8, "--num_kv_heads", 4, "--head_dim", 4]),
        (w.plain, "use_rope", ["--no-use_rope"]),
        (w.no_rope, "use_rope", ["--use_rope"]),
        (w.plain, "init_std", ["--init_std", 0.5]),
    ):
        add(
            train.main,
            f"--{name}.* the weights",
            "--init_from",
            ckpt,
            "--data_dir",
            w.a,
            *new,
            *flags,
        )
    for path, pattern in (
        (w.at / "nowhere.pt", "no such file"),
        (w.at / "bpe", "is a directory"),
        (w.a / "train" / "shard_0000.npy", "not a checkpoint"),
        (w.c / "train" / "tokenizer.json", "not a checkpoint"),
    ):
        add(train.main, pattern, "--init_from", path, "--data_dir", w.a, *new)
    # ---- a checkpoint and the way it is to be used
    say = ["--prompt", "x", "--device", "cpu"]
    for ckpt, flags, pattern in (
        (w.nameless, [], "does not say which tokenizer it was trained with"),
        (w.bpe, ["--tokenizer", "byte"], "was trained with tokenizer bpe:280, not byte"),
        (w.bpe, ["--tokenizer", w.d], "was trained with tokenizer bpe:280, not .*d: leave"),
        (w.ckpt, ["--tokenizer", w.c], "was trained with tokenizer byte, not"),
        (w.nameless, ["--tokenizer", "words"], "tokenizer 'words' is not one of"),
        (w.nameless, ["--tokenizer", "bpe:300"], "is made from a text: give the folder"),
        (w.nameless, ["--tokenizer", w.c], "has 280 ids, the model in .* 260"),
        (w.narrow, ["--tokenizer", "byte"], "has 257 ids, the model in .* 97"),
        (w.nameless, ["--tokenizer", w.empty], "meta.json does not exist"),
        (w.nameless, ["--tokenizer", w.foreign_tokenizer], "tokenizer.json is missing or damaged"),
        (w.mistold, [], "has 280 ids, the model in .* 270"),
        (w.misnamed, [], "the stored tokenizer byte is not the byte found here"),
        (w.reference, ["--tokenizer", w.c], "has 280 ids, the model"),
        (w.table, ["--context_length", 33], "beyond the trained 32"),
        (w.ckpt, ["--context_length", 64], "beyond the trained 16"),
        (
            w.no_rope,
            ["--context_length", 64, "--rope_scaling", "linear"],
            "rope_scaling linear needs use_rope",
        ),
        (w.yarn, ["--context_length", 64], "yarn-scaled"),
        (w.bpe, ["--context_length", 32, "--rope_scaling", "yarn"], "not more than the trained 32"),
        (w.window, ["--lookup", 2], "leave lookup out"),
        (w.bpe, ["--compile"], "compile is for CUDA graphs"),
        (w.bpe, ["--num_samples", 2, "--show_experts"], "for one completion"),
        (w.bpe, ["--prompt_file", w.at / "prompts.jsonl"], "either prompt or prompt_file"),
        (w.bpe, ["--rope_scaling", "linear"], "needs a context_length"),
        (w.bpe, ["--device", "cuda:99"], "device 'cuda:99' is not here"),
        (w.bpe, ["--interactive"], "leave prompt, prompt_file and messages out"),
        (w.at / "nowhere.pt", [], "no such file"),
        (w.at / "bpe", [], "is a directory"),
        (w.a / "train" / "shard_0000.npy", [], "not a checkpoint"),
        (w.a / "train" / "meta.json", [], "not a checkpoint"),
    ):
        add(predict.main, pattern, "--ckpt", ckpt, *say, *flags)
    # ---- texts, and settings that are for others
    out, x = ["--out_dir", w.at / "prepared", "--tokenizer", "byte"], w.at / "x.jsonl"
    for argv, pattern in (
        (["--files", x, "--dataset", "toy"], "--dataset has no effect with --files"),
        (["--files", x, "--split", "train"], "--split has no effect"),
        (["--dataset", "toy", "--streaming"], "--streaming has no effect"),
        (["--num_stories", 5], "--num_stories has no effect without"),
        (
            ["--files", x, "--val_files", w.at / "y.jsonl", "--val_ratio", 0.1],
            "--val_ratio has no effect",
        ),
        (["--files", x, "--document_separator", "x"], "--document_separator has no effect"),
        (["--files", w.at / "x.txt", "--text_column", "t"], "--text_column has no effect"),
        (["--files", x, x], "is named twice"),
        (["--files", x, "--val_files", x], "is named twice"),
        (["--files", x, "--text_format", "csv"], "has no column 'text'"),
        (["--files", x, "--text_column", "story"], "has no 'story'"),
        (["--files", w.a], "holds no text file"),
        (["--files", w.a / "train" / "shard_0000.npy"], "says no format"),
    ):
        add(prepare_data.main, pattern, *argv, *out)
    for name, argv, pattern in (
        ("not_ours", [], "holds files that prepare_data.py did not write .thesis.txt"),
        ("linked", [], "is a symbolic link"),
        ("x.txt", [], "is not a folder"),
        ("prepared", ["--tokenizer", "byte:compact"], "have a :compact form"),
        ("prepared", ["--tokenizer", "bpe:100"], "must be a whole number from 257"),
    ):
        add(
            prepare_data.main,
            pattern,
            "--files",
            x,
            "--tokenizer",
            "byte",
            "--out_dir",
            w.at / name,
            *argv,
        )
    # ---- settings among themselves
    for argv, pattern in (
        (["--top_k", 9, "--num_experts", 8], "top_k 9 must not exceed"),
        (
            ["--num_heads", 6, "--num_kv_heads", 4, "--d_model", 48],
            "must be a multiple of num_kv_heads",
        ),
        (["--d_model", 50, "--num_heads", 4], "not divisible by num_heads"),
        (["--head_dim", 5], "head_dim must be even"),
        (["--rope_scaling_factor", 2], "has no effect with rope_scaling none"),
        (["--rope_scaling", "yarn", "--no-use_rope"], "needs use_rope"),
        (["--window_pattern", "alternating"], "has no effect without sliding_window"),
        (["--min_lr", 1, "--lr", 0.1], "min_lr 1.0 must not exceed lr"),
        (["--warmup_steps", 50, "--max_steps", 50], "must be less than max_steps"),
        (["--muon_momentum", 0.9], "no effect with optimizer adamw"),
        (["--epochs", 2, "--max_steps", 50], "either --epochs or --max_steps, not both"),
        (["--warmup_steps", 50_000, "--epochs", 1, "--context_length", 16], "less than max_steps"),
        (["--config", w.at / "toml"], "unknown keys in .train.: d_model"),
        (["--vocabulary_size", 100], "vocabulary_size 100 is smaller than the data's 257"),
        (
            [*builders_runs.MODEL, "--context_length", 100_000, "--no-use_attention_bias"],
            "tokens and a sequence needs 100,001",
        ),
    ):
        add(train.main, pattern, "--data_dir", w.a, *new, *argv)
    for argv in (["--preset", "nano"], ["--d_model", 64]):
        add(size_report.main, "leave out --preset and the model's flags", "--ckpt", w.ckpt, *argv)
    return cases


def pairings(count: int) -> Tally:
    """Mismatched data, tokenizers, models, checkpoints and flags, through the scripts' own mains.

    A line names the mismatch, before anything is built or written. Fewer than all: evenly spread
    over the table.
    """
    tally = Tally()
    with folder() as at, no_work():
        with contextlib.ExitStack() as stack:
            # The world itself is made by the real ones.
            for owner, name in (
                (train, "set_up"),
                (prepare_data, "write_partial"),
            ):
                stack.enter_context(mock.patch.object(owner, name, REAL[name]))
            world = World(at)
        cases, written = pairing_cases(world), [tree(at)]
        assert len({name for name, *_ in cases}) == len(cases), "two cases have one name"
        for name, main, argv, pattern in (
            [cases[i * len(cases) // count] for i in range(count)] if count < len(cases) else cases
        ):

            def check(main=main, argv=argv, pattern=pattern):
                try:
                    main(argv)
                except WorkBegan:
                    raise AssertionError("accepted: work began") from None
                except ValueError as error:
                    one_line(error)
                    assert re.search(pattern, str(error)), f"refused, but with {str(error)[:300]!r}"
                else:
                    raise AssertionError("accepted")
                assert tree(at) == written[-1], "something was written"

            attempt(tally, f"{main.__module__}: {name}", check)
            written.append(tree(at))
        tally.detail = {"in the table": len(cases)}
    return tally


REAL = {"set_up": set_up, "write_partial": prepare_data.write_partial}


PROMISES: list[Promise] = [
    Promise(
        7,
        "Wrong pairings of data, tokenizer, model, checkpoint and flags are named and "
        "refused before any work",
        pairings,
        50,
        200,
        200,
        "at least 5 accepted in silence",
    ),
]
