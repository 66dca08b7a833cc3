"""Adapters on a plain model: what they compute, what they leave alone, what they cost."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch

from config_model import PRESETS, ModelConfig, TrainConfig
from model import LLM
from runtime.base.text import human_count
from runtime.checkpoint.adapter import is_trained
from runtime.checkpoint.optimizer_state import state_by_name
from runtime.checkpoint.read import read_checkpoint
from runtime.checks.known import CLOSED_FORMS
from runtime.inference import cpu_decode, decoder
from runtime.inference.decoder import Decoder, generate
from runtime.kernels.choose import choose_kernels
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.posttraining.config import PostTrainConfig
from runtime.posttraining.lora import Adapters, attach, merged_model, new_adapter
from runtime.training.optimizer import build_optimizer
from tests.builders import random_architecture, random_model, tiny_config
from tests.builders_checkpoint import CONFIG, train
from tests.builders_lora import NOWHERE, base_run, lora_run, move_adapters
from tests.numeric import assert_close, before_ties, logits_bound

CPU = torch.device("cpu")
ROWS = dataclasses.replace(NOWHERE, first_row=3, num_rows=2)


def architecture(seed: int, dtype=torch.float32, adapter=NOWHERE) -> tuple[LLM, LLM]:
    """Return a random plain model, and a copy of it with new adapters."""
    config = random_architecture(random.Random(seed))
    plain = random_model(dataclasses.replace(config, vocabulary_size=37), seed, dtype).eval()
    adapted = copy.deepcopy(plain)
    attach(adapted, adapter)
    return plain, adapted


def some_ids(model: LLM, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocabulary_size, (2, 20), generator=generator)


@pytest.mark.parametrize("seed", range(12))
def test_new_adapters_change_no_bit(seed):
    """B begins at 0. The CPU's own kernels, which only the plain model takes, round otherwise."""
    plain, adapted = architecture(seed, adapter=ROWS if seed % 2 else NOWHERE)
    ids = some_ids(plain)
    with torch.no_grad():
        before = plain(ids).logits
        assert torch.equal(before, adapted(ids).logits)
        assert torch.equal(*(model(ids, ids).cross_entropy_sum for model in (plain, adapted)))
        for model in (plain, adapted):
            choose_kernels(model, CPU, torch.float32)
        kept = before_ties(plain, ids)[..., None]
        bound = logits_bound(plain.config, ids.shape[1])
        size = before.abs().max().item()
        assert_close(adapted(ids).logits * kept, plain(ids).logits * kept, bound, size=size)


@pytest.mark.parametrize("seed", range(20))
def test_merged_weights_compute_what_the_adapters_do(seed):
    """All architectures; tighter in float64, where nothing hides a wrong factor."""
    for dtype in (torch.float32, torch.float64):
        plain, adapted = architecture(seed, dtype)
        move_adapters(adapted, seed)
        ids = some_ids(plain)
        kept = before_ties(adapted, ids)[..., None]
        with torch.no_grad():
            before, moved = plain(ids).logits, adapted(ids).logits
            merged = merged_model(adapted)(ids).logits
        assert not torch.equal(before, moved)
        bound = logits_bound(plain.config, ids.shape[1], dtype)
        assert_close(merged * kept, moved * kept, bound, size=moved.abs().max().item())


def test_a_merged_model_is_plain_and_brought_up_to_date_in_place():
    """A decoder holds pointers to its weights, and one of an earlier step is another policy."""
    _, adapted = architecture(1)
    merged = merged_model(adapted)
    pointers = {name: t.data_ptr() for name, t in merged.state_dict().items()}
    assert type(merged) is LLM and not merged.training
    for seed in range(3):
        move_adapters(adapted, seed)
        assert merged_model(adapted) is merged
        assert {name: t.data_ptr() for name, t in merged.state_dict().items()} == pointers
        fresh = copy.deepcopy(adapted)
        del fresh.__dict__["merged"]
        for name, tensor in merged_model(fresh).state_dict().items():
            assert torch.equal(tensor, merged.state_dict()[name]), name
    # It is no part of the adapted model, and of a plain model it is the model.
    assert all(not name.startswith("merged") for name in adapted.state_dict())
    assert merged_model(merged) is merged


def test_training_leaves_the_base_as_it_was(tmp_path):
    """Every byte, in memory and in the file, but for the rows that are trained."""
    base = base_run(tmp_path)
    before = base.read_bytes()
    model, optimizer = lora_run(base, new_ids=(29, 30))
    frozen = {n: p.detach().clone() for n, p in model.state_dict().items() if not is_trained(n)}
    trained = {n: p.detach().clone() for n, p in model.state_dict().items() if is_trained(n)}
    model.balance_experts(torch.rand(2, 2))
    train(model, optimizer, 20, 1)
    now = model.state_dict()
    for name, tensor in frozen.items():
        rows = [i for i in range(len(tensor)) if name in VOCABULARY and i in (29, 30)]
        kept = [i for i in range(len(tensor)) if i not in rows]
        assert torch.equal(now[name][kept], tensor[kept]), name
    assert all(not torch.equal(now[name], tensor) for name, tensor in trained.items())
    assert base.read_bytes() == before


