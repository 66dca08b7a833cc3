"""runtime/interop/model_card.py: the card says what the run recorded, and "unknown" for the rest.

No file can make it say anything else.
"""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from config_model import ModelConfig, TrainConfig, active_parameters, total_parameters
from runtime.checkpoint.format import Checkpoint
from runtime.data.tokenizer import WORD_PATTERN, Tokenizer, encoding_of
from runtime.data.tokenizers import load_tokenizer
from runtime.interop.evaluation_rows import read_evaluation
from runtime.interop.export import Source
from runtime.interop.model_card import plain, write_card
from runtime.training.metrics import MetricsLog
from tests.builders import random_model, tiny_config
from tests.builders_export import imported

CONFIG = tiny_config(vocabulary_size=257)
FILES = {
    "files": [
        {"name": "/home/someone/secret project/stories.jsonl", "bytes": 2048},
        {"name": "C:\\texts\\b.txt", "bytes": 1024},
    ],
    "text_column": "text",
}


def source_of(tmp_path: Path, config: ModelConfig = CONFIG, **changes) -> Source:
    """A checkpoint of a run, as write_card sees it."""
    train = dataclasses.asdict(
        TrainConfig(
            graph_dir=str(tmp_path / "graphs"),
            optimizer="muon",
            batch_size=4,
            grad_accum=2,
            max_steps=500,
            warmup_steps=10,
        )
    )
    run = {"run_id": "abc123", "tokens_seen": 76_800, "train_seconds": 130.0}
    values = dict(
        path=tmp_path / "best.pt",
        step=300,
        model_config=config,
        model={},
        optimizer=None,
        val_loss=2.0,
        train_config=train,
        tokenizer_state=None,
        data_fingerprint="f00d",
        run=run,
        versions={"torch": "2.13.0", "python": "3.11.7"},
        is_reference_format=False,
    )
    return Source(
        tmp_path / "best.pt",
        random_model(config),
        Checkpoint(**values | changes),
        load_tokenizer("byte"),
    )


def write_metrics(
    tmp_path: Path, run_id: str = "abc123", source: object = FILES, last_step: int = 400
) -> None:
    log = MetricsLog(
        tmp_path / "graphs",
        run_info={"run_id": run_id, "source": source, "device": "cpu (1 thread)"},
    )
    for step in range(10, last_step + 1, 10):
        log.append(
            {
                "step": step,
                "kind": "train",
                "tokens_seen": step * 256,
                "loss": 5 - step / 100,
                "expert_load": [[1.0] * 4] * 2,
            }
        )
        log.append(
            {
                "step": step,
                "kind": "val",
                "tokens_seen": step * 256,
                "loss": 5 - step / 100 + 0.05,
                "perplexity": 7.5,
                "bits_per_byte": 1.25,
            }
        )
    log.finish()


def card(tmp_path: Path, source: Source, family: str | None = "qwen3_moe") -> str:
    folder = tmp_path / "my model"
    folder.mkdir(exist_ok=True)
    write_card(folder, source, family, "bfloat16")
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(text: str) -> dict:
    """The YAML at the top, which is written as JSON values, one a line."""
    _, front, _ = text.split("---\n", 2)
    return {
        key: json.loads(value)
        for key, value in (line.split(": ", 1) for line in front.splitlines())
    }


