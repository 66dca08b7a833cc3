"""Fine-tuning of a published class with its own tokenizer and its own chat template."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config_model import PredictConfig
from runtime.checkpoint.read import read_checkpoint
from runtime.data.tokenizers import tokenizer_from_state
from runtime.inference.predictor import Predictor
from scripts import import_hf, sft
from tests.builders_posttraining import QUICK, chats, in_folder
from tests.data.test_chat_template import CHATML, THINKING, qwen
from tests.scripts.test_import_hf import FAMILIES, SIZES

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Return the checkpoint of a tiny Qwen3-MoE, in ChatML."""
    folder = tmp_path_factory.mktemp("qwen3")
    name, sizes = FAMILIES["qwen3_moe"]
    values = SIZES | sizes | dict(vocab_size=804, eos_token_id=802, bos_token_id=None)
    config = getattr(transformers, f"{name}Config")(**values | {"max_position_embeddings": 128})
    torch.manual_seed(0)
    qwen(folder)
    # After the tokenizer, whose config.json says no more than what ends a text.
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    out = folder / "imported.pt"
    assert import_hf.main(["--model", str(folder), "--out", str(out)]) == 0
    return out


def test_an_imported_chat_model_keeps_its_template(imported, tmp_path, capsys):
    """No id is added, the answers end as the model's own do, and it learns them."""
    flags = ["--init_from", str(imported), "--data", str(chats(tmp_path / "chats.jsonl"))]
    steps = ["--max_steps", "40", "--optimizer", "muon", "--lr", "1e-2"]
    assert sft.main([*flags, *in_folder(tmp_path), *QUICK, *steps]) == 0
    output = capsys.readouterr().out
    assert "<|im_start|>assistant" in output and "<|im_end|>]" in output
    assert "python predict.py --chat --ckpt" in output
    before, after = read_checkpoint(imported), read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert after.model_config.vocabulary_size == before.model_config.vocabulary_size
    tokenizer = tokenizer_from_state(after.tokenizer_state)
    assert tokenizer.fingerprint == tokenizer_from_state(before.tokenizer_state).fingerprint
    config = PredictConfig(
        ckpt=str(tmp_path / "ckpt" / "latest.pt"), chat=True, quiet=True, temperature=0.0
    )
    predictor = Predictor(config)
    answer = "".join(predictor.stream(predictor.prompt_ids("7 + 1?"), config))
    # A sum's digits, and the end of the model's own layout.
    assert predictor.last.ended and answer.strip().isdigit()


def imported_with(template: str, imported: Path, folder: Path) -> Path:
    """Import the model of `imported` again, with another chat template; return its checkpoint."""
    qwen(folder, template)
    for path in imported.parent.glob("*"):
        if path.suffix in (".safetensors", ".json") and not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_bytes((imported.parent / "config.json").read_bytes())
    out = folder / "again.pt"
    assert import_hf.main(["--model", str(folder), "--out", str(out)]) == 0
    return out


def test_a_template_that_changes_earlier_answers_is_one_line(imported, tmp_path):
    """Qwen3's own leaves earlier thoughts out: a prefix is then no prefix, and no mask is right."""
    out = imported_with(THINKING, imported, tmp_path / "thinking")
    flags = ["--init_from", str(out), "--data", str(chats(tmp_path / "chats.jsonl"))]
    with pytest.raises(ValueError, match="train on the last answer"):
        sft.main([*flags, *in_folder(tmp_path), *QUICK])


def test_a_template_with_the_date_resumes_on_another_day(imported, tmp_path, monkeypatch):
    """gpt-oss's own writes today's date. The run's ids were other ones then, and it was refused."""
    dated = "{{ strftime_now('%d %B %Y') }}\n" + CHATML
    out = imported_with(dated, imported, tmp_path / "dated")
    flags = ["--init_from", str(out), "--data", str(chats(tmp_path / "chats.jsonl"))]
    assert sft.main([*flags, *in_folder(tmp_path), *QUICK]) == 0

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2099, 5, 1)

    for module in ("runtime.data.chat_template", "runtime.posttraining.tuning"):
        clock = SimpleNamespace(datetime=Later)
        monkeypatch.setattr(f"{module}.datetime", clock)
    assert sft.main(["--resume", *in_folder(tmp_path), "--max_steps", "8"]) == 0
    assert sft.main(["--resume", *in_folder(tmp_path), "--max_steps", "9"]) == 0
