"""Write the model card of an export, README.md: what the run recorded, and what is unknown.

Sources: the checkpoint's header, and the metrics in the run's graph_dir if they exist and are that
run's. A checkpoint may come from anywhere: nothing in it is read as Markdown or YAML. The card has
names of files, but no path of the training machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from pathlib import Path

from runtime.base.text import human_bytes, human_count, human_seconds, visible
from runtime.checkpoint.format import Checkpoint
from runtime.checks.known import counts
from runtime.data.hf_tokenizer import pad_id, pad_word
from runtime.data.tokenizer import END_OF_TEXT, IMPORTED, NoTokenizer
from runtime.interop.custom_code import MODELING_FILE
from runtime.interop.evaluation_rows import figures_of
from runtime.interop.export import Source
from runtime.interop.huggingface import FAMILIES
from runtime.training.metrics import read_records
from runtime.training.plots import draw_plots

PICTURES = {
    "loss": "Loss over the training steps",
    "expert_load": "How evenly the experts are used",
}
# Rows in the table of losses.
MOST_ROWS = 8
# A backslash joins two lines: the card has them as one.
CARD = """---
{front}
---

# {title}

A Mixture-of-Experts language model of {total} parameters, \
{active} of them active for each token{origin}. It continues {what}.

```python
{example}
```
{tokenizer_note}{code_note}
## Model

{model}

## Training

{training}
{evaluation}
## Limits

- A base model: it was not taught to follow instructions, to refuse, or to tell the truth. \
It repeats what its text holds, mistakes and prejudices included.
- {measured}
- {context}
- Unknown here: the licence of these weights and of the text, and what that text holds. \
Whoever publishes this folder should say so in this file.
"""

EXAMPLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={new_tokens})[0]))"""

