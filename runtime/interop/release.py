"""Release the model of a run: one small file that predict.py and every export read, and its card.

The file is a checkpoint of weights alone, in bfloat16, with its tokenizer and the record of its
training. The card says the same in Markdown. Both come from the run's own files.
"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import torch

from runtime.base.files import read_json_object, write_text_atomic
from runtime.base.text import human_count, human_seconds
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import write_weights
from runtime.checks.known import counts
from runtime.interop.export import staged

REPO = Path(__file__).resolve().parents[2]

CARD = """# {name}

A Mixture-of-Experts language model of {total} parameters, {active} of them active for each token. \
It tells small English stories.

```
{try_it}
```

| | |
|---|---|
| text | {num_stories:,} stories from the generator in this repository, and no other text |
| tokenizer | {tokenizer}, inside the file |
| steps | {step:,} of {sequences} x {context} tokens: {tokens} tokens |
| validation loss | {loss:.4f} nats per token, perplexity {perplexity:.3f} |
| weights | bfloat16, {size:,} bytes |
| made by | {commands} |
| commit | {commit} |
| time | {time} on {device} |
| versions | {versions} |

The loss is that of the float32 weights, before they were rounded, on stories left out of training.

## Limits

It has read nothing but generated stories, so it knows their names, plots and words only. \
It answers no questions, and it reads at most {context} tokens. The weights have the licence of \
this repository, because the text comes from its generator.
"""


def commit() -> str:
    """Return the commit of the code; empty if it is no checkout or git is not installed."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def release(ckpt: Path, metrics: Path, out: Path, commands: list[str], made_at: str) -> Path:
    """Write `out` and its card from a run's checkpoint and metrics.json; return the card's path.

    commands: what was typed, one for each start of the run. made_at: the commit of the code.
    """
    checkpoint = read_checkpoint(ckpt)
    info = read_json_object(metrics)["run"]
    run = {key: checkpoint.run[key] for key in ("run_id", "tokens_seen", "train_seconds")} | {
        "commands": commands,
        "commit": made_at,
        "source": info["source"],
        "device": info["device"],
    }
    size = sum(tensor.nbytes for tensor in checkpoint.model.values())
    with staged(out, size) as temporary:
        write_weights(
            temporary,
            checkpoint.model_config,
            checkpoint.model.__getitem__,
            torch.bfloat16,
            checkpoint.tokenizer_state,
            run,
            step=checkpoint.step,
            val_loss=checkpoint.val_loss,
            train_cfg=checkpoint.train_config,
            data_fingerprint=checkpoint.data_fingerprint,
        )
    card = out.with_suffix(".md")
    write_text_atomic(card, card_of(read_checkpoint(out)))
    return card


def card_of(checkpoint: Checkpoint) -> str:
    """Return the card of a released file."""
    c, run, train = checkpoint.model_config, checkpoint.run, checkpoint.train_config
    name = checkpoint.path.name
    assert checkpoint.val_loss is not None and checkpoint.tokenizer_state is not None
    return CARD.format(
        name=name,
        total=human_count(counts(c).total),
        active=human_count(counts(c).active),
        try_it=f'python predict.py --ckpt public/{name} --prompt "Once upon a time"',
        num_stories=run["source"]["num_stories"],
        tokenizer=checkpoint.tokenizer_state["name"],
        step=checkpoint.step,
        sequences=train["batch_size"] * train["grad_accum"],
        context=c.context_length,
        tokens=human_count(run["tokens_seen"]),
        loss=checkpoint.val_loss,
        perplexity=math.exp(checkpoint.val_loss),
        size=checkpoint.path.stat().st_size,
        commands=", then ".join(f"`{command}`" for command in run["commands"]),
        commit=run["commit"] or "unknown",
        time=human_seconds(run["train_seconds"]),
        device=run["device"],
        versions=", ".join(f"{key} {value}" for key, value in checkpoint.versions.items()),
    )
