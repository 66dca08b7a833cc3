"""Published models become checkpoints: transformers' folders, older and stacked layouts, MXFP4.

Damage and malice end in one line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from config_model import PredictConfig, total_parameters
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import load_model, read_checkpoint
from runtime.data.hf_tokenizer import write_tokenizer
from runtime.data.tokenizers import load_tokenizer
from runtime.inference.predictor import Predictor
from runtime.interop import hf_import
from scripts import import_hf
from tests import children
from tests.builders_runs import SPEED
from tests.conftest import REPO
from tests.numeric import before_ties, logits_bound, share_of

SIZES = dict(
    vocab_size=257,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.15,
    rms_norm_eps=1e-5,
    eos_token_id=256,
    bos_token_id=256,
    tie_word_embeddings=False,
)
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
}
FAMILIES = {
    "mixtral": (
        "Mixtral",
        dict(
            intermediate_size=24,
            num_local_experts=4,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        ),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=4,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        ),
    ),
    "gpt_oss": (
        "GptOss",
        dict(intermediate_size=32, num_local_experts=4, sliding_window=8, rope_parameters=YARN),
    ),
}


def their_model(family: str, **changes):
    """A tiny random model of transformers, every tensor of which matters."""
    import transformers

    name, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | own | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return (their model, its saved folder with the byte tokenizer) by family.

    Tests copy a folder before they change it.
    """
    made = {}

    def folder_of(family: str):
        if family not in made:
            model, folder = their_model(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            write_tokenizer(load_tokenizer("byte"), folder, 64)
            made[family] = model, folder
        return made[family]

    return folder_of


def imported(folder: Path, out: Path, *flags: str):
    """The checkpoint that an import writes."""
    assert import_hf.main(["--model", str(folder), "--out", str(out), *flags]) == 0
    return read_checkpoint(out)


def refused(folder: Path, out: Path, match: str, error=ValueError) -> None:
    with pytest.raises(error, match=match) as caught:
        import_hf.main(["--model", str(folder), "--out", str(out)])
    assert len(" ".join(str(caught.value).split())) < 700
    assert not out.exists() and not list(out.parent.glob("*.partial"))


def copy(folder: Path, to: Path, tensors=None, **config) -> Path:
    """Copy a folder, with tensors replaced by those of `tensors`, and keys of its config.json.

    None takes a key out.
    """
    shutil.copytree(folder, to)
    theirs = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(
        json.dumps({key: value for key, value in theirs.items() if value is not None})
    )
    if tensors:
        save_file(tensors(load_file(to / "model.safetensors")), to / "model.safetensors")
    return to


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


@torch.no_grad()
def largest_difference(path: Path, theirs) -> float:
    """Of the logits, over what rounding explains."""
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = load_model(path)[0]
    sure = before_ties(ours, ids)
    return share_of(
        ours(ids).logits[sure],
        theirs(ids).logits.float()[sure],
        logits_bound(ours.config, ids.shape[1]),
    )


# -------------------------------------------------------------------------- what transformers saves
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_and_the_printed_check_says_what_was_compared(
    family, folders, tmp_path, capsys
):
    model, folder = folders(family)
    checkpoint = imported(folder, tmp_path / "x.pt")
    out = capsys.readouterr().out
    assert largest_difference(tmp_path / "x.pt", model) <= 1
    assert total_parameters(checkpoint.model_config) == sum(p.numel() for p in model.parameters())
    assert (
        f"an export gives back {len(load_file(folder / 'model.safetensors'))} tensors of the "
        "folder bit for bit\n" in out
    )
    assert (
        f"{family}, {total_parameters(checkpoint.model_config):,} parameters as float32, " in out
        and "tokenizer byte; " in out
        and "nats per token" in out
    )
    assert (checkpoint.step, checkpoint.run, checkpoint.train_config) == (0, {}, {})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_tensors_stacked_as_transformers_5_has_them_in_memory(family, folders, tmp_path, capsys):
    model, folder = folders(family)
    stacked = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in stacked
    checkpoint = imported(
        copy(folder, tmp_path / "stacked", lambda _: stacked), tmp_path / "stacked.pt"
    )
    assert "are stored in another layout there" in capsys.readouterr().out
    assert same(checkpoint.model, imported(folder, tmp_path / "x.pt").model)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_in_transformers_4s_spelling(family, folders, tmp_path):
    model, folder = folders(family)
    rope = dict(FAMILIES[family][1]["rope_parameters"])
    theta = rope.pop("rope_theta")
    older = dict(
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling=rope if family == "gpt_oss" else None,
        dtype=None,
        torch_dtype="float32",
    )
    if family == "qwen3_moe":
        older |= dict(
            num_local_experts=None, num_experts=4, decoder_sparse_step=1, mlp_only_layers=[]
        )
    imported(copy(folder, tmp_path / "older", **older), tmp_path / "x.pt")
    assert largest_difference(tmp_path / "x.pt", model) <= 1


def test_shards(folders, tmp_path):
    model, folder = folders("mixtral")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    checkpoint = imported(tmp_path / "shards", tmp_path / "shards.pt")
    assert checkpoint.tokenizer_state is None and same(
        checkpoint.model, imported(folder, tmp_path / "x.pt").model
    )


def test_a_folder_without_tokenizer_says_so(folders, tmp_path, capsys):
    model, _ = folders("mixtral")
    model.save_pretrained(tmp_path / "bare")
    assert imported(tmp_path / "bare", tmp_path / "x.pt").tokenizer_state is None
    assert "no tokenizer.json in " in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- MXFP4
def reference_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the numbers of [..., groups, 16] bytes and [..., groups] scales.

    By the definition of a 4-bit float (sign, 2 exponent bits, 1 mantissa bit).
    """

    def number(code: int) -> float:
        sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
        return sign * (
            mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        )

    numbers = np.array([[number(byte & 15), number(byte >> 4)] for byte in range(256)])
    return (
        numbers[blocks].reshape(*scales.shape, 32)
        * 2.0 ** (scales.astype(np.float64) - 127)[..., None]
    ).reshape(*scales.shape[:-1], -1)


@pytest.fixture
def mxfp4(folders, tmp_path):
    """Write a gpt-oss folder as OpenAI publishes it: bfloat16 with experts in MXFP4.

    Return also the expert tensors by name, as float64.
    """
    g = np.random.default_rng(3)
    numbers = {}

    def quantised(tensors):
        out = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        for block in range(2):
            for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
                stem = f"model.layers.{block}.mlp.experts.{name}"
                del out[stem]
                blocks, scales = (
                    g.integers(0, 256, (4, rows, 1, 16), dtype=np.uint8),
                    g.integers(119, 127, (4, rows, 1), dtype=np.uint8),
                )
                out[f"{stem}_blocks"], out[f"{stem}_scales"] = (
                    torch.from_numpy(blocks),
                    torch.from_numpy(scales),
                )
                numbers[stem] = reference_mxfp4(blocks, scales)
        return out

    config = dict(
        dtype="bfloat16",
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    )
    return copy(folders("gpt_oss")[1], tmp_path / "mxfp4", quantised, **config), numbers


def test_mxfp4_experts_are_dequantised_exactly(mxfp4, tmp_path):
    """Bitwise against the definition, and against transformers' own; bfloat16 holds all of it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, numbers = mxfp4
    checkpoint = imported(folder, tmp_path / "x.pt")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in checkpoint.model.values()} == {torch.bfloat16}
    for block in range(2):
        for ours, theirs in (("w_in", "gate_up_proj"), ("w_out", "down_proj")):
            stem = f"model.layers.{block}.mlp.experts.{theirs}"
            rows = torch.from_numpy(numbers[stem])
            transposed = convert_moe_packed_tensors(
                tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"], dtype=torch.float32
            )
            assert torch.equal(transposed, rows.transpose(1, 2).float())
            expected = torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1) if ours == "w_in" else rows
            assert torch.equal(
                checkpoint.model[f"layers.{block}.moe.experts.{ours}"].double(), expected
            )
    assert same(
        {
            n: t.bfloat16()
            for n, t in imported(folder, tmp_path / "y.pt", "--dtype", "float32").model.items()
        },
        checkpoint.model,
    )


