"""scripts/export_onnx.py: onnxruntime computes what the model does, at sizes not traced."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys

import pytest
import torch

import model_parts
from config_model import TrainConfig
from model import generate
from model_parts import KVCache
from runtime.checkpoint.read import load_model
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizers import load_tokenizer
from runtime.interop.export import ExportError, logits_of
from scripts import export_onnx
from scripts.export_onnx import main, open_session, run, to_onnx
from tests.builders import random_config, random_model, tiny_config
from tests.builders_export import imported
from tests.conftest import REPO
from tests.numeric import assert_close, logits_bound, rounding, share_of


def checkpoint(folder, config, tokenizer=None):
    """A checkpoint of a random model, with the byte tokenizer unless there is another."""
    state = (tokenizer or load_tokenizer("byte")).to_state()
    return save_checkpoint(
        folder, 1, random_model(config), None, train_config=TrainConfig(), tokenizer_state=state
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, file) of a tiny model."""
    folder = tmp_path_factory.mktemp("onnx")
    path = checkpoint(
        folder, tiny_config(vocabulary_size=257, context_length=64, tie_embeddings=True)
    )
    assert main(["--ckpt", str(path), "--out", str(folder / "model.onnx")]) == 0
    return path, folder / "model.onnx"


def compare(model, session, B, T, first):
    """One call, and calls of `first`, 1, 1, ... tokens: the largest difference beyond rounding."""
    config = model.config
    ids_BT = torch.randint(
        0, config.vocabulary_size, (B, T), generator=torch.Generator().manual_seed(0)
    )
    ours, past, pieces = logits_of(model, ids_BT), None, []
    for chunk in (ids_BT[:, :first], *ids_BT[:, first:].split(1, dim=1)):
        logits, past = run(session, config, chunk, past)
        pieces.append(logits)
    bound = logits_bound(config, T)
    return max(
        share_of(theirs, ours, bound)
        for theirs in (run(session, config, ids_BT)[0], torch.cat(pieces, dim=1))
    )


CONFIGS = {
    "gpt_oss": dict(
        attention_sinks=True,
        qk_norm=False,
        qkv_bias=True,
        out_proj_bias=True,
        sliding_window=4,
        window_pattern="alternating",
        rope_theta=150_000.0,
        rope_scaling="yarn",
        rope_scaling_factor=2.0,
        yarn_truncate=False,
        expert_activation="swiglu_clamped",
        expert_bias=True,
        router_bias=True,
    ),
    "published default": dict(
        use_attention_bias=True,
        qk_norm=False,
        expert_activation="gelu",
        expert_bias=True,
        out_proj_bias=True,
        head_bias=True,
        router_bias_rate=1e-3,
    ),
}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        *(tiny_config(**changes) for changes in CONFIGS.values()),
        random_config(1),
        random_config(25),
    ],
    ids=[*CONFIGS, "random 1", "random 25"],
)
def test_every_option_is_exported(config, tmp_path):
    """One graph gives the logits for batches and lengths that were not traced.

    At once and in pieces, the first without a past.
    """
    import onnx_ir

    model = random_model(config).eval()
    onnx_ir.save(to_onnx(model), tmp_path / "m.onnx")
    assert compare(model, open_session(tmp_path / "m.onnx"), 3, config.context_length, 9) <= 1


@pytest.mark.nightly
@pytest.mark.slow
def test_blocks_may_have_equal_weights(tmp_path):
    """torch.onnx stores equal weights once.

    Those of two blocks (biases that are all 0, as in an untrained imported gpt-oss) were given to
    the experts twice. The second time onnx_ir had their names already: a traceback.
    """
    import onnx_ir

    model = random_model(tiny_config(expert_bias=True)).eval()
    first, second = (block.moe.experts for block in model.layers)
    with torch.no_grad():
        second.w_in.copy_(first.w_in)
        for experts in (first, second):
            experts.b_in.zero_()
            experts.b_out.zero_()
    onnx_ir.save(to_onnx(model), tmp_path / "m.onnx")
    assert compare(model, open_session(tmp_path / "m.onnx"), 3, 20, 9) <= 1


@pytest.mark.nightly
def test_greedy_text_is_the_models(exported):
    """40 greedy tokens through onnxruntime's cache, one row and two, equal model.generate's."""
    model, _ = load_model(exported[0])
    session = open_session(exported[1])
    for B in (1, 2):
        ids_BT = torch.arange(5 * B).view(B, 5)
        ours = torch.stack(list(generate(model, ids_BT, 40, temperature=0.0)), dim=1)
        chunk, past, theirs = ids_BT, None, []
        for _ in range(40):
            logits, past = run(session, model.config, chunk, past)
            chunk = logits[:, -1:].argmax(dim=-1)
            theirs.append(chunk)
        assert torch.equal(ours, torch.cat(theirs, dim=1))


