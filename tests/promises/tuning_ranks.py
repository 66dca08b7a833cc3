"""Fine-tunings on two ranks, with and without adapters, against one process."""

from __future__ import annotations

import dataclasses
import itertools
import random

from runtime.base.ranks import ONE_PROCESS
from runtime.data.tokenizers import load_tokenizer
from tests.builders_posttraining import QUICK, chats, in_folder, pairs, tiny_base
from tests.builders_tuned import differing, tuned
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt, folder
from tests.promises.many_ranks import random_full_registers
from tests.ranks import run_on

CONTEXT = 64
TUNINGS = [*itertools.product(("sft", "dpo"), ([], ["--lora_rank", "4"]))]


def base_values(seed: int, kind: str, is_frozen: bool) -> dict:
    """Return the settings of a random base that a kind of fine-tuning takes."""
    changes = dict(vocabulary_size=load_tokenizer("byte").vocabulary_size, context_length=CONTEXT)
    if kind == "dpo":
        changes["dropout"] = 0.0
    if not is_frozen:
        # Half of one number for each of 260 ids does not fill registers.
        changes["head_bias"] = False
    return dataclasses.asdict(dataclasses.replace(random_full_registers(seed), **changes))


def two_ranks(count: int) -> Tally:
    """SFT and DPO, of all weights and of adapters, from random bases: two ranks are one process.

    Compared: all weights, the plain model that scores ask, moments, and all that is logged: losses,
    norms, validation, scores.
    """
    tally, tensors = Tally(), 0
    for case in range(count):
        seed, (kind, flags) = FIRST_SEED + case, TUNINGS[case % len(TUNINGS)]

        def check(seed=seed, kind=kind, flags=flags):
            nonlocal tensors
            r, is_frozen = random.Random(seed), bool(flags)
            flags = [*QUICK, *flags, "--batch_size", str(r.choice([1, 2])), "--grad_accum", "2"]
            flags += ["--optimizer", r.choice(["adamw", "muon"])]
            with folder() as here:
                base = tiny_base(here / "base", seed, **base_values(seed, kind, is_frozen))
                data = (chats if kind == "sft" else pairs)(here / "data.jsonl", 200)
                flags += ["--init_from", str(base), "--data", str(data)]
                one = tuned(ONE_PROCESS, kind, [*flags, *in_folder(here / "1")])
                flags += [*in_folder(here / "2"), "--shard", r.choice(["full", "none"])]
                others = run_on(2, tuned, kind, flags)
            tensors += sum(map(len, one[:3]))
            for rank, other in enumerate(others):
                names = differing(one, other)
                assert not names, f"rank {rank}, {len(names)} differ: {names[:3]}"

        attempt(tally, f"{kind} {' '.join(flags)} (seed {seed})", check)
    tally.detail["tensors compared"] = tensors
    return tally


PROMISES = [
    Promise(
        64,
        "SFT and DPO on two ranks are those of one process, to the bit, with adapters or without",
        two_ranks,
        0,
        60,
        60,
    ),
]