def test_mxfp4_logits_are_those_of_the_dequantised_model_in_transformers(mxfp4, tmp_path):
    folder, numbers = mxfp4
    imported(folder, tmp_path / "x.pt")
    theirs = their_model("gpt_oss")
    plain = {
        name: tensor.float()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not name.endswith(("_blocks", "_scales"))
    }
    theirs.load_state_dict(
        plain
        | {name: torch.from_numpy(rows).transpose(1, 2).float() for name, rows in numbers.items()}
    )
    assert largest_difference(tmp_path / "x.pt", theirs) <= 1


# -------------------------------------------------------------------------------------------- dtype
def test_auto_keeps_what_the_folder_has_and_rounds_nothing(folders, tmp_path, capsys):
    _, folder = folders("qwen3_moe")
    narrow = copy(
        folder,
        tmp_path / "bf16",
        lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()},
    )
    mixed = copy(
        folder,
        tmp_path / "mixed",
        lambda tensors: {
            name: tensor if "norm" in name else tensor.bfloat16()
            for name, tensor in tensors.items()
        },
    )
    half = copy(
        folder,
        tmp_path / "fp16",
        lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    )
    kept = {}
    for source, flags, dtype in (
        (narrow, (), torch.bfloat16),
        (narrow, ("--dtype", "float32"), torch.float32),
        (mixed, (), torch.float32),
        (half, (), torch.float32),
    ):
        checkpoint = imported(source, tmp_path / f"{len(kept)}.pt", *flags)
        kept[len(kept)] = checkpoint.model
        assert {tensor.dtype for tensor in checkpoint.model.values()} == {
            dtype
        } and "rounded" not in capsys.readouterr().out
    assert same(kept[0], {name: tensor.bfloat16() for name, tensor in kept[1].items()})
    rounded = imported(folder, tmp_path / "rounded.pt", "--dtype", "bfloat16")
    assert "as bfloat16, rounded" in capsys.readouterr().out and same(rounded.model, kept[0])
    assert os.path.getsize(tmp_path / "0.pt") < 0.7 * os.path.getsize(tmp_path / "1.pt")


