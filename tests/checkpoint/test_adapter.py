"""Checkpoints of adapters: found with their base, merged as they are read, refused with another."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from model import LLM
from runtime.checkpoint.adapter import (
    KEY,
    AdaptedWeights,
    Adapter,
    is_trained,
    merged,
    trained_shapes,
)
from runtime.checkpoint.folder import find_latest
from runtime.checkpoint.format import CheckpointError, shapes_of
from runtime.checkpoint.read import (
    MOST_CHAINED,
    build_model,
    load_model,
    load_training_state,
    read_checkpoint,
)
from runtime.posttraining.lora import attach, merged_model, new_adapter
from tests.builders_checkpoint import CONFIG, forge, new_run, save, train
from tests.builders_lora import NOWHERE, base_run, lora_run, move_adapters

GROWN = dataclasses.replace(CONFIG, vocabulary_size=34)


def adapters_of(tmp_path: Path, new_ids: tuple[int, ...] = (29, 30)) -> tuple[Path, Path, LLM]:
    """Return a base, a checkpoint of adapters on it after 4 steps, and that run's model."""
    base = base_run(tmp_path / "base")
    model, optimizer = lora_run(base, new_ids=new_ids)
    train(model, optimizer, 4, 1)
    return base, save(tmp_path / "run", 4, model, optimizer), model.eval()


def same_weights(model: LLM, other: LLM) -> bool:
    there = other.state_dict()
    return all(torch.equal(tensor, there[name]) for name, tensor in model.state_dict().items())


def test_a_file_of_adapters_reads_as_the_model_that_it_means(tmp_path):
    """predict.py and every export read it so. It holds the adapters and their moments alone."""
    base, path, model = adapters_of(tmp_path)
    loaded, checkpoint = load_model(path)
    assert type(loaded) is LLM and same_weights(loaded, merged_model(model))
    held = torch.load(path, weights_only=True)
    assert all(is_trained(name) for name in held["model"])
    assert held["model"].keys() == {name for name in model.state_dict() if is_trained(name)}
    moments = {name.partition(".")[2] for name in held["optimizer"]}
    assert moments == held["model"].keys()
    assert checkpoint.adapter == model.adapter and checkpoint.stage[KEY]["base"] == str(base)
    # The weights are made when they are asked for, and writing to one changes none.
    checkpoint.model["layers.0.attention.W_q.weight"].zero_()
    assert same_weights(build_model(checkpoint), loaded)


@pytest.mark.parametrize("new_ids", [(), (29, 30)])
def test_a_run_of_adapters_resumes_bit_for_bit(tmp_path, new_ids):
    """Weights, moments and rows: as if it had not stopped."""
    base = base_run(tmp_path / "base")
    one, optimizer = lora_run(base, new_ids=new_ids)
    train(one, optimizer, 4, 1)
    save(tmp_path / "run", 4, one, optimizer)
    train(one, optimizer, 3, 2)
    source, _ = find_latest(tmp_path / "run")
    other, again = lora_run(source)
    load_training_state(source, other, again)
    train(other, again, 3, 2)
    assert same_weights(one, other)
    ends = [save(tmp_path / name, 7, *pair) for name, pair in (("a", (one, optimizer)),)]
    ends.append(save(tmp_path / "b", 7, other, again))
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_rows_that_the_run_added_come_back(tmp_path):
    """The vocabulary of the base is smaller. Its own rows stay what they are."""
    base = base_run(tmp_path / "base")
    source = read_checkpoint(base)
    grown = dict(source.model)
    for name in ("embed.weight", "out_head.weight", "out_head.bias"):
        grown[name] = torch.cat((grown[name], grown[name][:2]))
    start = dataclasses.replace(source, model_config=GROWN, model=grown)
    model = build_model(start)
    # The settings are those of the file that the run starts from.
    attach(model, new_adapter(source, GROWN, 4))
    assert (model.adapter.first_row, model.adapter.num_rows) == (32, 2)
    move_adapters(model)
    path = save(tmp_path / "run", 1, model, None)
    loaded, checkpoint = load_model(path)
    assert checkpoint.model_config == GROWN
    assert same_weights(loaded, merged_model(model))
    assert torch.equal(loaded.embed.weight[:32], source.model["embed.weight"])