def test_what_the_run_recorded(tmp_path):
    """Counts, losses up to the checkpoint's step and no further, pictures from those records.

    What was read is named without the machine's paths.
    """
    write_metrics(tmp_path)
    text = card(tmp_path, source_of(tmp_path))
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "gptoss"],
    }
    assert (
        "# my model\n" in text
        and (
            f"{total_parameters(CONFIG):,}, {active_parameters(CONFIG):,} active for each token; "
            "stored as bfloat16"
        )
        in text
    )
    for line in (
        "| class | Qwen3MoeForCausalLM |",
        "| tokenizer | byte, 257 ids |",
        "| context | 32 tokens |",
        "| steps | 300 of 8 x 32 tokens; 500 were planned |",
        "| tokens seen | 76.8 k |",
        "| validation loss | 2.000 nats per token, perplexity 7.389 |",
        "| time | 2 min 10 s on cpu (1 thread) |",
        "| optimizer | muon, learning rate 0.0003 to 3e-05, schedule cosine |",
        "| text | stories.jsonl, b.txt (3.0 KiB) |",
        "| run | abc123 |",
        "| data fingerprint | f00d |",
        "| versions | torch 2.13.0, python 3.11.7 |",
    ):
        assert line in text, line
    assert "someone" not in text and "secret" not in text and str(tmp_path) not in text
    rows = re.findall(
        r"^\| ([\d,]+) \| ([\d.]+ k) \| ([\d.]+) \| ([\d.]+) \| 7.5 \| 1.25 \|$", text, re.M
    )
    assert (
        len(rows) == 8
        and rows[0] == ("10", "2.56 k", "4.9", "4.95")
        and rows[-1] == ("300", "76.8 k", "2", "2.05")
    )
    assert [name in text for name in ("(loss.png)", "(expert_load.png)")] == [True, True]
    assert sorted(path.name for path in (tmp_path / "my model").iterdir()) == [
        "README.md",
        "expert_load.png",
        "loss.png",
    ]
    assert len(text.splitlines()) < 85


@pytest.mark.parametrize("spoil", ["another run's", "damaged", "gone", "no run", "no matplotlib"])
def test_metrics_that_are_not_this_runs_are_not_shown(tmp_path, monkeypatch, spoil):
    """artifacts/graphs is every run's default folder: files there may be a later run's.

    The card is then written as if the folder were empty.
    """
    if spoil != "gone":
        write_metrics(tmp_path, "def456" if spoil == "another run's" else "abc123")
    if spoil == "damaged":
        (tmp_path / "graphs" / "metrics.jsonl").write_text('{"step": 10\n{"step": 20}\n')
        (tmp_path / "graphs" / "metrics.json").write_text("[]")
    if spoil == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    text = card(
        tmp_path, source_of(tmp_path, run={} if spoil == "no run" else {"run_id": "abc123"})
    )
    assert [path.name for path in (tmp_path / "my model").iterdir()] == [
        "README.md"
    ] and ".png" not in text
    if spoil != "no matplotlib":
        assert (
            "| text | unknown |" in text
            and "7.5" not in text
            and "Its curves were not found" in text
        )
    assert "| tokens seen | unknown |" in text


def test_a_data_set_of_the_hub_is_named_and_a_folder_is_not(tmp_path, monkeypatch):
    write_metrics(
        tmp_path,
        source={
            "dataset": "roneneldan/TinyStories",
            "config": None,
            "split": "train",
            "text_column": "text",
        },
    )
    text = card(tmp_path, source_of(tmp_path))
    assert (
        front_matter(text)["datasets"] == ["roneneldan/TinyStories"]
        and "| text | roneneldan/TinyStories, train |" in text
    )
    write_metrics(
        tmp_path, source={"dataset": f"{tmp_path}/someones/texts", "config": None, "split": "train"}
    )
    text = card(tmp_path, source_of(tmp_path))
    assert "datasets" not in front_matter(text) and "| text | texts, train |" in text
    (tmp_path / "stories").mkdir()
    monkeypatch.chdir(tmp_path)
    write_metrics(tmp_path, source={"dataset": "stories", "config": None, "split": "train"})
    assert "datasets" not in front_matter(card(tmp_path, source_of(tmp_path)))
    write_metrics(tmp_path, source={"dataset": "toy", "num_stories": 500})
    text = card(tmp_path, source_of(tmp_path))
    assert "datasets" not in front_matter(text) and "500 stories that gptoss made itself" in text
    assert "license" not in front_matter(text) and "Unknown here: the licence" in text


