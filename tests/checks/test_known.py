"""runtime/known: what each second implementation declares.

And what it says of a model with more, less or other parts.
"""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch import nn

import train
from config_model import PRESETS, ModelConfig, option
from model import LLM
from runtime.base.ranks import ONE_PROCESS
from runtime.checkpoint.format import meta_model
from runtime.checks import known
from runtime.inference import cpu_decode
from runtime.inference import decoder as inference
from runtime.inference.quantize import KINDS, quantize_
from runtime.interop import huggingface
from runtime.training.plan import describe
from runtime.training.task import Task
from tests.builders import random_config, random_model, tiny_config
from tests.implementations import IMPLEMENTATIONS, NOT_KNOWN, at_default
from tests.shared_checks import fields_not_varied


def test_the_random_configurations_vary_every_field():
    """Two new fields passed every test unseen.

    What holds for random configurations held for models without them.
    """
    assert fields_not_varied() == []


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_field_is_known_or_said_not_to_be(name):
    """A new field of ModelConfig needs a decision here.

    For each implementation: whether it knows the field.
    """
    assert {f.name for f in dataclasses.fields(ModelConfig)} - IMPLEMENTATIONS[
        name
    ].fields == NOT_KNOWN[name]
    assert IMPLEMENTATIONS[name].fields <= {f.name for f in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_module_and_tensor_of_the_random_models_is_known(name):
    """Or fast paths would step aside from models that they have always computed.

    And no name is there for nothing. Fields that an implementation does not know are at their
    default for it.
    """
    modules, tensors = set(), set()
    for seed in range(60):
        config = random_config(seed)
        assert IMPLEMENTATIONS[name].unknown(meta_model(at_default(config, name))) == []
        model = meta_model(config)
        modules |= {known.pattern(name) for name, _ in model.named_modules()}
        tensors |= {known.pattern(name) for name, _ in known.named_tensors(model)}
    assert modules == known.MODULES.keys() and tensors == known.TENSORS


@pytest.mark.parametrize(
    "knows", [cpu_decode.KNOWS, inference.KNOWS], ids=["C decoder", "decode_step"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_decoders_know_packed_weights(knows, kind):
    model = quantize_(random_model(tiny_config()), kind)
    assert knows.unknown(model) == []
    packed = {known.pattern(name) for name, _ in known.named_tensors(model)} - known.TENSORS
    assert packed == known.PACKED_TENSORS
    assert huggingface.KNOWS.unknown(model) != []


@dataclasses.dataclass(frozen=True)
class Wider(ModelConfig):
    """An edited or derived config."""

    router_scores: str = option("softmax", "scores of the router")


def with_more(config) -> LLM:
    model = meta_model(config)
    model.layers[1].moe.shared = nn.Sequential(nn.Linear(4, 4))
    return model


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_is_not_known_is_named_once(name):
    """A module's inside is not listed after it; a field counts where it is not at its default."""
    knows, config = IMPLEMENTATIONS[name], Wider(**tiny_config().__dict__)
    assert set(knows.undeclared(config)) == {"router_scores"} | NOT_KNOWN[name]
    assert knows.why_not(meta_model(tiny_config())) == ""
    model = with_more(tiny_config())
    assert knows.unknown(model) == ["layers.*.moe.shared (Sequential)"]
    model.config = config
    assert knows.unknown(model) == ["layers.*.moe.shared (Sequential)"]
    model.config = dataclasses.replace(config, router_scores="sigmoid")
    assert knows.unknown(model) == [
        "ModelConfig.router_scores 'sigmoid'",
        "layers.*.moe.shared (Sequential)",
    ]
    assert (
        knows.why_not(model) == f"{knows.what} does not know ModelConfig.router_scores 'sigmoid', "
        "layers.*.moe.shared (Sequential)"
    )
    with pytest.raises(
        ValueError, match="does not know ModelConfig.router_scores 'sigmoid'.*teach it"
    ):
        knows.check(model)


class Sharper(nn.RMSNorm):
    pass


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda m: m.layers[0].attention.register_parameter(
                "scale", nn.Parameter(torch.ones(1))
            ),
            ["layers.*.attention.scale"],
        ),
        (lambda m: m.layers[1].register_buffer("mean", torch.ones(1)), ["layers.*.mean"]),
        (
            lambda m: m.layers[1].register_buffer("mean", torch.ones(1), persistent=False),
            ["layers.*.mean"],
        ),
        (
            lambda m: setattr(m.layers[1], "norm2", Sharper(32)),
            ["layers.*.norm2 as Sharper instead of RMSNorm"],
        ),
        (
            lambda m: setattr(m.layers[0], "norm2", Sharper(32)),
            ["layers.*.norm2 as Sharper instead of RMSNorm"],
        ),
        (lambda m: delattr(m, "norm"), ["a model without norm"]),
        (lambda m: setattr(m, "values", nn.Linear(2, 2)), ["values (Linear)"]),
    ],
    ids=["parameter", "buffer", "unsaved buffer", "norm", "norm of one", "no norm", "linear"],
)
def test_other_parts_are_named(change, said):
    """Also where one block alone has them: the last block's were once taken for all."""
    model = meta_model(tiny_config())
    change(model)
    assert cpu_decode.KNOWS.unknown(model) == said


