"""The guarantees on adapters: merged or in peft the same function, and a base that stays."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import tempfile
import warnings
from pathlib import Path

import torch

from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.checkpoint.adapter import is_trained
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizer import NoTokenizer
from runtime.interop.adapters import write_peft
from runtime.interop.export import Source
from runtime.interop.hf_export import export_folder
from runtime.posttraining.lora import attach, merged_model, new_adapter
from runtime.training.optimizer import build_adamw
from tests.builders import random_architecture, random_model
from tests.builders_checkpoint import train
from tests.builders_lora import move_adapters
from tests.numeric import before_ties
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, folder
from tests.promises.published import random_family_config

# Of an adapter's B: logits move by about their size.
SIZE = 0.05


def random_base(config: ModelConfig, seed: int) -> LLM:
    """A random model whose float32 rounds to less than 1e-6 of its logits."""
    model = random_model(config, seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    return model


def adapted_run(at: Path, model: LLM, seed: int) -> tuple[Path, Path, LLM]:
    """Save a model, and random adapters on it; return both files and the adapted model."""
    r = random.Random(seed)
    config, settings = model.config, TrainConfig()
    base = save_checkpoint(at / "base", 0, model, None, train_config=settings, tokenizer_state=None)
    source, vocabulary = read_checkpoint(base), config.vocabulary_size
    first = r.randrange(vocabulary - 1)
    adapted = build_model(source)
    smallest = min(config.d_model, config.num_heads * config.attention_head_dim, config.d_ff)
    # 0 follows the other rank; with rank 1 most orders of a file's numbers are one.
    ranks = r.randint(1, min(4, smallest)), min(r.choice([0, 2, 3]), smallest)
    rows = r.choice([(), (first,), (first, first + 1)])
    attach(adapted, new_adapter(source, config, *ranks, r.choice([4.0, 8.0]), rows), seed)
    move_adapters(adapted, seed, SIZE)
    path = save_checkpoint(
        at / "run", 0, adapted, None, train_config=settings, tokenizer_state=None
    )
    return base, path, adapted


def ids_before_ties(model: LLM, seed: int) -> torch.Tensor:
    """Ids [2, 16] at which no router meets a near tie, where either expert is right."""
    drawn = (
        torch.randint(
            model.config.vocabulary_size, (2, 16), generator=torch.Generator().manual_seed(at)
        )
        for at in itertools.count(seed)
    )
    return next(ids for ids in drawn if before_ties(model, ids).all())


def same_in_peft(count: int) -> Tally:
    """Export a random base and adapters for peft: loaded, they give the adapted model's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tally, worst, moved = Tally(), 0.0, []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        family, config = random_family_config(seed)
        with tempfile.TemporaryDirectory() as name, folder():
            at = Path(name)
            base, path, adapted = adapted_run(at, random_base(config, seed), seed)
            source = read_checkpoint(base)
            whole = Source(base, build_model(source), source, NoTokenizer(config.vocabulary_size))
            export_folder(whole, at / "folder", torch.float32, 1 << 30, custom_code=False)
            write_peft(read_checkpoint(path), at / "adapter")
            theirs = AutoModelForCausalLM.from_pretrained(
                at / "folder", attn_implementation="eager"
            )
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                theirs = PeftModel.from_pretrained(theirs, at / "adapter").eval()
        lost = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
        ids = ids_before_ties(adapted, seed)
        with torch.no_grad():
            ours, found = adapted(ids).logits, theirs(ids).logits
            before = whole.model(ids).logits
        size = ours.abs().max().clamp(min=1)
        difference = ((ours - found).abs().max() / size).item()
        worst = max(worst, difference)
        moved.append(((ours - before).abs().max() / size).item())
        tally.add(
            difference <= 1e-5 and moved[-1] > 1e-2 and not lost,
            f"seed {seed}, {family}: logits differ by {difference:.1e}, moved by {moved[-1]:.1e}, "
            f"{lost}",
        )
    tally.detail = {
        "largest relative difference": f"{worst:.0e}",
        "least that adapters moved the logits": f"{min(moved, default=0.0):.2f}",
    }
    return tally


def merged_is_the_same(count: int) -> Tally:
    """Train adapters of a random architecture, save, merge the file: the same logits.

    The base's file has the same bytes, and its weights in memory are what they were.
    """
    tally, worst = Tally(), 0.0
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        config = random_architecture(random.Random(seed))
        # The norm of a few numbers can make much of a rounding.
        config = dataclasses.replace(config, d_model=max(16, config.d_model))
        with tempfile.TemporaryDirectory() as name, folder():
            base, path, adapted = adapted_run(Path(name), LLM(config), seed)
            before = base.read_bytes()
            weights = copy.deepcopy(adapted.state_dict())
            train(adapted, build_adamw(adapted, TrainConfig(lr=1e-3)), 3, seed)
            adapted.eval()
            path = save_checkpoint(
                path.parent, 3, adapted, None, train_config=TrainConfig(), tokenizer_state=None
            )
            merged = build_model(read_checkpoint(path))
            untouched = base.read_bytes() == before
        rows = adapted.adapter.rows
        for key, tensor in adapted.state_dict().items():
            if not is_trained(key):
                kept = torch.ones(len(tensor), dtype=torch.bool)
                if key in ("embed.weight", "out_head.weight", "out_head.bias"):
                    kept[rows] = False
                untouched = untouched and torch.equal(tensor[kept], weights[key][kept])
        ids = torch.randint(
            config.vocabulary_size, (2, 16), generator=torch.Generator().manual_seed(seed)
        )
        kept = before_ties(adapted, ids)[..., None]
        with torch.no_grad():
            ours, theirs = adapted(ids).logits, merged(ids).logits
            again = merged_model(adapted)(ids).logits
        size = ours.abs().max().clamp(min=1)
        difference = max(
            (((ours - found) * kept).abs().max() / size).item() for found in (theirs, again)
        )
        worst = max(worst, difference)
        tally.add(
            difference <= 1e-6 and untouched,
            f"seed {seed}: logits differ by {difference:.1e}, base untouched {untouched}",
        )
    tally.detail = {"largest relative difference": f"{worst:.0e}"}
    return tally


PROMISES = [
    Promise(
        45,
        "An adapter is the same function in peft, next to the exported base (three families, fp32 "
        "to 1e-5)",
        same_in_peft,
        3,
        30,
        60,
    ),
    Promise(
        46,
        "Merged weights compute what their adapters do (fp32 to 1e-6), and training adapters "
        "changes no byte of the base",
        merged_is_the_same,
        6,
        60,
        200,
    ),
]