def test_weights_without_a_run(tmp_path):
    """Imported models get a short card that says so; custom code is named with a warning.

    The original implementation's checkpoints have a loss that is not comparable to ours.
    """
    imported = card(tmp_path, source_of(tmp_path, train_config={}, run={}, val_loss=None, step=0))
    assert (
        "without a record of their training" in imported
        and "from scratch" not in imported
        and "| steps |" not in imported
    )
    assert (
        "Nothing about its quality was measured here" in imported
        and len(imported.splitlines()) < 50
    )
    reference = card(
        tmp_path,
        source_of(
            tmp_path,
            train_config={},
            run={},
            versions={},
            data_fingerprint="",
            is_reference_format=True,
        ),
    )
    assert (
        "from scratch with the original implementation" in reference
        and "2.000 nats per token (an auxiliary loss included), perplexity 7.389" in reference
    )
    assert "| optimizer | unknown |" in reference and "| run |" not in reference
    tuned = card(tmp_path, source_of(tmp_path, train_config={"init_from": "/home/someone/base.pt"}))
    assert "trained from the weights in base.pt with gptoss" in tuned and "/home" not in tuned
    custom = card(
        tmp_path,
        source_of(tmp_path, config=tiny_config(vocabulary_size=257, use_attention_bias=True)),
        family=None,
    )
    assert (
        front_matter(custom)["tags"] == ["mixture-of-experts", "gptoss", "custom_code"]
        and custom.count("folder, trust_remote_code=True)") == 2
    )
    assert (
        "GptossForCausalLM (modeling_gptoss.py)" in custom
        and "It cannot read more than 32 tokens" in custom
    )


HOSTILE = (
    "x | y\n---\nlicense: mit\n# "
    "<script>`*_[click](https://evil.example)![i](www.evil.example/a.png) ~~ \x1b[31m "
    "\N{RIGHT-TO-LEFT OVERRIDE}" + "z" * 500
)


def test_a_checkpoints_words_are_text_and_nothing_else(tmp_path):
    """A header may come from anyone: no value adds a line, a cell, a heading, a link or a key.

    Nor does it break the front matter or the export.
    """
    train = dict.fromkeys(dataclasses.asdict(TrainConfig()), HOSTILE) | {
        "graph_dir": str(tmp_path / "graphs")
    }
    write_metrics(tmp_path, HOSTILE, {"files": [{"name": HOSTILE, "bytes": float("inf")}, 3]})
    source = source_of(
        tmp_path,
        train_config=train,
        run={"run_id": HOSTILE, "tokens_seen": HOSTILE, "train_seconds": float("nan")},
        versions={HOSTILE: HOSTILE, "torch": ["2"]},
        data_fingerprint=HOSTILE,
        val_loss=float("nan"),
    )
    text, calm = card(tmp_path, source), card(tmp_path, source_of(tmp_path))
    assert (
        set(front_matter(text))
        == {"library_name", "pipeline_tag", "tags"}
        == set(front_matter(calm))
    )
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in calm.splitlines() if line.startswith("#")
    ]
    assert "not measured at this step" in text and "| tokens seen | unknown |" in text
    # What is left when escaped characters are taken out.
    rest = re.sub(r"\\[\\`*_\[\]|~#<>&!$.:@]", "", text.split("```\n", 1)[1])
    for ours in ("`tokenizer.eos_token`", "`add_bos_token=False`"):
        rest = rest.replace(ours, "")
    assert re.fullmatch(r"<!-- written by gptoss, [0-9a-f]{16} -->", text.splitlines()[-1])
    for line in rest.splitlines()[:-1]:
        assert not re.search(r"<|`|https?://|www\.|~~|\x1b|\u202e", line) and len(line) < 500, line
        assert line.count("|") in (0, 3, 7), line
    for key, value in (
        ("graph_dir", "\0"),
        ("graph_dir", 3),
        ("graph_dir", str(tmp_path / "README.md")),
    ):
        card(tmp_path, source_of(tmp_path, train_config={key: value}))
    assert plain("a_b | <i>`c` https://d.e www.f.g") == r"a\_b \| \<i\>\`c\` https\://d.e www\.f.g"


