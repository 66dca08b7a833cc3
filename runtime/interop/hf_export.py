"""Write a model as a Hugging Face folder, for transformers, vLLM and similar tools.

The architecture follows from the checkpoint's config: Mixtral, Qwen3-MoE or gpt-oss
(runtime/interop/huggingface.py). A model that none of them can hold is an error, unless
--custom_code exports it with its own modeling file. Weights stay mapped from the checkpoint. Memory
holds one tensor of the export at a time, and in the final check one block.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from config_model import ModelConfig, PredictConfig
from runtime.checkpoint.format import meta_model
from runtime.checks.known import counts
from runtime.data.hf_tokenizer import pad_id, write_tokenizer
from runtime.data.tokenizer import NoTokenizer
from runtime.interop import published
from runtime.interop.custom_code import (
    MODELING_FILE,
    custom_config,
    custom_tensors,
    modeling_source,
)
from runtime.interop.export import (
    DTYPES,
    ExportError,
    Source,
    check_ids,
    check_logits,
    check_published,
    largest_difference,
    lazy_model,
    logits_of,
    staged,
)
from runtime.interop.huggingface import (
    INDEX,
    KNOWS,
    SINGLE,
    export_tensors,
    family_of,
    folder_tensors,
    hf_config,
    import_tensor,
    model_config_from,
)
from runtime.interop.model_card import write_card

KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TRAINING_ONLY = {"dropout", "capacity_factor", "aux_loss_coef", "z_loss_coef"}
# Room for the tokenizer and the model card.
BESIDES_BYTES = 1 << 26


def outgoing(
    config: ModelConfig, family: str | None, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as the folder holds them, one at a time. family None: custom code.

    Expert biases (`selection_bias`) stay float32.
    """
    for name, tensor in (
        export_tensors(config, family, weights) if family else custom_tensors(weights)
    ):
        yield name, rounded(name, tensor, dtype)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the export's dtype. Raise ValueError for a value beyond float16."""
    tensor = tensor.detach() if name.endswith("selection_bias") else tensor.detach().to(dtype)
    if dtype == torch.float16 and not tensor.is_meta and not tensor.isfinite().all():
        raise ValueError(f"{name} has values beyond float16's 65504: say --dtype bfloat16")
    return tensor


def write_weights(
    folder: Path,
    plan: Sequence[tuple[str, Tensor]],
    tensors: Iterator[tuple[str, Tensor]],
    limit: int,
) -> int:
    """Write `tensors` as safetensors files of at most `limit` bytes of tensors each.

    A larger tensor has its own file. Several files also get an index. plan: the names, shapes and
    dtypes of `tensors`, as tensors on the meta device. Return the number of files.
    """
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, like in plan:
        if shards[-1] and size + like.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, like))
        size += like.nbytes
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, tensors)
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard
        }
        write_json(
            folder / INDEX,
            {
                "metadata": {"total_size": sum(tensor.nbytes for _, tensor in plan)},
                "weight_map": weight_map,
            },
        )
    return len(shards)