@pytest.mark.nightly
@pytest.mark.slow
def test_positions_far_out_are_exact(exported, tmp_path, monkeypatch):
    """Positions are float64 in the graph: in float32, angles at 200,000 are off by a thousandth.

    A graph made with such tables shows it. New keys tell best, as none of the 200,000 others is in
    them. Attention's sums over all of these move the logits' last bits.
    """
    import onnx_ir

    model, _ = load_model(exported[0])
    model.eval()
    start, config, ids_BT = 200_000, model.config, torch.arange(6)[None]
    cache = KVCache(config, 1, start + 6)
    for tensor in cache.keys + cache.values:
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    past = [tensor[:, :, :start].numpy().copy() for tensor in cache.keys + cache.values]
    cache.length = start
    with torch.inference_mode():
        ours = model(ids_BT, cache=cache).logits
    theirs, present = run(open_session(exported[1]), config, ids_BT, past)
    assert_close(theirs, ours, logits_bound(config, start + 6))
    # A key: embedding's norm, a product, its own norm, two terms of a rotation.
    bound = rounding(torch.float32, config.d_model, config.d_model, config.head_dim, 2)
    keys = cache.keys[0][:, :, start:]
    assert_close(present[0][:, :, start:], keys, bound)
    monkeypatch.setattr(model_parts, "_table_dtype", lambda device: torch.float32)
    onnx_ir.save(to_onnx(model), tmp_path / "narrow.onnx")
    _, present = run(open_session(tmp_path / "narrow.onnx"), config, ids_BT, past)
    assert share_of(present[0][:, :, start:], keys, bound) > 10


def test_what_a_user_needs_is_in_and_beside_the_file(exported):
    """The graph's names and sizes, the metadata, our tokenizer.json, and nothing else."""
    from tokenizers import Tokenizer

    path, out = exported
    session, model = open_session(out), load_model(path)[0]
    assert [(i.name, i.shape) for i in session.get_inputs()][:2] == [
        ("input_ids", ["batch", "tokens"]),
        ("past_key_values.0.key", ["batch", 2, "past", 8]),
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()][:2] == [
        ("logits", ["batch", "tokens", 257]),
        ("present.0.key", ["batch", 2, "past + tokens", 8]),
    ]
    about = session.get_modelmeta().custom_metadata_map
    assert (about["start_id"], about["end_of_text_id"], about["stop_ids"], about["tokenizer"]) == (
        "256",
        "256",
        "[256]",
        "byte",
    )
    assert json.loads(about["config"])["d_model"] == model.config.d_model
    text = "Noor's café, 1927."
    library = Tokenizer.from_file(str(out.with_name("model.tokenizer.json")))
    ids = load_tokenizer("byte").encode(text)
    assert library.encode(text, add_special_tokens=False).ids == ids
    # The start token comes by itself.
    assert library.encode(text).ids == [256, *ids]
    assert sorted(p.name for p in out.parent.glob("model*")) == [
        "model.onnx",
        "model.tokenizer.json",
    ]


@pytest.mark.nightly
def test_a_file_without_a_tokenizer(tmp_path):
    """The metadata name no special id, and no tokenizer.json is next to the file."""
    path = save_checkpoint(
        tmp_path / "ckpt",
        1,
        random_model(tiny_config(vocabulary_size=97)),
        None,
        train_config=TrainConfig(),
        tokenizer_state=None,
    )
    out = tmp_path / "model.onnx"
    assert main(["--ckpt", str(path), "--out", str(out), "--tokenizer", "none"]) == 0
    about = open_session(out).get_modelmeta().custom_metadata_map
    keys = ("tokenizer", "tokenizer_fingerprint", "start_id", "end_of_text_id", "stop_ids")
    assert [about.get(key, "") for key in keys] == ["none", "", "", "", "[]"]
    assert [file.name for file in tmp_path.glob("model*")] == ["model.onnx"]


def documented_example(folder, monkeypatch) -> list[int]:
    """Return the ids that the program of docs/export.md makes of my-model.onnx in a folder."""
    (example,) = (
        block
        for block in re.findall(
            r"```python\n(.*?)```",
            (REPO / "docs" / "export.md").read_text(encoding="utf-8"),
            re.DOTALL,
        )
        if "onnxruntime" in block
    )
    (folder / "example.py").write_text(example, encoding="utf-8")
    monkeypatch.chdir(folder)
    return runpy.run_path("example.py")["ids"]