def test_the_base_is_found_where_it_was_and_where_its_files_moved(tmp_path):
    """The whole tree may move, or the base may lie next to the adapters."""
    adapters_of(tmp_path / "old")
    os.rename(tmp_path / "old", tmp_path / "new")
    path = tmp_path / "new/run/step_0000004.pt"
    base = tmp_path / "new/base/step_0000003.pt"
    assert read_checkpoint(path).adapter.base == str(base)
    # A resumed run writes down where it was found.
    source = read_checkpoint(path, optimizer=True)
    model, optimizer = lora_run(source)
    load_training_state(source, model, optimizer)
    saved = save(tmp_path / "elsewhere", 5, model, optimizer)
    assert read_checkpoint(saved).adapter.base == str(base)
    beside = tmp_path / "new/run/step_0000003.pt"
    os.rename(base, beside)
    assert read_checkpoint(path).adapter.base == str(beside)


def test_a_name_that_moved_on_is_followed_to_the_file(tmp_path):
    """The run of the base continued: best.pt is another model now, and a step file still is it."""
    base_run(tmp_path / "base")
    model, optimizer = lora_run(tmp_path / "base/latest.pt")
    path = save(tmp_path / "run", 1, move_adapters(model), optimizer)
    assert read_checkpoint(path).adapter.base.endswith("latest.pt")
    other, state = new_run(seed=5)
    save(tmp_path / "base", 9, other, state)
    found = read_checkpoint(path)
    assert found.adapter.base == str(tmp_path / "base/step_0000003.pt")
    assert same_weights(build_model(found), merged_model(model))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_a_missing_or_another_base_is_refused(tmp_path):
    """On another base the same adapters are another function, and nothing else would show it."""
    base, path, _ = adapters_of(tmp_path)
    kept = tmp_path / "kept.pt"
    os.rename(base, kept)
    # Another name of the same file would do.
    os.remove(base.with_name("latest.pt"))
    refused(path, "adapters alone", f"{base} is missing", "next to its adapters")
    other = base_run(tmp_path / "base", seed=5)
    assert other == base
    refused(path, "adapters alone", f"{base} has other weights", "digest")
    # A file of the same name next to it, whose own base is missing, does not hide that.
    os.remove(base)
    shutil.copyfile(path, path.with_name(base.name))
    refused(path, "adapters alone")
    # Other things than weights may differ: a base without its optimizer is the same base.
    os.rename(kept, tmp_path / "whole.pt")
    model = build_model(read_checkpoint(tmp_path / "whole.pt"))
    save(tmp_path / "base", 3, model, None, val_loss=9.0)
    read_checkpoint(path)


def test_adapters_of_adapters_are_merged_in_turn(tmp_path):
    """A preference run on a tuned one. The first base may not change either."""
    base, path, first = adapters_of(tmp_path)
    model, optimizer = lora_run(path, rank=2)
    assert torch.equal(model.embed.weight, first.embed.weight)
    train(model, optimizer, 2, 3)
    second = save(tmp_path / "second", 2, model, optimizer)
    assert same_weights(load_model(second)[0], merged_model(model))
    base_run(tmp_path / "base", seed=5)
    refused(second, f"{base} has other weights", "next to its adapters")


def test_a_file_that_is_its_own_base_ends(tmp_path):
    """Digests forbid it, but a forged header can name a circle of files."""
    _, path, _ = adapters_of(tmp_path)
    twin = tmp_path / "run/twin.pt"

    def name(other: Path):
        return lambda contents: contents["stage"][KEY].update(
            base=str(other), base_from_here=other.name
        )

    forge(path, twin, name(path))
    forge(path, path, name(twin))
    refused(path, "adapters alone")