# ------------------------------------------------------------------------------ what it is good for
@pytest.mark.parametrize("family", FAMILIES)
def test_predict_gives_the_tokens_that_transformers_generates(family, folders, tmp_path):
    model, folder = folders(family)
    imported(folder, tmp_path / "x.pt")
    config = PredictConfig(
        ckpt=str(tmp_path / "x.pt"),
        temperature=0.0,
        max_new_tokens=24,
        dtype="float32",
        device="cpu",
        quiet=True,
    )
    predictor = Predictor(config)
    assert "".join(predictor.stream("Once upon", config)) == predictor.last.text
    prompt = torch.tensor([predictor.prompt_ids("Once upon")])
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=24,
        pad_token_id=256,
    )[0, prompt.shape[1] :].tolist()
    assert predictor.last.ids == theirs and len(set(theirs)) > 3


def test_predict_runs_a_bfloat16_file_in_either_arithmetic(mxfp4, tmp_path):
    imported(mxfp4[0], tmp_path / "x.pt")
    for dtype in ("float32", "bfloat16"):
        config = PredictConfig(
            ckpt=str(tmp_path / "x.pt"),
            temperature=0.0,
            max_new_tokens=5,
            dtype=dtype,
            device="cpu",
            quiet=True,
        )
        predictor = Predictor(config)
        assert {p.dtype for p in predictor.model.parameters()} == {getattr(torch, dtype)}
        list(predictor.stream("Once", config))
        assert 1 <= len(predictor.last.ids) <= 5


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_run_starts_from_it_in_float32(family, folders, data, tmp_path):
    imported(folders(family)[1], tmp_path / "x.pt", "--dtype", "bfloat16")
    flags = [
        *SPEED,
        "--data_dir",
        str(data),
        "--ckpt_dir",
        str(tmp_path / "ckpt"),
        "--graph_dir",
        str(tmp_path / "graphs"),
        "--max_steps",
        "2",
        "--warmup_steps",
        "0",
        "--dtype",
        "float32",
    ]
    assert train.main([*flags, "--init_from", str(tmp_path / "x.pt")]) == 0
    trained, start = (
        read_checkpoint(tmp_path / "ckpt" / "latest.pt", optimizer=True),
        read_checkpoint(tmp_path / "x.pt"),
    )
    assert trained.step == 2 and all(
        tensor.dtype == torch.float32 for tensor in trained.model.values()
    )
    moved = max(
        (trained.model[name] - start.model[name].float()).abs().max().item() for name in start.model
    )
    assert 0 < moved < 0.1
    with pytest.raises(ValueError, match="holds weights but no optimizer state"):
        read_checkpoint(tmp_path / "x.pt", optimizer=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_import_export_gives_the_same_bytes(family, dtype, folders, tmp_path):
    from scripts import export_hf

    first = imported(folders(family)[1], tmp_path / "0.pt", "--dtype", dtype)
    for i in (1, 2):
        assert (
            export_hf.main(
                [
                    "--ckpt",
                    str(tmp_path / f"{i - 1}.pt"),
                    "--out",
                    str(tmp_path / str(i)),
                    "--dtype",
                    dtype,
                    "--max_shard_size",
                    "60KB",
                ]
            )
            == 0
        )
        checkpoint = imported(tmp_path / str(i), tmp_path / f"{i}.pt")
        assert (
            same(checkpoint.model, first.model)
            and checkpoint.model_config == first.model_config
            and checkpoint.tokenizer_state == first.tokenizer_state
        )
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / str(i)).iterdir()} for i in (1, 2)
    )
    assert len([name for name in one if name.endswith(".safetensors")]) > 1
    assert (
        one.keys() == two.keys()
        and [name for name in one if one[name] != two[name] and name != "README.md"] == []
    )


