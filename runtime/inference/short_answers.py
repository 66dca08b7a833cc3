"""Short continuations of a few prompts by a model that is being trained, for --sample_prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from model import LLM, generate
from runtime.base.device import autocast
from runtime.base.ranks import Ranks
from runtime.data.chat import prompt_ids
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import tokenizer_from_state
from runtime.inference.console import read_prompts

# Of a file, and tokens of an answer: a validation should not take much longer.
MOST_PROMPTS, MOST_NEW_TOKENS = 16, 64
# One temperature and one seed, so that answers differ because the weights do.
TEMPERATURE, SEED = 0.8, 0

Answers = Callable[[LLM], list[tuple[str, str]]]


def short_answers(
    path: str, tokenizer_state: dict | None, chats: bool, dtype: torch.dtype, ranks: Ranks
) -> Answers | None:
    """Return what a model answers to the prompts of a file: f(model) -> (prompt, text) of each.

    path: "" = None is returned. chats: a prompt is a message to answer, not a text to continue.
    dtype: that of the trainer's autocast. ranks: that share the model and call this, and then f,
    together.
    Raise ValueError for a file without prompts or with more than MOST_PROMPTS, and for data
    without a tokenizer.
    """
    if not path:
        return None
    if tokenizer_state is None:
        raise ValueError("--sample_prompts needs text, and this data is token ids: leave it out")
    prompts = ranks.from_first(lambda: read_prompts(path))
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(
            f"--sample_prompts: {path} holds {len(prompts)} prompts, and at most {MOST_PROMPTS} "
            "are answered at each validation: keep those that say most"
        )
    tokenizer = tokenizer_from_state(tokenizer_state)
    ids = [_ids(prompt, tokenizer, chats) for prompt in prompts]

    def answers(model: LLM) -> list[tuple[str, str]]:
        # A compiled block would be compiled again for each length.
        with autocast(model.embed.weight.device, dtype), torch.compiler.set_stance("force_eager"):
            texts = [_answer(model, own, tokenizer, dtype) for own in ids]
        return list(zip(prompts, texts, strict=True))

    return answers


def _ids(prompt: str, tokenizer: Tokenizer, chats: bool) -> list[int]:
    if chats:
        return prompt_ids([{"role": "user", "content": prompt}], tokenizer)
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    return start + tokenizer.encode(prompt)


def _answer(model: LLM, prompt: Sequence[int], tokenizer: Tokenizer, dtype: torch.dtype) -> str:
    """Return the text after a prompt (ids) up to its end.

    There are MOST_NEW_TOKENS passes whatever is drawn, because ranks that share the model take each
    pass together, and their logits may be rounded otherwise.
    """
    device = model.embed.weight.device
    drawn = generate(
        model,
        torch.tensor([prompt], device=device),
        MOST_NEW_TOKENS,
        temperature=TEMPERATURE,
        banned_ids=tokenizer.banned_ids,
        generator=torch.Generator(device).manual_seed(SEED),
        cache_dtype=dtype,
    )
    ids = torch.stack(list(drawn))[:, 0].tolist()
    ends = (at for at, token in enumerate(ids) if token in tokenizer.all_stop_ids)
    return tokenizer.decode(ids[: next(ends, len(ids))])