def test_a_long_chain_of_adapters_ends(tmp_path):
    """As long as one may be it is read, and one more is refused."""
    path = base_run(tmp_path / "base", steps=1)
    for i in range(MOST_CHAINED):
        model, optimizer = lora_run(path, rank=1)
        path = save(tmp_path / f"{i}", 1, move_adapters(model, i), optimizer)
    model, optimizer = lora_run(path, rank=1)
    refused(save(tmp_path / "last", 1, model, optimizer), "one on the other")


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("rank", 0, "ranks of at least 1"),
        ("rank", True, "rank must be of type int"),
        ("rank", 3, "lora_A"),
        ("expert_rank", 1 << 40, "lora_A"),
        ("alpha", -1.0, "positive alpha"),
        ("alpha", float("inf"), "positive alpha"),
        ("first_row", -1, "no negative rows"),
        ("first_row", 31, "has rows up to 33"),
        ("num_rows", 1, "new_rows"),
        ("base", 3, "base must be of type str"),
        ("extra", 3, "must have the keys"),
    ],
)
def test_a_damaged_entry_is_refused(tmp_path, key, value, line):
    _, path, _ = adapters_of(tmp_path)
    forge(path, path, lambda contents: contents["stage"][KEY].update({key: value}))
    refused(path, line)


def test_a_damaged_tensor_is_refused(tmp_path):
    _, path, _ = adapters_of(tmp_path)

    def change(contents):
        contents["model"]["layers.1.moe.experts.w_in_lora_B"][0, 0, 0] += 1

    forge(path, path, change, redo_digests=False)
    refused(path, "w_in_lora_B does not match its digest")


def test_adapters_do_not_load_into_another_model(tmp_path):
    """A plain model has no place for them, and adapters of another factor are another function."""
    _, path, _ = adapters_of(tmp_path)
    source = read_checkpoint(path, optimizer=True)
    plain, optimizer = new_run()
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_training_state(source, plain, optimizer)
    other = dataclasses.replace(source.adapter, alpha=1.0)
    model, optimizer = lora_run(dataclasses.replace(source, adapter=other))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="its adapters are"):
        load_training_state(source, model, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_base_in_bfloat16_is_widened_before_it_is_merged():
    """Merged in bfloat16, a small change would round away."""
    shapes = shapes_of(CONFIG)
    base = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    trained = {
        name: 1e-3 * torch.randn(shape)
        for name, (shape, _) in trained_shapes(NOWHERE, shapes).items()
    }
    weights = AdaptedWeights(shapes, NOWHERE, base, shapes, trained)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    name = "layers.0.moe.experts.w_out"
    product = trained[f"{name}_lora_B"].double() @ trained[f"{name}_lora_A"].double()
    expected = base[name].double() + 8.0 / 2 * product
    assert (weights[name].double() - expected).abs().max() < 1e-6
    assert not torch.equal(weights[name], base[name].float())


def test_merging_adds_the_scaled_product():
    """W + scale B A of every matrix in a stack, in float64 to its last bits."""
    torch.manual_seed(0)
    w, a, b = torch.randn(3, 5, 4).double(), torch.randn(3, 2, 4), torch.randn(3, 5, 2)
    found = merged(w, a, b, 0.3)
    for e in range(3):
        expected = w[e] + 0.3 * b[e].double() @ a[e].double()
        assert (found[e] - expected).abs().max() < 1e-14


def test_an_adapter_says_all_that_identifies_it():
    """A field that the header forgot would come back as another adapter."""
    adapter = dataclasses.replace(NOWHERE, first_row=3, num_rows=2)
    assert Adapter.from_header(adapter.header("/some")) == (adapter, "../nowhere/base.pt")
