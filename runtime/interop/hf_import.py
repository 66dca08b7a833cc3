"""Make a checkpoint of a published model's folder.

A rehearsal on shapes alone comes first, so that nothing is written of a model that does not fit.
Then one tensor is in memory at a time, however large the model.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from config_model import ModelConfig, total_parameters
from runtime.base.text import human_bytes
from runtime.checkpoint.format import Checkpoint, meta_model
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import write_weights
from runtime.data.hf_tokenizer import CHECK_TEXTS, TEMPLATE_FILE, TOKENIZER_FILE
from runtime.data.tokenizers import read_tokenizer, tokenizer_of
from runtime.interop import published
from runtime.interop.export import (
    DTYPES,
    ExportError,
    check_published,
    lazy_model,
    logits_of,
    staged,
)
from runtime.interop.huggingface import (
    KNOWS,
    export_tensors,
    folder_tensors,
    hf_config,
    import_tensor,
    model_config_from,
)

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# A table that older versions of transformers saved; it follows from the config.
COMPUTED = ".rotary_emb.inv_freq"


def model_folder(model: str) -> Path:
    """Return the folder that --model names, or download the published model of that name.

    Only safetensors, JSON and the chat template are downloaded. Raise ValueError if there is
    neither a folder nor such a model.
    """
    if os.path.isdir(model):
        return Path(model)
    if os.path.lexists(model) or not REPOSITORY.fullmatch(model):
        raise ValueError(
            f"--model {model} is neither a folder nor a Hub name such as "
            "mistralai/Mixtral-8x7B-v0.1"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"there is no folder {model}, and to download it as a published model needs "
            "huggingface_hub: pip install huggingface_hub"
        ) from None
    # Some repositories hold the same weights again in folders, for other programs: skip folders.
    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=["*.safetensors", "*.json", TEMPLATE_FILE],
                ignore_patterns=["*/*"],
            )
        )
    # Each version has its own HTTP client, with its own errors.
    except Exception as error:
        raise ValueError(
            f"there is no folder {model}, and as a published model it could not be downloaded: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error


def read_config(folder: Path) -> tuple[str, ModelConfig]:
    """Return (family, our config) from a folder's config.json.

    Raise ValueError for a model that ours cannot be, and for a folder without a model.
    """
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no config.json: it is no folder of a Hugging Face model"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(theirs, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(theirs).__name__}")
    return model_config_from(theirs)


def rehearse(
    config: ModelConfig,
    family: str,
    has: Callable[[str], bool],
    read: Callable[[str], Tensor],
    names: list[str],
) -> torch.dtype:
    """Rehearse the import on shapes alone.

    Raise ValueError for a tensor that is missing, has another shape, or has no use in our model.
    Return the dtype that holds every weight exactly: bfloat16 if all are bfloat16 or MXFP4, else
    float32.
    """
    kinds, used = {name: ((tensor := read(name)).shape, tensor.dtype) for name in names}, set()

    def read_shape(name: str) -> Tensor:
        used.add(name)
        shape, dtype = kinds[name]
        return torch.empty(shape, dtype=dtype)

    KNOWS.check(meta_model(config))
    ours = list(meta_model(config).state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in ours:
            import_tensor(config, family, name, has, read_shape)
    left = [name for name in names if name not in used and not name.endswith(COMPUTED)]
    if (
        config.tie_embeddings
        and "lm_head.weight" in left
        and torch.equal(read("lm_head.weight"), read("model.embed_tokens.weight"))
    ):
        left.remove("lm_head.weight")
    if left:
        raise ValueError(
            f"the folder has tensors that a {family} model of this config.json has not: "
            + ", ".join(sorted(left)[:3])
            + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        )
    return (
        torch.bfloat16
        if {kinds[name][1] for name in used} <= {torch.bfloat16, torch.uint8}
        else torch.float32
    )


def check(
    checkpoint: Checkpoint, family: str, has: Callable[[str], bool], read: Callable[[str], Tensor]
) -> None:
    """Compare a checkpoint just read from the disk with the folder, and compute its logits.

    Raise ExportError if anything differs. What an export would write under the names in the folder
    is compared bit for bit. Stacked and MXFP4 experts are not among them: for those only the
    digests show that the disk holds what was imported.
    """
    config, compared, not_there = checkpoint.model_config, 0, 0
    for name, tensor in export_tensors(config, family, checkpoint.model):
        if not has(name):
            not_there += 1
            continue
        compared += 1
        if not torch.equal(read(name).to(tensor.dtype), tensor):
            raise ExportError(
                f"{name} would be exported as other numbers than the folder has: "
                "nothing was written"
            )
    print(
        "check: read back from the disk, digests match; "
        f"an export gives back {compared:,} tensors of the folder bit for bit"
        + (f" ({not_there:,} are stored in another layout there)" if not_there else "")
    )
    if checkpoint.tokenizer_state:
        tokenizer = tokenizer_of(checkpoint)
        ids_BT = torch.tensor([[tokenizer.end_of_text_id, *tokenizer.encode(CHECK_TEXTS[0])]])[
            :, : config.context_length
        ]
    else:
        ids_BT = torch.arange(min(config.context_length, 64))[None] % config.vocabulary_size
    model = lazy_model(config, lambda name: checkpoint.model[name].float())
    logits_BTV = logits_of(model, ids_BT)
    if not logits_BTV.isfinite().all():
        raise ExportError("its logits are not finite: nothing was written")
    settings = hf_config(config, family, end_of_text_id=0, start_id=None, dtype="float32")
    computed = published.of_weights(settings, checkpoint.model)
    route = f"{family}, as the architecture computes it"
    check_published(route, KNOWS, model, logits_BTV, computed, ids_BT)
    if checkpoint.tokenizer_state and ids_BT.shape[1] > 1:
        loss = F.cross_entropy(logits_BTV[0, :-1], ids_BT[0, 1:]).item()
        print(
            f"check: cross-entropy of simple English {loss:.2f} nats per token "
            f"(guessing has {math.log(config.vocabulary_size):.2f}, "
            "which a model of other texts need not beat)"
        )


def import_folder(folder: Path, out: Path, dtype_name: str, run: dict) -> str:
    """Write the checkpoint `out` of the model in `folder`, and check it.

    dtype_name: one of DTYPES, or auto for the dtype that holds every weight exactly. run: for the
    checkpoint's header. Return what was written, for the last line.
    """
    family, config = read_config(folder)
    has, read, names = folder_tensors(folder)
    exact = rehearse(config, family, has, read, names)
    dtype = DTYPES.get(dtype_name, exact)
    tokenizer = read_tokenizer(folder) if (folder / TOKENIZER_FILE).exists() else None
    if tokenizer and tokenizer.vocabulary_size > config.vocabulary_size:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocabulary_size:,} ids, "
            f"and its model only {config.vocabulary_size:,}"
        )
    weights_bytes = total_parameters(config) * dtype.itemsize
    # Room for the header as well: 1/256 of the weights, and a tokenizer of up to 2**26 characters.
    with staged(out, weights_bytes + (weights_bytes >> 8) + (1 << 27)) as temporary:
        write_weights(
            temporary,
            config,
            lambda name: import_tensor(config, family, name, has, read),
            dtype,
            tokenizer.to_state() if tokenizer else None,
            run,
        )
        check(read_checkpoint(temporary, read_only=True), family, has, read)
    rounded = ", rounded" if dtype.itemsize < exact.itemsize else ""
    about = (
        f"tokenizer {tokenizer.name}"
        if tokenizer
        else f"no {TOKENIZER_FILE} in {folder}, so predict.py needs --tokenizer"
    )
    return (
        f"{family}, {total_parameters(config):,} parameters as "
        f"{str(dtype).removeprefix('torch.')}{rounded}, "
        f"{human_bytes(out.stat().st_size)}, {about}"
    )