CHAT_EXAMPLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
messages = [{{"role": "user", "content": "{prompt}"}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**prompt, max_new_tokens={new_tokens})[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""

IDS_EXAMPLE = """import torch
from transformers import AutoModelForCausalLM

folder = "."  # where this file is
model = AutoModelForCausalLM.from_pretrained(folder{trust})
prompt = torch.tensor([{prompt}])
print(model.generate(prompt, max_new_tokens={new_tokens})[0].tolist())"""

IDS_NOTE = """
Its tokenizer is unknown: this folder has none, and no id is known to begin or to end a text.
"""

START_NOTE = """
The tokenizer puts {start} before a text, as in training: do not add it yourself. \
It puts nothing after a text. To train on texts that end, add {end} to each. \
lm-evaluation-harness adds the start itself where it measures perplexity: \
there, give it `add_bos_token=False`.
"""
CHAT_NOTE = """
A message is `<|start|>role<|message|>content<|end|>`, and an answer ends at `<|end|>`. \
The chat template writes that, and marks the answers: \
`apply_chat_template(..., return_assistant_tokens_mask=True)` gives what was trained. \
These words in a message's text become control tokens too, \
unless `sanitize_control_tokens=True` is given.
"""
PAD_NOTE = """
Padding is {pad}, which is in no text.{side}
"""
END_PAD_NOTE = """
Padding is {pad}, which also ends texts. \
`DataCollatorForLanguageModeling` takes both out of the labels, so a model does not learn to end. \
To teach it that, make the labels from the attention mask.{side}
"""
RIGHT_SIDE = (
    " It is on the right, because this model has learned biases for absolute positions: "
    "generate from one prompt at a time, or from prompts of one length."
)

MEASURED = (
    "The figures under Evaluation are all that was measured of its quality, "
    "on the texts that are named there."
)

CODE_NOTE = f"""
No class of transformers has this architecture: `trust_remote_code` runs {MODELING_FILE} \
of this folder. Read it first if the folder is not yours.
"""


def write_card(folder: Path, source: Source, family: str | None, dtype: str) -> None:
    """Write README.md, and next to it the plots of the run.

    There are plots if the run's metrics are found and matplotlib is installed. family None: custom
    code.
    """
    checkpoint, config = source.checkpoint, source.model.config
    is_unknown = isinstance(source.tokenizer, NoTokenizer)
    ids = str([i % config.vocabulary_size for i in (12, 7, 99)])
    example = EXAMPLE if source.tokenizer.chat is None else CHAT_EXAMPLE
    records, info = _metrics(checkpoint)
    has_record = bool(checkpoint.train_config or checkpoint.is_reference_format)
    validation = _validation(checkpoint)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "gptoss"] + ["custom_code"] * (family is None),
    }
    if names := _hub_names(info.get("source")):
        front["datasets"] = names
    if base := _base_model(checkpoint):
        front["base_model"] = base
    if has_record and not records:
        print("note: the run's metrics were not found, so the model card has no curves")
    text = CARD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        title=plain(folder.name),
        total=human_count(counts(config).total),
        active=human_count(counts(config).active),
        origin=_origin(checkpoint) if has_record else "",
        what="sequences of token ids" if is_unknown else "text",
        example=(IDS_EXAMPLE if is_unknown else example).format(
            trust="" if family else ", trust_remote_code=True",
            prompt=ids if is_unknown else "Hello!",
            new_tokens=min(100, max(1, config.context_length // 2)),
        ),
        code_note="" if family else CODE_NOTE,
        tokenizer_note=IDS_NOTE if is_unknown else _tokenizer_note(source),
        model=_table(_model_rows(source, family, dtype)),
        training=_training(checkpoint, info, records, _draw(folder, records, checkpoint.step))
        if has_record
        else "This was made from weights without a record of their training"
        f"{f', {base}' * bool(base)}: see the model that they come from.",
        evaluation=_evaluation(source.evaluation),
        measured=MEASURED
        if source.evaluation
        else "The only measure of its quality here is the validation loss: "
        f"{validation}. No benchmark was run."
        if validation
        else "Nothing about its quality was measured here.",
        context=f"It cannot read more than {config.context_length:,} tokens: "
        "it has learned biases for those positions and none beyond."
        if config.use_attention_bias
        else f"What it does beyond {config.context_length:,} tokens was not tried.",
    )
    (folder / "README.md").write_text(
        f"{text}\n<!-- written by gptoss, {_digest(text)} -->\n", encoding="utf-8"
    )


def is_as_written(card: Path) -> bool:
    """Return whether a model card is what `write_card` wrote, or is missing.

    A card that someone edited must not be replaced.
    """
    if not card.exists():
        return True
    text, _, end = card.read_text(encoding="utf-8", errors="replace").rpartition(
        "\n<!-- written by gptoss, "
    )
    return end == f"{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------- escaping
def plain(value: object, most: int = 120) -> str:
    """Return a value as plain text in Markdown: one line, no markup, no link.

    The text has at most `most` characters.
    """
    text = " ".join(visible(str(value)).split())
    return re.sub(
        r"[\\`*_\[\]|~#<>&!$]|(?<=www)\.|:(?=//)|(?<=\w)@",
        r"\\\g<0>",
        text if len(text) <= most else text[:most] + "...",
    )


def number(value: object) -> float | None:
    """Return the value if it is a finite number, else None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def digits(value: object) -> str:
    """Return a number in four digits, or an empty text."""
    return "" if number(value) is None else f"{value:.4g}"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)]
    )


# --------------------------------------------------------------------------------------- records
def _metrics(checkpoint: Checkpoint) -> tuple[list[dict], dict]:
    """Return the run's records up to the checkpoint, and what metrics.json says about the run.

    Either is empty if its file is missing or is another run's.
    """
    run_id, folder = checkpoint.run.get("run_id"), checkpoint.train_config.get("graph_dir")
    if not (isinstance(run_id, str) and run_id and isinstance(folder, str)):
        return [], {}
    try:
        info = json.loads(Path(folder, "metrics.json").read_bytes())["run"]
        info = info if isinstance(info, dict) and info.get("run_id") == run_id else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        info = {}
    # A later run there renames an earlier one's file.
    for path in [Path(folder, "metrics.jsonl"), *sorted(Path(folder).glob("metrics-*.jsonl"))]:
        # OSError: missing. ValueError: damaged.
        with contextlib.suppress(OSError, ValueError):
            if records := [
                record
                for record in read_records(path)
                if record.get("run_id") == run_id and record["step"] <= checkpoint.step
            ]:
                return records, info
    return [], info


def _draw(folder: Path, records: list[dict], step: int) -> list[str]:
    """Plot the records and return the plots' names, without .png.

    The plots in graph_dir may include later steps, or be another run's.
    """
    try:
        drawn = draw_plots(records, folder, step, tuple(PICTURES)) if records else []
    # matplotlib is not installed.
    except ImportError:
        return []
    for path in drawn:
        path.unlink() if path.name.startswith("step_") else path.rename(
            folder / path.name.removeprefix("latest_")
        )
    return [name for name in PICTURES if (folder / f"{name}.png").exists()]


def _hub_names(source: object) -> list[str]:
    """Return the names of the Hub's datasets that a run's source says it read."""
    name = source.get("dataset") if isinstance(source, dict) else None
    is_name = (
        isinstance(name, str)
        and name != "toy"
        and re.fullmatch(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", name, re.ASCII)
        and not Path(name).exists()
    )
    return [name] if is_name else []


def _base_model(checkpoint: Checkpoint) -> str:
    """Return the Hub's name of the model that was imported; empty if that was a folder."""
    name = checkpoint.run.get("imported_from")
    return (
        name
        if isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", name, re.ASCII)
        else ""
    )


def _text_source(source: object) -> str:
    """Return the names of what was read."""
    if not isinstance(source, dict):
        return "unknown"
    if isinstance(files := source.get("files"), list):
        files = [file for file in files if isinstance(file, dict)]
        named = ", ".join(
            plain(str(file.get("name")).replace("\\", "/").rpartition("/")[2], 60)
            for file in files[:3]
        )
        size = human_bytes(sum(number(file.get("bytes")) or 0 for file in files))
        return f"{named}{f' and {len(files) - 3} more files' * (len(files) > 3)} ({size})"
    if source.get("dataset") == "toy":
        return f"{plain(source.get('num_stories'))} stories that gptoss made itself"
    name = (
        source.get("dataset")
        if _hub_names(source)
        else str(source.get("dataset")).replace("\\", "/").rpartition("/")[2]
    )
    parts = ", ".join(plain(source[key], 40) for key in ("config", "split") if source.get(key))
    return f"{plain(name)}, {parts}"


def _validation(checkpoint: Checkpoint) -> str:
    """Return validation loss and perplexity as text, or an empty text."""
    if (loss := number(checkpoint.val_loss)) is None:
        return ""
    included = " (an auxiliary loss included)" * checkpoint.is_reference_format
    # exp(710) overflows.
    return f"{loss:.3f} nats per token{included}, perplexity {math.exp(min(loss, 700)):.4g}"


# ----------------------------------------------------------------------------------------- parts
def _model_rows(source: Source, family: str | None, dtype: str) -> list[tuple[str, str]]:
    c = source.model.config
    name = "unknown" if isinstance(source.tokenizer, NoTokenizer) else source.tokenizer.name
    window = (
        f", the last {c.sliding_window:,} of them"
        + (" in every other block" if c.window_pattern == "alternating" else "")
        if c.sliding_window
        else ""
    )
    return [
        (
            "class",
            FAMILIES[family].architecture if family else f"GptossForCausalLM ({MODELING_FILE})",
        ),
        (
            "parameters",
            f"{counts(c).total:,}, {counts(c).active:,} active for each token; stored as {dtype}",
        ),
        ("blocks", f"{c.transformer_blocks:,}, {c.d_model:,} wide"),
        (
            "attention",
            f"{c.num_heads:,} query heads, {c.num_kv_heads:,} key/value heads, "
            f"{c.attention_head_dim:,} features each",
        ),
        (
            "experts",
            f"{c.num_experts:,} in each block, {c.top_k:,} for each token, "
            f"{c.d_ff:,} hidden features ({c.expert_activation.replace('_', ' ')})",
        ),
        ("context", f"{c.context_length:,} tokens{window}"),
        ("tokenizer", f"{plain(name)}, {source.tokenizer.vocabulary_size:,} ids"),
    ]


def _tokenizer_note(source: Source) -> str:
    """Return what the tokenizer puts before a text, and what padding is."""
    tokenizer = source.tokenizer
    is_ours = not tokenizer.name.startswith(IMPORTED)
    end = "`tokenizer.eos_token`" if tokenizer.chat is None else plain(END_OF_TEXT)
    start = START_NOTE.format(start=plain(END_OF_TEXT), end=end) if is_ours else ""
    start += "" if tokenizer.chat is None else CHAT_NOTE
    in_texts = pad_id(tokenizer) in (tokenizer.start_id, *tokenizer.stop_ids)
    side = RIGHT_SIDE if is_ours and source.model.config.use_attention_bias else ""
    note = END_PAD_NOTE if in_texts else PAD_NOTE
    return start + note.format(pad=plain(pad_word(tokenizer)), side=side)


def _origin(checkpoint: Checkpoint) -> str:
    start = checkpoint.train_config.get("init_from")
    how = f"from the weights in {plain(Path(str(start)).name, 60)}" if start else "from scratch"
    original = "the original implementation that gptoss follows"
    return f", trained {how} with {original if checkpoint.is_reference_format else 'gptoss'}"


def _training(checkpoint: Checkpoint, info: dict, records: list[dict], pictures: list[str]) -> str:
    """Return a table of the run, a table of its losses, and its plots."""
    run, train = checkpoint.run, checkpoint.train_config
    sizes, planned = (
        [number(train.get(key)) for key in ("batch_size", "grad_accum")],
        number(train.get("max_steps")),
    )
    steps = f"{checkpoint.step:,}" + (
        f" of {math.prod(sizes):,} x {checkpoint.model_config.context_length:,} tokens"
        if None not in sizes
        else ""
    )
    seconds, seen = number(run.get("train_seconds")), number(run.get("tokens_seen"))
    rates = " to ".join(filter(None, (digits(train.get(key)) for key in ("lr", "min_lr"))))
    rows = [
        ("text", _text_source(info.get("source"))),
        (
            "steps",
            steps
            + (f"; {planned:,} were planned" if planned not in (None, checkpoint.step) else ""),
        ),
        ("tokens seen", "unknown" if seen is None else human_count(seen)),
        ("validation loss", _validation(checkpoint) or "not measured at this step"),
        (
            "optimizer",
            f"{plain(train['optimizer'])}, learning rate {rates or 'unknown'}, "
            f"schedule {plain(train.get('schedule'))}"
            if "optimizer" in train
            else "unknown",
        ),
        (
            "time",
            ("unknown" if seconds is None else human_seconds(seconds))
            + (f" on {plain(info['device'])}" if "device" in info else ""),
        ),
        ("compute dtype", plain(train.get("dtype", "unknown"))),
        (
            "versions",
            ", ".join(
                f"{plain(name, 40)} {plain(version, 40)}"
                for name, version in list(checkpoint.versions.items())[:4]
            ),
        ),
        ("data fingerprint", plain(checkpoint.data_fingerprint)),
        ("run", plain(run.get("run_id", ""))),
    ]
    return "\n\n".join(
        [
            _table(rows),
            _loss_table(records) or "Its curves were not found when this file was written.",
            *(f"![{PICTURES[name]}]({name}.png)" for name in pictures),
        ]
    )


def _evaluation(report: dict) -> str:
    """Return the table of what was measured and a line about on what; "" for no report."""
    if not report:
        return ""
    rows = []
    for name, figure in figures_of(report):
        low, high = digits(figure.get("low")), digits(figure.get("high"))
        n = number(figure.get("n"))
        rows.append(
            [
                plain(name.replace("_", " "), 60),
                digits(figure.get("value")),
                f"{low} to {high}" if low and high else "",
                "" if n is None else f"{n:,}",
                plain(figure.get("unit", ""), 40),
            ]
        )
    heads = ["", "value", "95 % interval", "n", "unit"]
    lines = [heads, ["---"] * len(heads), *(row for row in rows if row[1])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"\n## Evaluation\n\n{_measured_on(report)}\n\n{table}\n"


def _measured_on(report: dict) -> str:
    """Return a line about the texts of a report."""
    data = report.get("data")
    if not isinstance(data, dict):
        return f"Measured on tasks{_with_weights(report)}."
    named = data.get("sources")
    sources = ", ".join(plain(name, 60) for name in named[:3]) if isinstance(named, list) else ""
    documents = number(data.get("documents")) or 0
    first = "the first " if data.get("are_all") is False else ""
    return (
        f"Measured on {first}{documents:,} documents of {sources or 'unknown files'}"
        f"{_with_weights(report)}. Bits per byte leave special tokens out."
    )


def _with_weights(report: dict) -> str:
    """Return how the weights were rounded when they were measured; "" if they were not."""
    settings = report.get("settings")
    said = settings if isinstance(settings, dict) else {}
    if said.get("quantize", "none") != "none":
        return f", with {plain(said['quantize'], 20)} weights"
    dtype = said.get("dtype", "float32")
    return "" if dtype == "float32" else f", in {plain(dtype, 20)}"


def _loss_table(records: list[dict]) -> str:
    """Return a table of validations, each with the last training loss before it.

    It has at most MOST_ROWS rows, the first and the last validation among them.
    """
    heads = ["step", "tokens", "training loss", "validation loss", "perplexity", "bits per byte"]
    rows: list[list[str]] = []
    train_loss = None
    # The sort is stable: a step's training record stays before its validation.
    for record in sorted(records, key=lambda record: record["step"]):
        if record["kind"] == "train":
            train_loss = record.get("loss")
            continue
        seen = number(record.get("tokens_seen"))
        rows.append(
            [
                f"{record['step']:,}",
                "" if seen is None else human_count(seen),
                digits(train_loss),
                *(digits(record.get(key)) for key in ("loss", "perplexity", "bits_per_byte")),
            ]
        )
    if not rows:
        return ""
    chosen = sorted({round(i * (len(rows) - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)})
    columns = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    lines = [heads, ["---:"] * len(heads), *(rows[i] for i in chosen)]
    return "\n".join(f"| {' | '.join(line[column] for column in columns)} |" for line in lines)
