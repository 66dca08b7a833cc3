"""scripts/merge_lora, and what else is given a checkpoint of adapters."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from runtime.checkpoint.read import build_model, load_model, read_checkpoint
from runtime.data.tokenizers import load_tokenizer
from runtime.posttraining.lora import attach, merged_model, new_adapter
from scripts import export_gguf, export_hf
from scripts.merge_lora import main
from tests.builders import random_model, tiny_config
from tests.builders_checkpoint import save
from tests.builders_inference import predictor_of
from tests.builders_lora import move_adapters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base with a tokenizer, a checkpoint of adapters on it, and the adapted model."""
    folder, tokenizer = tmp_path_factory.mktemp("lora"), load_tokenizer("byte")
    config = tiny_config(context_length=64, vocabulary_size=tokenizer.vocabulary_size)
    values = dict(tokenizer_state=tokenizer.to_state(), stage={"kind": "sft"})
    model = random_model(config).eval()
    base = save(folder / "base", 2, model, None, **values)
    attach(model, new_adapter(read_checkpoint(base), config, 4, 0, 8.0, (7, 8)))
    move_adapters(model)
    return base, save(folder / "run", 5, model, None, **values), model


def test_a_merged_file_is_a_plain_checkpoint(run, tmp_path, capsys):
    """It needs its base no more, has the same weights to the bit, and keeps what was known."""
    base, path, model = run
    assert main(["--ckpt", str(path), "--out", str(tmp_path / "merged.pt")]) == 0
    assert "a plain checkpoint" in capsys.readouterr().out
    hidden = base.with_name("hidden")
    os.rename(base, hidden)
    try:
        plain, checkpoint = load_model(tmp_path / "merged.pt")
    finally:
        os.rename(hidden, base)
    whole = merged_model(model).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in plain.state_dict().items())
    before = read_checkpoint(path)
    assert checkpoint.adapter is None and checkpoint.stage == {"kind": "sft"}
    for name in ("step", "model_config", "tokenizer_state", "run", "val_loss", "train_config"):
        assert getattr(checkpoint, name) == getattr(before, name), name


def test_merging_twice_is_refused(run, tmp_path):
    base, path, _ = run
    main(["--ckpt", str(path), "--out", str(tmp_path / "merged.pt")])
    for whole in (tmp_path / "merged.pt", base):
        with pytest.raises(ValueError, match="holds no adapters, so there is nothing to merge"):
            main(["--ckpt", str(whole), "--out", str(tmp_path / "again.pt")])
    assert not (tmp_path / "again.pt").exists()


def test_nothing_that_is_read_is_replaced(run, tmp_path):
    """Not the adapters, not their base, and no folder with other files."""
    base, path, _ = run
    before = base.read_bytes(), path.read_bytes()
    for out, line in ((base, "would replace the base"), (path, "would replace")):
        with pytest.raises(ValueError, match=line):
            main(["--ckpt", str(path), "--out", str(out), "--force"])
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt"):
        main(["--ckpt", str(path), "--peft", str(tmp_path / "own"), "--force"])
    with pytest.raises(ValueError, match="give --out FILE"):
        main(["--ckpt", str(path)])
    assert (base.read_bytes(), path.read_bytes()) == before


def test_the_base_of_a_base_is_not_replaced(run, tmp_path):
    """Adapters of a base that is itself a file of adapters: that one lost its own base."""
    base, path, _ = run
    source = read_checkpoint(path)
    model = build_model(source)
    attach(model, new_adapter(source, source.model_config, 2))
    second = save(tmp_path / "second", 9, move_adapters(model), None)
    before = base.read_bytes()
    for out, above in ((base, path), (path, second)):
        with pytest.raises(ValueError, match=f"would replace the base of {above}"):
            main(["--ckpt", str(second), "--out", str(out), "--force"])
    assert base.read_bytes() == before
    assert main(["--ckpt", str(second), "--out", str(tmp_path / "merged.pt")]) == 0


def test_a_folder_for_peft_is_written_and_replaced(run, tmp_path, capsys):
    base, path, _ = run
    for flags in ([], ["--force"]):
        assert main(["--ckpt", str(path), "--peft", str(tmp_path / "adapter"), *flags]) == 0
    assert f"next to the export of {base}" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 2
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta" in names


def test_predict_and_exports_take_adapters_as_they_are(run, tmp_path, monkeypatch, capsys):
    """They merge as they read: the answer and the files are the merged checkpoint's."""
    _, path, _ = run
    main(["--ckpt", str(path), "--out", str(tmp_path / "merged.pt")])
    answers = []
    for ckpt in (path, tmp_path / "merged.pt"):
        predictor, config = predictor_of(str(ckpt), max_new_tokens=12, temperature=0.0)
        answers.append("".join(predictor.stream("a", config)))
    assert answers[0] == answers[1]
    for ckpt, name in ((path, "a"), (tmp_path / "merged.pt", "b")):
        export_hf.main(["--ckpt", str(ckpt), "--out", str(tmp_path / name)])
        export_gguf.main(["--ckpt", str(ckpt), "--out", str(tmp_path / f"{name}.gguf")])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert build_model(read_checkpoint(path)).config.vocabulary_size == 257