VOCABULARY = ("embed.weight", "out_head.weight", "out_head.bias")


def gradients(model: LLM, ids, targets, **how) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    out = model(ids, targets, **how)
    (out.cross_entropy_sum + out.aux_loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_only_adapters_and_new_rows_get_gradients_and_the_right_ones(seed, tied, per_token):
    """The rows' gradients are those of training everything; the adapters' follow from W's.

    W + s B A, with the gradient G of W: B gets s G A', A gets s B' G.
    """
    config = dataclasses.replace(
        random_architecture(random.Random(seed)), vocabulary_size=37, tie_embeddings=tied
    )
    plain = random_model(config, seed, torch.float64)
    adapted = copy.deepcopy(plain)
    attach(adapted, ROWS)
    move_adapters(adapted, seed)
    whole = copy.deepcopy(merged_model(adapted)).requires_grad_(True)
    ids, targets = some_ids(plain), some_ids(plain, 1)
    targets[0, :5] = IGNORE
    ids[0, :4], targets[1, :4] = (torch.tensor([3, 4, 3, 9]) for _ in range(2))
    adapted.loss_rows = 7
    ours = gradients(adapted, ids, targets, per_token=per_token)
    theirs = gradients(whole, ids, targets)
    assert ours.keys() == {name for name in adapted.state_dict() if is_trained(name)}
    for name, gradient in ours.items():
        if name in ("embed.new_rows", "out_head.new_rows", "out_head.new_bias"):
            expected = theirs[name.replace("new_rows", "weight").replace("new_bias", "bias")][3:5]
        else:
            matrix, kind = name[: -len("_lora_A")], name[-1]
            matrix = matrix if ".experts." in name else name.replace(f"lora_{kind}", "weight")
            rank = NOWHERE.expert_rank if ".experts." in name else NOWHERE.rank
            other = adapted.get_parameter(name[:-1] + ("B" if kind == "A" else "A")).detach()
            both = (theirs[matrix], other.mT) if kind == "B" else (other.mT, theirs[matrix])
            expected = 8.0 / rank * (both[0] @ both[1])
        size = max(expected.abs().max().item(), 1e-3)
        assert (gradient - expected).abs().max() <= 1e-11 * size, name


def test_adapters_need_a_tenth_of_the_optimizer():
    """Counted bytes of the moments, at nano's sizes."""
    config = ModelConfig(**PRESETS["nano"].model | dict(transformer_blocks=2, vocabulary_size=512))

    def state_bytes(model: LLM) -> int:
        optimizer = build_optimizer(model, TrainConfig())
        return sum(tensor.nbytes for tensor in state_by_name(model, optimizer).values())

    model = LLM(config)
    full = state_bytes(model)
    attach(model, dataclasses.replace(NOWHERE, rank=8, expert_rank=4, first_row=0, num_rows=3))
    assert state_bytes(model) <= full / 10


def test_muon_leaves_adapters_to_adamw():
    """Muon would blow B up from 0 to full size at the first step."""
    model = random_model(CONFIG)
    attach(model, ROWS)
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon"))
    groups = [group for group in optimizer.param_groups if group["momentum"] is not None]
    assert not groups
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "autocast", "dropout"])
def test_adapters_work_with(how):
    """The same loss and gradients compiled or checkpointed; in bfloat16 to its rounding."""
    dropout = 0.3 if how == "dropout" else 0.0
    config = tiny_config(dropout=dropout, vocabulary_size=61)
    model = random_model(config, 3).train()
    attach(model, ROWS)
    move_adapters(model)
    other = copy.deepcopy(model)
    ids, targets = some_ids(model), some_ids(model, 1)
    torch.manual_seed(0)
    expected = gradients(model, ids, targets)
    torch.manual_seed(0)
    if how == "compiled":
        # As compile_in_place does, but what adapters change alone, without a C++ compiler.
        block = other.layers[0]
        for part in (block.attention.W_q, block.moe.experts):
            part.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    if how in ("checkpointed", "dropout"):
        other.activation_checkpointing = True
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = gradients(other, ids, targets)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        size = expected[name].abs().max().item()
        # bfloat16 keeps 8 bits: eps 2^-7, and some ten roundings follow each other.
        allowed = 0.5 if how == "autocast" else 1e-4
        assert (gradient - expected[name]).abs().max() <= allowed * size, name