# ------------------------------------------------------------------------------------- the download
def test_a_name_is_downloaded_as_safetensors_and_json_alone(folders, tmp_path, monkeypatch):
    """gpt-oss-20b's repository has its weights twice more, in original/ and metal/: another 27 GB.

    Its chat template, a file of its own, was left out.
    """
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    hub, asked = shutil.copytree(folders("mixtral")[1], tmp_path / "hub"), []
    (hub / "original").mkdir()
    for name in (
        "original/model.safetensors",
        "original/config.json",
        "pytorch_model.bin",
        "modeling.py",
        "chat_template.jinja",
    ):
        (hub / name).write_bytes(b"not wanted")

    def stand_in(repo_id, *, allow_patterns, ignore_patterns):
        asked.append(repo_id)
        for name in filter_repo_objects(
            [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()],
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    assert imported("someone/tiny-mixtral", tmp_path / "x.pt").run == {
        "imported_from": "someone/tiny-mixtral"
    }
    assert asked == ["someone/tiny-mixtral"]
    wanted = {
        path.name
        for path in folders("mixtral")[1].iterdir()
        if path.suffix in (".json", ".safetensors")
    } | {"chat_template.jinja"}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == wanted


def test_downloads_that_fail_are_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    refused(
        "someone/no-network",
        tmp_path / "x.pt",
        "there is no folder someone/no-network, and as a published model it could not be "
        "downloaded: ",
    )

    def fails(*args, **kwargs):
        raise RuntimeError("the connection broke\nhalfway")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    refused(
        "someone/model",
        tmp_path / "x.pt",
        "could not be downloaded: RuntimeError: the connection broke",
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(
        "someone/model", tmp_path / "x.pt", "needs huggingface_hub: pip install huggingface_hub"
    )
    (tmp_path / "file").touch()
    for name in ("no-such-folder", "../x/y/z", str(tmp_path / "file"), "a/-b/c", ""):
        refused(name, tmp_path / "x.pt", "is neither a folder nor a Hub name such as")


# -------------------------------------------------------------------------------- damage and malice
WITHOUT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: {n: x for n, x in t.items() if n != WITHOUT}, f"tensor {WITHOUT} is missing"),
        (
            lambda t: t | {WITHOUT: t[WITHOUT][:, :-1].contiguous()},
            rf"tensor {WITHOUT} is torch.float32 \[32, 23\]",
        ),
        (lambda t: t | {WITHOUT: t[WITHOUT].to(torch.int8)}, f"tensor {WITHOUT} is torch.int8"),
        (
            lambda t: t | {f"extra.{i}": torch.zeros(1) for i in range(5)},
            r"tensors that a mixtral model of this config.json has not: extra\.0, extra\.1, "
            r"extra\.2 and 2 more",
        ),
        (
            lambda t: t | {"model.norm.weight": t["model.norm.weight"] * float("nan")},
            "norm.weight holds NaN or infinity",
        ),
        (
            lambda t: t | {WITHOUT: t[WITHOUT] * float("inf")},
            r"layers\.1\.moe\.experts\.w_out holds NaN or infinity",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folders, tmp_path, change, match):
    refused(copy(folders("mixtral")[1], tmp_path / "x", change), tmp_path / "x.pt", match)


@pytest.mark.parametrize(
    "change, match",
    [
        (
            dict(model_type="llama"),
            "model_type must be one of mixtral, qwen3_moe, gpt_oss, not 'llama'",
        ),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(num_local_experts=8), r"must be .* \[8, 32\]"),
        (dict(num_hidden_layers=3), r"layers\.2\..* is missing"),
        (dict(num_hidden_layers=1), "tensors that a mixtral model of this config.json has not"),
        (dict(hidden_size="many"), "hidden_size"),
        (dict(hidden_size=10**9), "d_model"),
        (dict(rope_parameters="yes"), "rope"),
        (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "llama3"),
        (dict(quantization_config="gptq"), "quanti"),
        (dict(head_dim=-4), "head_dim"),
        (dict(num_experts_per_tok=0), "top_k"),
        (dict(router_aux_loss_coef="x"), "router_aux_loss_coef"),
        (dict(sliding_window="x"), "sliding_window"),
        (dict(tie_word_embeddings=True), "lm_head.weight"),
        (dict(num_hidden_layers=0), "num_hidden_layers|transformer_blocks"),
        (dict(vocab_size=256), r"257|256"),
    ],
)
def test_configs_that_do_not_fit_are_refused(folders, tmp_path, change, match):
    refused(copy(folders("mixtral")[1], tmp_path / "x", **change), tmp_path / "x.pt", match)


