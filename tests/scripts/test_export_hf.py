"""scripts/export_hf: transformers loads the folders with the same numbers and tokens.

Shards, dtypes, errors, and a check that can fail.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import shutil
import stat
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from config_model import PRESETS, ModelConfig, TrainConfig
from model import generate
from runtime.base.files import TEMPORARY_SUFFIX
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import save_checkpoint, write_weights
from runtime.data.tokenizers import load_tokenizer, tokenizer_of, train_bpe
from runtime.interop import hf_export as module
from runtime.interop.export import CHECK_TEXT, ExportError
from scripts.export_hf import main
from scripts.import_hf import main as main_import
from tests.builders import random_model, tiny_config
from tests.builders_inference import predictor_of
from tests.numeric import assert_close, before_ties, is_close, logits_bound

GPT_OSS = ModelConfig(
    **PRESETS["gpt-oss-nano"].model
    | dict(
        d_model=32, transformer_blocks=2, context_length=64, head_dim=8, d_ff=24, sliding_window=5
    )
)
CONFIGS = {
    "mixtral": tiny_config(qk_norm=False, context_length=64),
    "qwen3_moe": tiny_config(tie_embeddings=True, context_length=64),
    "gpt_oss": GPT_OSS,
}


def write_checkpoint(folder: Path, config: ModelConfig, tokenizer, rows: int = 0) -> Path:
    """Return a checkpoint of a random model.

    `rows`: of the embedding, where they are more than the tokenizer's ids.
    """
    model = random_model(
        dataclasses.replace(config, vocabulary_size=rows or tokenizer.vocabulary_size)
    )
    return save_checkpoint(
        folder, 1, model, None, train_config=TrainConfig(), tokenizer_state=tokenizer.to_state()
    )


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([CHECK_TEXT], 300)


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, bpe, tmp_path_factory):
    """(family, checkpoint, its export) for each family."""
    folder = tmp_path_factory.mktemp(request.param)
    path = write_checkpoint(folder / "ckpt", CONFIGS[request.param], bpe)
    assert main(["--ckpt", str(path), "--out", str(folder / "out")]) == 0
    return SimpleNamespace(
        family=request.param,
        ckpt=path,
        out=folder / "out",
        model=random_model(read_checkpoint(path).model_config),
        tokenizer=bpe,
    )


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint with the byte tokenizer, whose exports take no time."""
    return write_checkpoint(
        tmp_path_factory.mktemp("byte"), CONFIGS["qwen3_moe"], load_tokenizer("byte")
    )


def run(ckpt: Path, out: Path, *flags: str) -> int:
    return main(["--ckpt", str(ckpt), "--out", str(out), *flags])


# -------------------------------------------------------------------------------------- it is right
def test_transformers_loads_model_and_tokenizer(made):
    """The same ids, logits and greedy text, from the folder alone; all keys match."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, info = AutoModelForCausalLM.from_pretrained(made.out, output_loading_info=True)
    assert not any(info.values()) and theirs.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(made.out)
    start, *ids = tokenizer(CHECK_TEXT)["input_ids"]
    assert (
        [start, *ids] == [made.tokenizer.start_id, *made.tokenizer.encode(CHECK_TEXT)]
        and tokenizer.decode(ids) == CHECK_TEXT
        and tokenizer.eos_token_id == made.tokenizer.end_of_text_id
    )
    ids_BT = torch.tensor([[made.tokenizer.end_of_text_id, *ids[:63]]])
    with torch.no_grad():
        ours, logits = made.model(ids_BT).logits, theirs(ids_BT).logits
    sure = before_ties(made.model, ids_BT)
    assert_close(logits[sure], ours[sure], logits_bound(made.model.config, 64))
    prompt_BT = ids_BT[:, :6]
    text = theirs.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False, max_new_tokens=30
    )[0, 6:]
    assert text.tolist() == [
        int(i)
        for i in generate(
            made.model, prompt_BT, 30, temperature=0, stop_ids=made.tokenizer.stop_ids
        )
    ]


PROMPTS = ["Once upon a time", "A", "By 1927 the old lamp had burned for 21,900 nights."]


def test_batches(made):
    """All four failed with a ValueError: the tokenizer had no padding.

    A row of a batch continues as it does alone, and as predict.py continues it.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        pipeline,
    )

    model = AutoModelForCausalLM.from_pretrained(made.out)
    tokenizer, greedy = AutoTokenizer.from_pretrained(made.out), dict(do_sample=False)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert batch["input_ids"][1, 0] == tokenizer.pad_token_id == 255
    together = model.generate(**batch, **greedy, max_new_tokens=12)[:, -12:]
    predictor, settings = predictor_of(str(made.ckpt), temperature=0.0, max_new_tokens=12)
    for prompt, row in zip(PROMPTS, together.tolist(), strict=True):
        list(predictor.stream(prompt, settings))
        ids = predictor.last.ids
        end = made.tokenizer.end_of_text_id
        assert row[: len(ids)] == ids and (len(ids) == 12 or row[len(ids)] == end)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [
        [answer[0]["generated_text"] for answer in generate(PROMPTS, **greedy, **more)]
        for more in (dict(batch_size=3, max_new_tokens=12), dict(max_new_tokens=12))
    ]
    expected = [
        prompt + tokenizer.decode(row, skip_special_tokens=True)
        for prompt, row in zip(PROMPTS, together, strict=True)
    ]
    assert texts == [expected, expected]
    # Trainer's labels keep the end of a text, and leave out padding and nothing else.
    texts = [tokenizer(prompt + tokenizer.eos_token) for prompt in PROMPTS]
    made_batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(texts)
    assert ((made_batch["labels"] != -100) == made_batch["attention_mask"].bool()).all()
    assert (made_batch["labels"][:, -1] == tokenizer.eos_token_id).all()
    with torch.no_grad():
        assert model(**made_batch).loss.isfinite()