def test_the_code_in_the_card_runs(tmp_path, monkeypatch, capsys):
    """A reader who pastes it into a Python in that folder gets text."""
    from safetensors.torch import save_file

    from runtime.data.hf_tokenizer import write_tokenizer
    from runtime.interop.huggingface import export_tensors, family_of, hf_config

    source = source_of(tmp_path)
    text, folder, tokenizer = card(tmp_path, source), tmp_path / "my model", source.tokenizer
    family = family_of(CONFIG)
    save_file(
        {
            name: tensor.detach().contiguous()
            for name, tensor in export_tensors(CONFIG, family, source.model.state_dict())
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = hf_config(
        CONFIG,
        family,
        end_of_text_id=tokenizer.end_of_text_id,
        start_id=tokenizer.start_id,
        dtype="float32",
    )
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(tokenizer, folder, CONFIG.context_length)
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace(
        "max_new_tokens=16", "max_new_tokens=4"
    )
    (folder / "example.py").write_text(code)
    with torch.no_grad():
        runpy.run_path(str(folder / "example.py"))
    assert "\n<|endoftext|>Once upon a time" in capsys.readouterr().out


def test_what_the_tokenizer_adds_is_said(tmp_path):
    """Users put a second start before a prompt, or lose the ends of texts when they train."""
    ours = source_of(tmp_path)
    text = card(tmp_path, ours)
    assert r"puts \<|endoftext|\> before a text".replace("|", r"\|") in text
    assert r"Padding is \<|pad|\>, which is in no text.".replace("|", r"\|") in text
    assert "`add_bos_token=False`" in text and "on the right" not in text
    biased = source_of(tmp_path, dataclasses.replace(CONFIG, use_attention_bias=True))
    assert "on the right, because this model has learned biases" in card(tmp_path, biased, None)
    tokens = [bytes([b]) for b in range(256)] + [b"\xff\xff"]
    full = Tokenizer("bpe:258", encoding_of("bpe:258", tokens, WORD_PATTERN))
    text = card(tmp_path, dataclasses.replace(ours, tokenizer=full))
    assert r"Padding is \<|endoftext|\>, which also ends texts.".replace("|", r"\|") in text
    # A published tokenizer starts texts as it does, and its token for padding is named.
    theirs = imported(stop_ids=(258,), start_id=None)
    text = card(tmp_path, dataclasses.replace(ours, tokenizer=theirs))
    assert "before a text" not in text and r"Padding is \<\|end\|\>, which also" in text


def test_a_record_that_a_later_run_moved_aside_is_found(tmp_path, capsys):
    """A new run with the same graph folder moves metrics.jsonl to metrics-1.jsonl.

    The next export of the first run's model silently had no curves.
    """
    write_metrics(tmp_path)
    source = source_of(tmp_path)
    folder = Path(source.checkpoint.train_config["graph_dir"])
    (folder / "metrics.jsonl").rename(folder / "metrics-1.jsonl")
    assert "![Loss" in card(tmp_path, source) and "note" not in capsys.readouterr().out
    (folder / "metrics-1.jsonl").unlink()
    card(tmp_path, source)
    assert "metrics were not found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("", None),
        ("a/b/c", None),
        ('x"]\n/y', None),
        (["a/b"], None),
    ],
)
def test_a_card_names_the_published_model_that_it_comes_from(tmp_path, name, expected):
    """The licence of imported weights is their model's: without its name nobody can look for it."""
    source = source_of(tmp_path, run={"imported_from": name}, train_config={})
    text = card(tmp_path, source)
    assert front_matter(text).get("base_model") == expected and (
        expected is None or f"training, {expected}: see" in text
    )