def test_a_tied_head_that_is_stored_all_the_same(folders, tmp_path):
    """Some writers save the head of a tied model.

    It is harmless if it is the embedding, another model if not. Old files' rotary table is not
    needed.
    """
    stored = copy(
        folders("mixtral")[1],
        tmp_path / "x",
        lambda t: (
            t
            | {
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            }
        ),
        tie_word_embeddings=True,
    )
    assert "out_head.weight" not in imported(stored, tmp_path / "x.pt").model


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object, not a list"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("{}", "model_type"),
    ],
)
def test_config_json_that_is_none(folders, tmp_path, text, match):
    folder = copy(folders("mixtral")[1], tmp_path / "x")
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, tmp_path / "x.pt", match)


def test_folders_that_are_no_model(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty",
        tmp_path / "x.pt",
        "has no config.json: it is no folder of a Hugging Face model",
    )
    pickled = copy(folders("mixtral")[1], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, tmp_path / "x.pt", "only models stored as safetensors are read")


def test_truncated_and_flipped_shards_are_one_line(folders, tmp_path):
    folder = copy(folders("mixtral")[1], tmp_path / "x")
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(folder, tmp_path / "x.pt", "model.safetensors is damaged")
    # In the header.
    for at in range(0, 60, 7):
        (folder / "model.safetensors").write_bytes(
            whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :]
        )
        try:
            imported(folder, tmp_path / "x.pt")
        except ValueError:
            assert not (tmp_path / "x.pt").exists()
        else:
            (tmp_path / "x.pt").unlink()