def test_batches_of_custom_code(ckpt, tmp_path, monkeypatch):
    """The tokenizer pads on the left, and rows of a batch continue as they do alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # transformers puts that folder there.
    monkeypatch.setattr(sys, "path", [*sys.path])
    run(ckpt, tmp_path / "out", "--custom_code")
    trusted = dict(trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **trusted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", **trusted)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 255
    greedy = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
    together = model.generate(**tokenizer(PROMPTS[:2], padding=True, return_tensors="pt"), **greedy)
    for prompt, row in zip(PROMPTS, together, strict=False):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **greedy)
        assert torch.equal(alone[0, -6:], row[-6:])


def test_a_step_of_training_moves_the_start(made, tmp_path):
    """As the id of padding, the start token would never learn: its embedding has no gradient then.

    What transformers saves after a step is imported with our tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

    model = AutoModelForCausalLM.from_pretrained(made.out, experts_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(made.out)
    texts = [tokenizer(prompt + tokenizer.eos_token) for prompt in PROMPTS]
    model.train()
    model(**DataCollatorForLanguageModeling(tokenizer, mlm=False)(texts)).loss.backward()
    embedding = model.get_input_embeddings().weight
    assert embedding.grad[made.tokenizer.start_id].abs().max() > 0
    with torch.no_grad():
        embedding -= 0.1 * embedding.grad
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    assert main_import(["--model", str(tmp_path / "tuned"), "--out", str(tmp_path / "x.pt")]) == 0
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert tokenizer_of(checkpoint).to_state() == made.tokenizer.to_state()
    assert torch.equal(checkpoint.model["embed.weight"], embedding)


def test_the_folder_goes_there_and_back_bitwise(made, tmp_path):
    """With padding and the start token in it, an import gives the checkpoint's tokenizer again."""
    assert main_import(["--model", str(made.out), "--out", str(tmp_path / "x.pt")]) == 0
    assert tokenizer_of(read_checkpoint(tmp_path / "x.pt")).to_state() == made.tokenizer.to_state()
    run(tmp_path / "x.pt", tmp_path / "again")
    for path in tmp_path.joinpath("again").iterdir():
        if path.suffix in (".json", ".safetensors"):
            assert path.read_bytes() == (made.out / path.name).read_bytes(), path.name


def test_what_is_in_the_folder(made):
    assert {path.name for path in made.out.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "README.md",
    }
    config = json.loads((made.out / "config.json").read_text())
    assert (
        config["model_type"] == made.family
        and config["dtype"] == config["torch_dtype"] == "float32"
    )
    assert not list(made.out.parent.glob(f"*{TEMPORARY_SUFFIX}"))
    assert config["architectures"][0] in (made.out / "README.md").read_text()


def test_generation_settings_are_those_of_predict(made):
    from transformers import GenerationConfig

    settings, end = GenerationConfig.from_pretrained(made.out), made.tokenizer.end_of_text_id
    # Half of the context of 64.
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.max_new_tokens) == (
        True,
        0.9,
        50,
        32,
    )
    assert (
        settings.eos_token_id == settings.bos_token_id == end
        and settings.pad_token_id == 255
        and settings.suppress_tokens is None
    )