def test_the_cards_example_fits_the_context(tmp_path):
    """The card asked a model for 100 tokens after a prompt.

    Its learned attention bias ends at 32 positions: its own card crashed.
    """
    assert "max_new_tokens=16)" in card(tmp_path, source_of(tmp_path))


# ------------------------------------------------------------------------------ an evaluation
def write_report(tmp_path: Path, weights_digest: str = "d1", **changes) -> Path:
    report = {
        "format": "gptoss evaluation",
        "checkpoint": {"weights_digest": weights_digest},
        "data": {"sources": ["valid.jsonl"], "documents": 1234},
        "text": {
            "figures": {
                "bits_per_byte": {
                    "value": 0.81234,
                    "low": 0.8,
                    "high": 0.82,
                    "n": 1234,
                    "unit": "bits per byte",
                }
            }
        },
        "tasks": {
            "files": {
                "figures": {
                    "pairs_sum": {"value": 0.75, "n": 40},
                    "pairs_sum_centered": {"value": 0.5, "n": 40},
                }
            }
        },
    }
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report | changes), encoding="utf-8")
    return path


def evaluated(tmp_path: Path, **changes) -> Source:
    """A source with a report of its weights."""
    source = source_of(tmp_path, weights_digest="d1")
    report = read_evaluation(write_report(tmp_path, **changes), source.checkpoint)
    return dataclasses.replace(source, evaluation=report)


def test_a_report_gives_the_card_its_figures_with_interval_and_n(tmp_path):
    text = card(tmp_path, evaluated(tmp_path))
    assert "| bits per byte | 0.8123 | 0.8 to 0.82 | 1,234 | bits per byte |" in text
    assert "| pairs sum | 0.75 |  | 40 |  |" in text and "centered" not in text
    assert "1,234 documents of valid.jsonl" in text
    assert "No benchmark was run" not in text
    assert text.index("## Training") < text.index("## Evaluation") < text.index("## Limits")


def test_without_a_report_the_card_is_as_it_was(tmp_path):
    text = card(tmp_path, source_of(tmp_path))
    assert "## Evaluation" not in text and "\n\n\n" not in text
    assert "No benchmark was run" in text


def test_a_report_of_other_weights_is_refused(tmp_path):
    """Its figures would be of a model that nobody gets with this card."""
    checkpoint = source_of(tmp_path, weights_digest="d2").checkpoint
    with pytest.raises(ValueError, match="of other weights"):
        read_evaluation(write_report(tmp_path), checkpoint)
    # Nor do weights without a digest agree with a report that has none.
    unknown = dataclasses.replace(checkpoint, weights_digest="")
    with pytest.raises(ValueError, match="of other weights"):
        read_evaluation(write_report(tmp_path, ""), unknown)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "gptoss evaluation"}', "\0"])
def test_what_is_no_report_is_one_line(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="report.json") as error:
        read_evaluation(path, source_of(tmp_path, weights_digest="d1").checkpoint)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot read --evaluation"):
        read_evaluation(tmp_path / "none.json", source_of(tmp_path).checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": 3, "tasks": [1], "chat": {"a": None}, "data": None},
        {"text": {"figures": {"a|b": {"value": "x"}, "c": {"value": True, "n": "y"}}}},
        {"data": {"sources": "x", "documents": "many"}},
        {"text": {"figures": {"<b>[x](y)|`z`": {"value": 1.5, "n": 2, "unit": "<script>"}}}},
    ],
)
def test_nothing_in_a_report_is_markup(tmp_path, changes):
    text = card(tmp_path, evaluated(tmp_path, **changes))
    table = [line for line in text.partition("## Evaluation")[2].splitlines() if "|" in line]
    rows = [line for line in table if not line.startswith("|---")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert not re.search(r"(?<!\\)[<`]", "".join(rows))