@pytest.mark.parametrize(
    "index, match",
    [
        ("{", "no index"),
        ("{}", "no index"),
        ('{"weight_map": []}', "no index"),
        ('{"weight_map": {"a": 1}}', "no index"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "no index|lacks"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no index|lacks"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors"),
        ('{"weight_map": {"a": "model.safetensors"}}', "lacks tensor a"),
        ('{"weight_map": {"a": ".."}}', "no index|lacks"),
        ('{"weight_map": {"a": "config.json"}}', "damaged"),
    ],
)
def test_an_index_that_is_none_or_points_outside_the_folder(folders, tmp_path, index, match):
    folder = copy(folders("mixtral")[1], tmp_path / "x")
    shutil.copy(folder / "model.safetensors", tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, tmp_path / "x.pt", match)


def test_a_tokenizer_larger_than_the_model_is_refused_before_anything_is_written(
    folders, tmp_path, monkeypatch
):
    folder = copy(
        folders("mixtral")[1],
        tmp_path / "x",
        lambda t: (
            t
            | {
                name: t[name][:256].contiguous()
                for name in ("lm_head.weight", "model.embed_tokens.weight")
            }
        ),
        vocab_size=256,
    )
    monkeypatch.setattr(hf_import, "write_weights", None)
    refused(folder, tmp_path / "x.pt", "its tokenizer has 257 ids, and its model only 256")


# --------------------------------------------------------------------------------------- the output
def test_an_output_that_is_there_needs_force(folders, tmp_path):
    _, folder = folders("mixtral")
    (tmp_path / "x.pt").write_text("precious")
    with pytest.raises(ValueError, match="exists: choose another name, or say --force"):
        imported(folder, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_text() == "precious"
    assert imported(folder, tmp_path / "x.pt", "--force").step == 0


def test_a_full_disk_is_seen_before_writing(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "runtime.interop.export.shutil.disk_usage",
        lambda folder: types.SimpleNamespace(free=1 << 20),
    )
    refused(folders("mixtral")[1], tmp_path / "x.pt", "GB free: free some space")


@pytest.mark.parametrize(
    "error, raised",
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), OSError),
        (ValueError("odd"), ValueError),
    ],
)
def test_an_import_that_breaks_off_leaves_what_was_there(
    folders, tmp_path, monkeypatch, error, raised
):
    (tmp_path / "x.pt").write_text("precious")
    import_tensor, asked = hf_import.import_tensor, []

    def breaks(config, family, name, has, read):
        asked.append(name)
        # The first time is the rehearsal.
        if asked.count(name) == 2 and name == "norm.weight":
            raise error
        return import_tensor(config, family, name, has, read)

    monkeypatch.setattr(hf_import, "import_tensor", breaks)
    with pytest.raises(raised):
        import_hf.main(
            ["--model", str(folders("mixtral")[1]), "--out", str(tmp_path / "x.pt"), "--force"]
        )
    assert len(asked) > 10 and {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "x.pt": b"precious"
    }