def test_ids_that_mean_nothing_are_not_drawn(bpe, tmp_path):
    """A model never generates rows beyond its tokenizer's ids, also in transformers.

    Here they are the most likely.
    """
    from transformers import AutoModelForCausalLM

    path = write_checkpoint(
        tmp_path / "ckpt",
        dataclasses.replace(CONFIGS["mixtral"]),
        bpe,
        rows=bpe.vocabulary_size + 20,
    )
    run(path, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs.lm_head.weight[bpe.vocabulary_size :] *= 100
        prompt_BT = torch.tensor([[1, 2, 3]])
        drawn = theirs.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False, max_new_tokens=20
        )[0, 3:]
        assert theirs(prompt_BT).logits[0, -1].argmax() >= bpe.vocabulary_size
    assert drawn.max() < bpe.vocabulary_size


def test_holes_among_the_ids_are_not_drawn(ckpt):
    """o200k_base has 19 of them."""
    tokenizer = SimpleNamespace(
        banned_ids=[3, 5],
        undecodable_ids=[3, 5],
        vocabulary_size=8,
        start_id=None,
        all_stop_ids=(7, 2),
        end_of_text_id=7,
        eos_id=7,
    )
    settings = module.generation_config(
        SimpleNamespace(tokenizer=tokenizer, model=random_model(tiny_config(vocabulary_size=10)))
    )
    assert (
        settings["suppress_tokens"] == [3, 5, 8, 9]
        and settings["eos_token_id"] == [7, 2]
        and settings["bos_token_id"] is None
    )


def test_transformers_is_not_needed(ckpt, tmp_path, monkeypatch):
    # Importing it fails.
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(ckpt, tmp_path / "out") == 0 and run(ckpt, tmp_path / "custom", "--custom_code") == 0


def test_a_card_that_somebody_edited_is_not_replaced(ckpt, tmp_path):
    """The card asks the publisher to complete it, and --force then threw that away."""
    out = tmp_path / "out"
    assert run(ckpt, out) == 0 and run(ckpt, out, "--force") == 0
    (out / "README.md").write_text(
        (out / "README.md").read_text().replace("## Limits", "Licence: MIT\n\n## Limits")
    )
    with pytest.raises(ValueError, match="README.md was changed since it was written"):
        run(ckpt, out, "--force")
    assert "Licence: MIT" in (out / "README.md").read_text()
    (out / "README.md").unlink()
    assert run(ckpt, out, "--force") == 0


# ----------------------------------------------------------------------------------- shards, dtypes
def test_shards(made, tmp_path):
    """The same tensors in files of limited size, and an index that transformers reads.

    A larger tensor gets a file of its own.
    """
    from transformers import AutoModelForCausalLM

    run(made.ckpt, tmp_path / "out", "--max_shard_size", "20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files, whole, found, sizes = (
        sorted((tmp_path / "out").glob("*.safetensors")),
        load_file(made.out / "model.safetensors"),
        {},
        [],
    )
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ] and len(files) > 3
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == file.name for name in tensors)
        # Tensors begin at whole words, as readers that map the file want.
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        found |= tensors
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    for size, file in zip(sizes, files[1:], strict=False):
        # One more did not fit.
        assert (
            size
            + whole[
                next(name for name, where in index["weight_map"].items() if where == file.name)
            ].nbytes
            > 20_000
        )
    assert found.keys() == whole.keys() == index["weight_map"].keys() and all(
        torch.equal(found[name], whole[name]) for name in whole
    )
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_one_tensor_is_in_memory_at_a_time(made, tmp_path, monkeypatch):
    """A shard of 5 GB was held until written, and once more as safetensors wrote it.

    That was 10 GB for a model whose weights stay on the disk.
    """
    alive, most, rounded = weakref.WeakSet(), 0, module.rounded

    def counted(name, tensor, dtype):
        nonlocal most
        tensor = rounded(name, tensor, dtype)
        if not tensor.is_meta:
            alive.add(tensor)
            most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(module, "rounded", counted)
    monkeypatch.setattr(module, "check", lambda *args: None)
    run(made.ckpt, tmp_path / "out", "--dtype", "bfloat16")
    # The one that is written may still be there when the next is made.
    assert 1 <= most <= 2