# --------------------------------------------------------------------------- counts, initial scales
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_is_said_of_the_presets(preset):
    config = ModelConfig(**PRESETS[preset].model)
    counts = known.counts(config)
    assert (counts.uncounted, counts.note, known.initial_note(config)) == (0, "", "")
    assert counts.total == sum(p.numel() for p in meta_model(config).parameters())


@pytest.mark.parametrize("seed", range(30))
def test_every_parameters_beginning_is_declared(seed):
    assert known.initial_note(random_config(seed)) == ""


class Shared(nn.Module):
    """What a researcher adds to MoE."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 400, bias=False), nn.Linear(400, 32, bias=False)


def test_a_parameter_of_another_kind_is_counted_and_named_and_can_say_that_it_is_residual(
    monkeypatch,
):
    """A shared expert's output matrix began without the factor 1 / sqrt(2L), silently."""
    import model as model_module
    from runtime.checkpoint.format import meta_model as real

    class Block(model_module.Block):
        def __init__(self, config, block):
            super().__init__(config, block)
            self.shared = Shared()

    monkeypatch.setattr(model_module, "Block", Block)
    known.counts.cache_clear()
    config = tiny_config(transformer_blocks=2, init_std=0.1)
    note = known.initial_note(config)
    assert note.startswith(
        "LLM.initialise does not know layers.*.shared.up.weight, layers.*.shared.down.weight: "
        "normal with init_std 0.1"
    )
    counts = known.counts(config)
    assert counts.uncounted == 2 * 2 * 400 * 32 and counts.total == sum(
        p.numel() for p in real(config).parameters()
    )
    assert (
        "layers.* as Block" not in counts.note
        and "do not know layers.*.shared (Shared): its +51,200 parameters" in counts.note
    )
    torch.manual_seed(0)
    ordinary = LLM(config).layers[0].shared.down.weight.std().item()
    monkeypatch.setattr(Shared, "residual_outputs", ("down.weight",), raising=False)
    assert "down.weight" not in known.initial_note(config)
    torch.manual_seed(0)
    scaled = LLM(config).layers[0].shared.down.weight.std().item()
    # sqrt(2L) = 2.
    assert scaled == pytest.approx(ordinary / 2, rel=1e-5)
    known.counts.cache_clear()


def test_train_says_both_before_the_first_step(monkeypatch):
    """The line with the parameters holds the model's own, and notes say what no estimate has."""
    monkeypatch.setattr(
        known,
        "counts",
        lambda config: known.Counts(123_456_789, 23_456_789, 1_000, "the closed forms are off"),
    )
    monkeypatch.setattr(known, "initial_note", lambda config: "LLM.initialise does not know x")
    plan = types.SimpleNamespace(
        model_config=tiny_config(),
        config=train.TrainConfig(),
        task=Task(),
        device=torch.device("cpu"),
        source=None,
        ranks=ONE_PROCESS,
        dtype=torch.float32,
        loss_rows=0,
    )
    lines = describe(plan, {"weights": 1, "optimizer state": 1})
    assert lines[0].startswith("model    123 M parameters, 23.5 M active per token")
    notes = [line for line in lines if line.startswith("note")]
    assert notes == [
        "note     the closed forms are off",
        "note     LLM.initialise does not know x",
    ]
    plan.source = object()
    # Loaded weights are not initialised.
    assert [
        line
        for line in describe(plan, {"weights": 1, "optimizer state": 1})
        if "initialise" in line
    ] == []


def test_a_name_that_ends_alike_is_another_kind():
    """`shared_w_out` began as w_out does, and the line said that it did not."""
    config = tiny_config(transformer_blocks=2, init_std=0.1)
    model = LLM(config)
    model.layers[0].shared_w_out = torch.nn.Parameter(torch.empty(100, 100))
    model.initialise()
    # The estimate of a deviation from n numbers is off by a share of 1 / sqrt(2 n).
    assert model.layers[0].shared_w_out.std().item() == pytest.approx(0.1, rel=5 / (2e4**0.5))
