"""Tokenizers for tests: stand-ins for published ones."""

from __future__ import annotations

import json
from pathlib import Path

import tiktoken

from runtime.data.hf_tokenizer import SPACE
from runtime.data.tokenizer import WORD_PATTERN
from runtime.data.tokenizers import train_bpe

TALE = [
    "Once upon a time there was a cat named Tom. Tom's cat-friend said: \"I'LL come at "
    "10:45, won't I?\"\n\n",
    "The dog ran to the big tree. " * 3,
]


def stand_in(extra_tokens=()) -> tiktoken.Encoding:
    """A small vocabulary under gpt2's name, built as published ones are.

    The bytes have an order of their own, some ids mean nothing, specials come last.
    """
    merges = sorted(
        train_bpe(TALE * 20, 320).encoding._mergeable_ranks.items(), key=lambda item: item[1]
    )[256:]
    tokens = (
        [bytes([b * 77 % 256]) for b in range(256)]
        + [token for token, _ in merges]
        + list(extra_tokens)
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=WORD_PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": len(tokens) + 1, "<|other|>": len(tokens) + 3},
    )


def read_tales(shared_dir: Path) -> list[str]:
    """Return the real validation texts."""
    return [
        json.loads(line)["text"]
        for line in (shared_dir / "tinystories" / "valid.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]


def special(i: int, content: str, is_special: bool = True) -> dict:
    return {
        "id": i,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def write_folder(folder: Path, data: dict, **files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in {"tokenizer": data, **files}.items():
        (folder / f"{name}.json").write_text(
            json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8"
        )
    return folder


def mixtral_folder(tales: list[str], folder: Path) -> Path:
    """Write a tokenizer as Mixtral's.

    Spaces as ▁, one before every text, bytes as <0xAB>, texts between <s> and </s>, <unk> = 0. One
    id, 700, stands for nothing.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, trainers

    made = Library(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    made.train_from_iterator(
        (word for text in tales[:200] for word in text.split()),
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
            limit_alphabet=60,
        ),
    )
    data = json.loads(made.to_str())
    data["model"]["vocab"] |= {f"<0x{b:02X}>": 701 + b for b in range(256)}
    data["model"] |= {"byte_fallback": True, "fuse_unk": True}
    data["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return write_folder(
        folder,
        data,
        config={"eos_token_id": 2, "bos_token_id": 1},
        tokenizer_config={
            "tokenizer_class": "TokenizersBackend",
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", **special(2, "</s>")},
            "chat_template": "{{ messages }}",
        },
    )


def qwen_folder(tales: list[str], folder: Path) -> Path:
    """Write a tokenizer as Qwen3's: byte-level, digits one by one, NFC, nothing before a text.

    A chat model's, which stops at two ids, with an added token that is not special.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made = Library(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.train_from_iterator(
        tales[:200],
        trainers.BpeTrainer(
            vocab_size=800,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    data = json.loads(made.to_str())
    data["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    data["added_tokens"] = [
        special(800, "<|endoftext|>"),
        special(801, "<|im_start|>"),
        special(802, "<|im_end|>"),
        special(803, "<think>", False),
    ]
    data["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    write_folder(
        folder,
        data,
        generation_config={"eos_token_id": [802, 800]},
        config={"eos_token_id": 802},
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    )
    (folder / "chat_template.jinja").write_text("{{ bos }}")
    return folder