def test_decoders_step_aside_and_generate_what_the_model_says():
    """None of them knows adapters: one that ignored them would answer as the base does."""
    plain = random_model(tiny_config(), 2).eval()
    adapted = copy.deepcopy(plain)
    attach(adapted, NOWHERE)
    move_adapters(adapted, size=0.3)
    for knows in (cpu_decode.KNOWS, decoder.KNOWS):
        assert "AdaptedLLM" in knows.why_not(adapted)
    with pytest.raises(ValueError, match="AdaptedLLM"):
        CLOSED_FORMS.check(adapted)

    def greedy(model: LLM) -> list[int]:
        writer = Decoder(model)
        settings = dict(temperature=0.0, top_k=0, top_p=1.0)
        steps = generate(writer, writer.texts(1, 30), [[1, 2, 3]], 12, **settings)
        return [token for step in steps for _, token in step]

    assert "AdaptedLLM" in Decoder(adapted).note
    assert greedy(adapted) == greedy(merged_model(adapted)) != greedy(plain)


def test_what_cannot_be_adapted_is_refused(tmp_path):
    model = random_model(CONFIG)
    attach(model, NOWHERE)
    with pytest.raises(ValueError, match="has adapters already"):
        attach(model, NOWHERE)

    with pytest.raises(ValueError, match="rows up to 40"):
        attach(random_model(CONFIG), dataclasses.replace(ROWS, first_row=38))

    class Changed(LLM):
        pass

    with pytest.raises(ValueError, match="not for a Changed"):
        attach(Changed(CONFIG), NOWHERE)
    source = read_checkpoint(base_run(tmp_path))
    given = dict(source=source, config=source.model_config)
    for settings, line in (
        (dict(rank=0), "lora_rank must be at least 1"),
        (dict(rank=2, alpha=0.0), "lora_alpha positive"),
        (dict(rank=9), "smallest matrix, 8"),
        (dict(rank=4, new_ids=[3, 9]), "follow each other"),
    ):
        with pytest.raises(ValueError, match=line):
            new_adapter(**given, **settings)


def test_the_experts_rank_follows_the_active_experts(tmp_path):
    source = read_checkpoint(base_run(tmp_path))
    config = dataclasses.replace(source.model_config, num_experts=4, top_k=3)
    for rank, expert_rank, expected in ((8, 0, 2), (2, 0, 1), (8, 5, 5)):
        assert new_adapter(source, config, rank, expert_rank).expert_rank == expected


def test_what_is_trained_is_said_by_part(tmp_path):
    source = read_checkpoint(base_run(tmp_path))
    settings = dict(lora_rank=4, lora_alpha=8.0, optimizer="muon", init_from="base.pt")
    adapters = Adapters(PostTrainConfig(**settings), source, (29, 30))
    model = LLM(CONFIG)
    adapters.prepare(model)
    shapes = {n: p.numel() for n, p in model.named_parameters() if is_trained(n)}
    parts = {
        "attention": sum(count for name, count in shapes.items() if ".attention." in name),
        "experts": sum(count for name, count in shapes.items() if ".experts." in name),
        "rows of 2 new ids": sum(count for name, count in shapes.items() if ".new_" in name),
    }
    first, second, third = adapters.describe(CONFIG)
    for part, count in parts.items():
        assert count and f"{part} {human_count(count)}" in first, first
    assert sum(parts.values()) == sum(shapes.values())
    whole = sum(p.numel() for n, p in model.named_parameters() if not is_trained(n))
    assert f"({100 * sum(shapes.values()) / whole:.2f} %)" in first
    assert str(source.path) in second and "AdamW" in third
    # The estimate of memory: what is saved is what is trained, and its moments.
    needed = {"weights": 4 * whole, "gradients": 4 * whole, "optimizer state": 8 * whole}
    ours = adapters.needed_bytes(needed, CONFIG)
    own = 4 * sum(shapes.values())
    assert (ours["weights"], ours["gradients"], ours["optimizer state"]) == (own, own, 2 * own)
    assert ours["frozen weights"] == 4 * whole
    assert adapters.gradient_bytes(ours) == own + 4 * whole


def test_without_a_rank_nothing_is_adapted():
    adapters, model = Adapters(PostTrainConfig(), None), LLM(CONFIG)
    adapters.prepare(model)
    needed = {"weights": 12}
    assert type(model) is LLM and adapters.describe(CONFIG) == []
    assert adapters.needed_bytes(needed, CONFIG) == needed
    assert adapters.gradient_bytes(needed) == 12
    with pytest.raises(ValueError, match="--init_from"):
        Adapters(PostTrainConfig(lora_rank=2), None)