def test_files_are_readable_as_others_are(ckpt, tmp_path):
    """safetensors' own writer makes files that only their owner may read.

    A served or shared folder would not open.
    """
    run(ckpt, tmp_path / "out")
    assert len({stat.S_IMODE(os.stat(path).st_mode) for path in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_numbers(ckpt, tmp_path, capsys, dtype):
    """Weights are rounded once, to nearest, and what that does to the logits is said."""
    run(ckpt, tmp_path / "out", "--dtype", dtype)
    tensors, weights = (
        load_file(tmp_path / "out" / "model.safetensors"),
        read_checkpoint(ckpt).model,
    )
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert torch.equal(
        tensors["model.embed_tokens.weight"], weights["embed.weight"].to(getattr(torch, dtype))
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    said = capsys.readouterr().out
    moved = float(
        re.search(rf"rounding the weights to {dtype} moves the logits by up to (\S+);", said)[1]
    )
    # The check computes in float32, whose eps is 2**13 to 2**16 times finer.
    assert (
        0 < float(re.search(r"read back: largest logit difference (\S+) ", said)[1]) < moved / 100
    )


def test_the_default_loses_nothing(ckpt, tmp_path, capsys):
    """A float32 checkpoint as float32, one that was imported as bfloat16 as bfloat16."""
    weights = read_checkpoint(ckpt)
    write_weights(
        tmp_path / "narrow.pt",
        weights.model_config,
        weights.model.__getitem__,
        torch.bfloat16,
        weights.tokenizer_state,
    )
    for path, dtype in ((ckpt, torch.float32), (tmp_path / "narrow.pt", torch.bfloat16)):
        run(path, tmp_path / "out", "--force")
        tensor = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
        assert tensor.dtype == dtype and torch.equal(
            tensor, weights.model["embed.weight"].to(dtype)
        )
    assert "rounding" not in capsys.readouterr().out


def test_a_weight_beyond_float16_is_refused(tmp_path):
    """Infinity in an expert that the check's text does not reach.

    The first user whose text reaches it would have found it.
    """
    model = random_model(dataclasses.replace(CONFIGS["qwen3_moe"], vocabulary_size=257))
    with torch.no_grad():
        model.layers[1].moe.experts.w_in[3, 0, 0] = 1e5
    path = save_checkpoint(
        tmp_path / "ckpt",
        1,
        model,
        None,
        train_config=TrainConfig(),
        tokenizer_state=load_tokenizer("byte").to_state(),
    )
    with pytest.raises(
        ValueError,
        match=(
            "layers.1.mlp.experts.3.gate_proj.weight has values beyond float16's 65504: say "
            "--dtype bfloat16"
        ),
    ):
        run(path, tmp_path / "out", "--dtype", "float16")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- it rejects
def swapped(config, family, weights):
    """export_tensors with the two halves of the experts' inputs swapped: gate and up."""
    from runtime.interop.huggingface import export_tensors

    return export_tensors(
        config,
        family,
        {
            name: tensor.roll(config.d_ff, 1) if name.endswith("w_in") else tensor
            for name, tensor in weights.items()
        },
    )


def test_an_export_that_is_off_is_removed(made, tmp_path, monkeypatch):
    """Gate and up swapped: the check fails, the exit code is 1, and nothing is left over.

    An earlier export stays.
    """
    monkeypatch.setattr(module, "export_tensors", swapped)
    with pytest.raises(
        ExportError, match="layers.0.moe.experts.w_in reads back as other numbers"
    ) as error:
        run(made.ckpt, tmp_path / "out")
    assert error.value.exit_code == 1 and not list(tmp_path.iterdir())
    shutil.copytree(made.out, tmp_path / "out")
    with pytest.raises(ExportError):
        run(made.ckpt, tmp_path / "out", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        made.out / "model.safetensors"
    ).read_bytes()


def test_logits_that_are_off_are_refused(ckpt, tmp_path, monkeypatch):
    """The second half of the check alone.

    The tensors are right, the architecture computes differently.
    """
    from_folder = module.published.from_folder
    monkeypatch.setattr(
        module.published,
        "from_folder",
        lambda *given: dataclasses.replace(from_folder(*given), theta=50.0),
    )
    with pytest.raises(ExportError, match="logits differ by"):
        run(ckpt, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(rope_theta=5.0, rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
            r"another model: rope_theta 5.0 \(not 10000.0\)",
        ),
        (dict(rope_theta=5.0), "no model .*rope_theta is there twice"),
        (dict(rms_norm_eps=1.0), "another model: rms_norm_eps 1.0"),
        (dict(num_experts_per_tok=1), "another model: top_k 1"),
        (dict(max_position_embeddings=65), "another model: context_length 65"),
        (dict(model_type="mixtral"), "another model: qk_norm False"),
        (dict(hidden_act="gelu"), "no model .*hidden_act 'gelu'"),
    ],
    ids=str,
)
def test_the_check_reads_config_json(ckpt, tmp_path, monkeypatch, changes, message):
    """Both halves of the check used the config in memory.

    A config.json with another theta, epsilon or top_k passed it.
    """
    right = module.hf_config
    monkeypatch.setattr(
        module, "hf_config", lambda *args, **kwargs: right(*args, **kwargs) | changes
    )
    with pytest.raises(ExportError, match=f"config.json reads back as {message}"):
        run(ckpt, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_check_reads_custom_codes_config_json(ckpt, tmp_path, monkeypatch):
    """As for the published families."""
    right = module.custom_config
    monkeypatch.setattr(
        module,
        "custom_config",
        lambda *args: (theirs := right(*args)) | {"gptoss": theirs["gptoss"] | {"rope_theta": 5.0}},
    )
    with pytest.raises(
        ExportError, match="config.json reads back as another model: rope_theta 5.0"
    ):
        run(ckpt, tmp_path / "out", "--custom_code")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", CONFIGS)
def test_what_transformers_default_cannot_run_is_said(family, tmp_path, capsys):
    """Its grouped product needs rows of experts in multiples of 16 bytes.

    A folder with d_ff 33 loaded, and failed at the first token.
    """
    from transformers import AutoModelForCausalLM

    ids_BT = torch.arange(12)[None]
    for d_ff, dtype, is_odd in (
        (33, "float32", True),
        (20, "float32", False),
        (20, "bfloat16", True),
    ):
        path = write_checkpoint(
            tmp_path / f"{d_ff}",
            dataclasses.replace(CONFIGS[family], d_ff=d_ff),
            load_tokenizer("byte"),
        )
        run(path, tmp_path / "out", "--dtype", dtype, "--force")
        note = (
            f"note: d_ff {d_ff} in {dtype}: rows of experts are no multiple of 16 bytes, .* "
            'experts_implementation="eager"\n'
        )
        assert bool(re.search(note, capsys.readouterr().out)) == is_odd
        with torch.no_grad():
            if is_odd:
                with pytest.raises(RuntimeError, match="16"):
                    AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids_BT)
            kwargs = {"experts_implementation": "eager"} if is_odd else {}
            logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **kwargs)(
                ids_BT
            ).logits.float()
            ours = random_model(read_checkpoint(path).model_config)(ids_BT).logits
        assert dtype == "bfloat16" or is_close(logits, ours, logits_bound(CONFIGS[family], 12))


def test_an_existing_output_stays_without_force(ckpt, tmp_path):
    run(ckpt, tmp_path / "out", "--dtype", "bfloat16")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists: choose another name, or say --force"):
        run(ckpt, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    left_over = tmp_path / "out" / "model-00001-of-00002.safetensors"
    left_over.touch()
    run(ckpt, tmp_path / "out", "--force")
    assert (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes() != before and not left_over.exists()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").touch()
    with pytest.raises(
        ValueError, match="holds thesis.txt, which no export writes, so the folder is not replaced"
    ):
        run(ckpt, tmp_path / "papers", "--force")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dtype", "float64"], "float64"),
        (["--max_shard_size", "5"], "such as 500MB or 1GiB, not '5'"),
        (["--max_shard_size", "0GB"], "not '0GB'"),
        (["--max_shard_size", "-1GB"], "max_shard_size"),
        (["--max_shard_size", "5gb"], "--max_shard_size must be a number with KB, MB, GB or TB"),
        (["--ckpt", "nowhere.pt"], "nowhere.pt"),
        (["--tokenizer", "gpt2"], "was trained with tokenizer byte, not gpt2"),
    ],
    ids=" ".join,
)
def test_bad_arguments(ckpt, tmp_path, flags, message):
    if flags[0] == "--tokenizer":
        flags = ["--tokenizer", "bpe:300"]
        message = "bpe:300"
    with pytest.raises(ValueError, match=re.escape(message)):
        run(ckpt, tmp_path / "out", *flags)
    assert not list(tmp_path.iterdir())


def test_disk_space_is_checked_first(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    monkeypatch.setattr(module, "write_weights", lambda *args: pytest.fail("it was written to"))
    with pytest.raises(ValueError, match=r"needs 0.07 GB, and its disk has 0.00 GB free"):
        run(ckpt, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, in_the_way",
    [
        (
            "bias_gqa",
            [
                "use_attention_bias",
                "head_bias",
                "out_proj_bias",
                "expert_activation",
                "expert_bias",
            ],
        ),
        (
            "nobias_qkvbias",
            ["head_bias", "qkv_bias", "out_proj_bias", "expert_activation", "expert_bias"],
        ),
    ],
)
def test_checkpoints_of_the_reference_are_no_published_architecture(
    shared_dir, tmp_path, name, in_the_way
):
    """All that is in the way is named, and --custom_code is offered, which takes them."""
    path = shared_dir / "upstream" / f"{name}.pt"
    with pytest.raises(ValueError, match="--custom_code") as error:
        run(path, tmp_path / "out", "--tokenizer", "byte")
    assert re.findall(r"(\w+) \S+ \(must be", str(error.value)) == in_the_way
    assert not list(tmp_path.iterdir())
    assert run(path, tmp_path / "out", "--tokenizer", "byte", "--custom_code") == 0


@pytest.mark.parametrize("family", [*CONFIGS, "custom code"])
def test_a_folder_without_a_tokenizer(tmp_path, monkeypatch, capsys, family):
    """A checkpoint that says nothing of its tokenizer could not be exported.

    The folder has no file of a tokenizer, names no special id, and its card's code takes ids.
    """
    model = random_model(CONFIGS.get(family, tiny_config(head_bias=True)))
    path = save_checkpoint(
        tmp_path, 1, model, None, train_config=TrainConfig(), tokenizer_state=None
    )
    flags = ["--custom_code"] * (family not in CONFIGS)
    with pytest.raises(ValueError, match="name it with --tokenizer, or say --tokenizer none"):
        run(path, tmp_path / "out", *flags)
    assert run(path, tmp_path / "out", "--tokenizer", "none", *flags) == 0
    files = {file.name for file in (tmp_path / "out").iterdir()} - {"modeling_gptoss.py"}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    for name, keys in (
        ("config.json", ["bos_token_id", "eos_token_id"]),
        ("generation_config.json", ["bos_token_id", "eos_token_id", "pad_token_id"]),
    ):
        settings = json.loads((tmp_path / "out" / name).read_text())
        assert [settings[key] for key in keys] == [None] * len(keys)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its tokenizer is unknown" in card and "AutoTokenizer" not in card
    monkeypatch.chdir(tmp_path / "out")
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=5, do_sample=False", code)
    (tmp_path / "example.py").write_text(code)
    capsys.readouterr()
    with torch.no_grad():
        runpy.run_path(str(tmp_path / "example.py"))
    prompt = torch.tensor([[12, 7, 99]]) % model.config.vocabulary_size
    expected = [int(i) for i in generate(model.eval(), prompt, 5, temperature=0)]
    assert json.loads(capsys.readouterr().out) == prompt[0].tolist() + expected


def test_any_config_as_custom_code(tmp_path):
    """A model that no published class can hold, under its own names.

    The expert bias keeps float32, in which it is trained.
    """
    config = tiny_config(
        use_attention_bias=True,
        expert_activation="gelu",
        expert_bias=True,
        head_bias=True,
        router_bias_rate=1e-3,
        vocabulary_size=257,
    )
    path = write_checkpoint(tmp_path / "ckpt", config, load_tokenizer("byte"))
    run(path, tmp_path / "out", "--custom_code", "--dtype", "bfloat16")
    tensors, weights = (
        load_file(tmp_path / "out" / "model.safetensors"),
        read_checkpoint(path).model,
    )
    assert {name.removeprefix("model.") for name in tensors} == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(
            tensors[f"model.{name}"],
            tensor if name.endswith("selection_bias") else tensor.bfloat16(),
        ), name
    assert (tmp_path / "out" / "modeling_gptoss.py").exists()
    # Its positions are absolute: on the left, padding would shift a text.
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["padding_side"] == "right" and settings["pad_token"] == "<|pad|>"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 255