def test_the_check_at_the_end_sees_a_wrong_import_and_a_wrong_disk(folders, tmp_path, monkeypatch):
    _, folder = folders("mixtral")
    right, write = hf_import.import_tensor, hf_import.write_weights
    monkeypatch.setattr(
        hf_import,
        "import_tensor",
        lambda config, family, name, *folder: right(config, family, name, *folder).flip(
            [0] if name.endswith("w_in") else []
        ),
    )
    refused(
        folder,
        tmp_path / "x.pt",
        "experts.0.w1.weight would be exported as other numbers than the folder has",
        hf_import.ExportError,
    )
    monkeypatch.setattr(hf_import, "import_tensor", right)

    def flips(path, *args):
        write(path, *args)
        written = bytearray(path.read_bytes())
        written[len(written) // 2] ^= 1
        path.write_bytes(written)

    monkeypatch.setattr(hf_import, "write_weights", flips)
    refused(folder, tmp_path / "x.pt", "does not match its digest", CheckpointError)


def test_logits_that_are_not_finite_are_refused(folders, tmp_path):
    folder = copy(
        folders("mixtral")[1],
        tmp_path / "x",
        lambda t: t | {"lm_head.weight": torch.full_like(t["lm_head.weight"], 3e38)},
    )
    refused(folder, tmp_path / "x.pt", "logits are not finite", hf_import.ExportError)


MEASURE = """
import sys
from runtime.interop import hf_import
from scripts import import_hf
def anonymous():
    status = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
import runtime.checkpoint.format as checkpoint
most, digest = [0], checkpoint.digest_of
def measured(tensor):
    most[0] = max(most[0], anonymous())
    return digest(tensor)
checkpoint.digest_of = measured
lazy = hf_import.lazy_model
def measuring(config, read):
    def measured_read(name):
        most[0] = max(most[0], anonymous())
        return read(name)
    return lazy(config, measured_read)
hf_import.lazy_model = measuring
before = anonymous()
import_hf.main(sys.argv[1:])
print("grew by", most[0] - before)
"""


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Import models of 4 and of 16 blocks (76 and 304 MB), each in its own process.

    What is not a map of a file grows as much. Modules and libraries' working memory are in both
    figures. They come to 93 to 133 MB from one run to the next; a bound on a single model's figure,
    40 % of the file, was sometimes too tight for that. Holding the weights once would add 228 MB.
    """
    from runtime.checkpoint.format import meta_model
    from runtime.interop.huggingface import export_tensors, hf_config
    from tests.builders import tiny_config

    sizes, grew = [], []
    for blocks in (4, 16):
        config = tiny_config(
            d_model=256,
            transformer_blocks=blocks,
            d_ff=384,
            num_experts=16,
            vocabulary_size=64,
            qk_norm=True,
        )
        folder, weights = tmp_path / f"model{blocks}", {}
        folder.mkdir()
        for name, tensor in meta_model(config).state_dict().items():
            weights[name] = (
                torch.ones(tensor.shape) if "norm" in name else torch.rand(tensor.shape) * 0.02
            )
        tensors = {
            name: tensor.contiguous()
            for name, tensor in export_tensors(config, "qwen3_moe", weights)
        }
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(
            json.dumps(
                hf_config(config, "qwen3_moe", end_of_text_id=0, start_id=0, dtype="float32")
            )
        )
        sizes.append((folder / "model.safetensors").stat().st_size)
        command = [
            sys.executable,
            "-c",
            MEASURE,
            "--model",
            str(folder),
            "--out",
            str(tmp_path / f"{blocks}.pt"),
        ]
        done = subprocess.run(
            command,
            cwd=REPO,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        grew.append(int(done.stdout.rsplit("grew by ", 1)[1]))
    assert sizes[1] > 290e6 and grew[1] - grew[0] < 0.3 * (sizes[1] - sizes[0]), (sizes, grew)


def test_a_mistake_in_a_real_process_is_one_line_and_exit_2(tmp_path):
    out = tmp_path / "x.pt"
    done = children.run(["-m", "scripts.import_hf", "--model", tmp_path, "--out", out])
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("error: ")
    )