def write_safetensors(
    path: Path, plan: Sequence[tuple[str, Tensor]], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write as many of `tensors` as `plan` has, one in memory at a time.

    (safetensors' own save_file wants all tensors of a file at once, and makes a file that only its
    owner can read.) The format: length of the header, header, tensors:
    https://huggingface.co/docs/safetensors.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like in plan:
        header[name] = {
            "dtype": KINDS[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [end, end := end + like.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        # Not strict: the rest of `tensors` is for the next file.
        for (name, like), (given, tensor) in zip(plan, tensors, strict=False):
            assert (given, tensor.shape, tensor.dtype) == (name, like.shape, like.dtype)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def generation_config(source: Source) -> dict:
    """Return generation_config.json: predict.py's settings, and the ids that it never draws."""
    tokenizer, d, config = source.tokenizer, PredictConfig(), source.model.config
    never = [*tokenizer.banned_ids, *range(tokenizer.vocabulary_size, config.vocabulary_size)]
    stops = list(tokenizer.all_stop_ids)
    settings = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": pad_id(tokenizer),
        "do_sample": True,
        "temperature": d.temperature,
        "top_k": d.top_k,
        "top_p": d.top_p,
        "max_new_tokens": min(d.max_new_tokens, max(1, config.context_length // 2)),
    }
    return settings | ({"suppress_tokens": never} if never else {})


def config_there(folder: Path, ours: ModelConfig, family: str | None) -> ModelConfig:
    """Return the model that the folder's config.json describes.

    Raise ExportError unless it is `ours`. Fields that act only in training may differ.
    """
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        config = model_config_from(theirs)[1] if family else ModelConfig(**theirs["gptoss"])
    except ValueError as error:
        raise ExportError(
            f"config.json reads back as no model ({error}): nothing was written"
        ) from error
    was, found = (
        dataclasses.asdict(dataclasses.replace(c, head_dim=c.attention_head_dim))
        for c in (ours, config)
    )
    if wrong := [
        f"{name} {found[name]} (not {value})"
        for name, value in was.items()
        if found[name] != value and name not in TRAINING_ONLY
    ]:
        raise ExportError(
            f"config.json reads back as another model: {', '.join(wrong)}: nothing was written"
        )
    return config


def check(folder: Path, source: Source, family: str | None, dtype_name: str) -> None:
    """Read the folder back. Raise ExportError if config.json, a tensor or a logit has changed.

    (write_tokenizer has checked the tokens.)
    """
    config, weights, dtype = source.model.config, source.checkpoint.model, DTYPES[dtype_name]
    has, read, names = folder_tensors(folder)
    theirs = config_there(folder, config, family)

    def from_folder(name: str) -> Tensor:
        tensor = import_tensor(theirs, family, name, has, read) if family else read(f"model.{name}")
        if not torch.equal(tensor, rounded(name, weights[name], dtype)):
            raise ExportError(
                f"{name} reads back as other numbers than were written: nothing was written"
            )
        return tensor.float()

    ids_BT = check_ids(source.tokenizer, config)
    as_written = lazy_model(config, lambda name: rounded(name, weights[name], dtype).float())
    ours, route = (
        logits_of(as_written, ids_BT),
        f"{family or 'custom code'}, {dtype_name}, read back",
    )
    if family:
        for name in weights:
            from_folder(name)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        computed = published.from_folder(settings, names, read)
        check_published(route, KNOWS, as_written, ours, computed, ids_BT)
    else:
        check_logits(route, ours, logits_of(lazy_model(theirs, from_folder), ids_BT), config)
    if dtype != weights["embed.weight"].dtype:
        exact = logits_of(lazy_model(config, lambda name: weights[name].float()), ids_BT)
        print(
            f"check: rounding the weights to {dtype_name} moves the logits by up to "
            f"{largest_difference(exact, ours):.1e}; without --dtype they stay what they are"
        )


def export_folder(
    source: Source, out: Path, dtype: torch.dtype, limit: int, custom_code: bool
) -> str:
    """Write `source` to the folder `out`, and check it.

    limit: maximum bytes of a weights file. Return what was written, for the last line.
    """
    config, tokenizer = source.model.config, source.tokenizer
    dtype_name = str(dtype).removeprefix("torch.")
    if not custom_code:
        other = ". --custom_code exports any model with a modeling file of its own"
        KNOWS.check(source.model, other)
    family = None if custom_code else family_of(config)
    plan = list(outgoing(config, family, meta_model(config).state_dict(), dtype))
    needed = sum(tensor.nbytes for _, tensor in plan)
    with staged(out, needed + BESIDES_BYTES, is_folder=True) as folder:
        shards = write_weights(
            folder, plan, outgoing(config, family, source.checkpoint.model, dtype), limit
        )
        if family:
            theirs = hf_config(
                config,
                family,
                end_of_text_id=tokenizer.eos_id,
                start_id=tokenizer.start_id,
                dtype=dtype_name,
                pad_id=pad_id(tokenizer),
            )
        else:
            theirs = custom_config(source, dtype_name)
            (folder / MODELING_FILE).write_text(modeling_source(), encoding="utf-8")
        write_json(folder / "config.json", theirs)
        write_json(folder / "generation_config.json", generation_config(source))
        if not isinstance(tokenizer, NoTokenizer):
            # Left padding would shift the text against its learned position biases.
            side = "right" if config.use_attention_bias else "left"
            write_tokenizer(tokenizer, folder, config.context_length, side)
        write_card(folder, source, family, dtype_name)
        check(folder, source, family, dtype_name)
    if odd := [
        f"{name} {size}"
        for name, size in (("d_model", config.d_model), ("d_ff", config.d_ff))
        if family and size * dtype.itemsize % 16
    ]:
        print(
            f"note: {' and '.join(odd)} in {dtype_name}: rows of experts are no multiple of 16 "
            "bytes, which transformers 5 needs unless "
            'from_pretrained is told experts_implementation="eager"'
        )
    return (
        f"{family or 'custom code'}, {counts(config).total:,} parameters in {dtype_name}, "
        f"{needed / 1e6:,.1f} MB in {shards} file{'s' * (shards > 1)}"
    )