def greedy(model, prompt: list[int], length: int) -> list[int]:
    return [
        token.item()
        for token in generate(model.eval(), torch.tensor([prompt]), length, temperature=0.0)
    ]


def test_the_documented_example_says_what_the_model_says(exported, tmp_path, monkeypatch):
    for name in ("model.onnx", "model.tokenizer.json"):
        shutil.copy(exported[1].with_name(name), tmp_path / f"my-{name}")
    ours = greedy(load_model(exported[0])[0], [256, *b"Once upon a time"], 40)
    assert 256 not in ours and documented_example(tmp_path, monkeypatch)[:40] == ours


@pytest.mark.nightly
@pytest.mark.slow
def test_the_documented_example_is_right_for_an_imported_model(tmp_path, monkeypatch):
    """An imported model may have no start, or several end ids.

    Its tokenizer may frame texts itself. The example raised on int(""), stopped only at
    end-of-text, and began with the tokenizer's frame.
    """
    frame = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|turn|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<|turn|>": {"id": "<|turn|>", "ids": [260], "tokens": ["<|turn|>"]}},
    }
    config = tiny_config(vocabulary_size=261, context_length=128, transformer_blocks=1)
    answer = greedy(random_model(config), imported().encode("Once upon a time"), 100)
    # So that it ends early, and not with end-of-text.
    stop_ids = (258, answer[4])
    path = checkpoint(
        tmp_path, config, imported(post_processor=frame, stop_ids=stop_ids, start_id=None)
    )
    assert main(["--ckpt", str(path), "--out", str(tmp_path / "my-model.onnx")]) == 0
    assert (
        documented_example(tmp_path, monkeypatch)
        == answer[: next(i for i, token in enumerate(answer, 1) if token in stop_ids)]
    )


def test_help_is_one_line_and_the_arguments(capsys):
    """All of the module's text stood there."""
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "onnxruntime on any machine. options:" in said
        and "NAME.tokenizer.json is written next to it" in said
    )


@pytest.mark.nightly
@pytest.mark.slow
def test_float16_with_external_data_replaces_only_when_forced(
    exported, tmp_path, monkeypatch, capsys
):
    """Above one file's limit the weights go next to it, under the name that the model gives.

    A second export is rejected without --force, and one that needs no such file removes it.
    """
    path, out = exported[0], tmp_path / "m.onnx"
    monkeypatch.setattr(export_onnx, "MOST_BYTES_IN_ONE_FILE", 1000)
    assert main(["--ckpt", str(path), "--out", str(out), "--dtype", "float16"]) == 0
    data = tmp_path / "m.onnx.data"
    matrices = sum(p.numel() for p in load_model(path)[0].parameters() if p.ndim > 1)
    # Tensors of up to 256 bytes stay in the model.
    assert 1.9 * matrices < data.stat().st_size < 2.5 * matrices
    assert "rounding the weights to float16 moves the logits" in capsys.readouterr().out
    open_session(out)
    with pytest.raises(ValueError, match="--force"):
        main(["--ckpt", str(path), "--out", str(out)])
    monkeypatch.undo()
    assert main(["--ckpt", str(path), "--out", str(out), "--force"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.tokenizer.json"]


@pytest.mark.nightly
@pytest.mark.slow
def test_what_is_off_is_not_written(exported, tmp_path, monkeypatch):
    """A graph of other weights fails the check; nothing is left, and what was there stays."""
    (tmp_path / "m.onnx").write_bytes(b"before")

    def other(model):
        # (in place it would be written to the checkpoint).
        model.norm.weight.data = model.norm.weight.data * 1.01
        return to_onnx(model)

    monkeypatch.setattr(export_onnx, "to_onnx", other)
    with pytest.raises(ExportError, match="nothing was written"):
        main(["--ckpt", str(exported[0]), "--out", str(tmp_path / "m.onnx"), "--force"])
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_mistakes_are_one_line(exported, tmp_path, monkeypatch):
    """Another ending, a missing library."""
    with pytest.raises(ValueError, match="NAME.onnx"):
        main(["--ckpt", str(exported[0]), "--out", str(tmp_path / "model")])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript onnxruntime"):
        main(["--ckpt", str(exported[0]), "--out", str(tmp_path / "m.onnx")])
