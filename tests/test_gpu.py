"""What only a CUDA GPU runs: its kernels against the plain paths on a CPU, skipped steps, compiled training, resuming."""
from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch

import runtime.inference as inference
import train
from config_model import TrainConfig
from model import IGNORE, LLM, sample
from model_parts import attention_with_sinks
from runtime.device import autocast, choose_kernels
from runtime.inference import Decoder
from runtime.optimizer import build_optimizer
from runtime.quantize import quantize_
from runtime.sink_attention import sink_attention
from tests.test_inference import MODELS, PROMPTS, alone
from tests.test_inference import run as generated
from tests.test_model_parts import sink_case
from tests.test_train import MODEL, SPEED, Run, _settings, assert_same, data  # noqa: F401  (a fixture)
from tests.util import random_model, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")
CONTEXT = 32
# What differs most from the plain model, and what is read most differently; spans of 16 and 32 of the
# cache's places.
COMPILED_CASES = {"gpt-oss": (MODELS["gpt-oss"], False), "table-packed": (MODELS["table"], True)}
COMPILED_SPAN = 16


def losses_and_gradients(model, device: torch.device, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).to(device)
    choose_kernels(model, device, dtype)
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocabulary_size, (2, 32)).to(device)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    with autocast(device, dtype):
        out = model(ids, targets)
    (out.cross_entropy_sum / out.num_targets + out.aux_loss).backward()
    return (out.cross_entropy_sum / out.num_targets).item(), {n: p.grad.float().cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"use_attention_bias": True, "qk_norm": False}, {"expert_activation": "gelu", "expert_bias": True, "head_bias": True}, {"sliding_window": 8},
                                     {"attention_sinks": True, "qk_norm": False}, MODELS["gpt-oss"]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_gpu_computes_what_a_cpu_does(changes, dtype, tolerance):
    """Grouped experts, flash or memory-efficient attention, the loss in chunks: loss and every gradient."""
    model = random_model(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)  # bfloat16 follows small weights; large ones make other experts win
    loss, gradients = losses_and_gradients(model, torch.device("cpu"), torch.float32)
    on_gpu, gradients_on_gpu = losses_and_gradients(model, CUDA, dtype)
    assert on_gpu == pytest.approx(loss, rel=tolerance / 5)
    for name, expected in gradients.items():
        assert (gradients_on_gpu[name] - expected).norm() <= tolerance * expected.norm() + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_attention_with_sinks_by_a_gpus_kernels(seed, dtype):
    """Flash where nothing is masked beyond causality, the memory-efficient kernel else; results and all gradients, in tiny heads of 8."""
    q, k, v, sinks, mask, is_causal = (x.to(CUDA) if isinstance(x, torch.Tensor) else x for x in sink_case(seed, torch.float64))
    q, k, v = (torch.cat((x, x), dim=-1)[..., :8].to(dtype).detach().requires_grad_() for x in (q, k, v))
    sinks = sinks.float().detach().requires_grad_()
    gradient, results = torch.randn_like(q), []
    fast = functools.partial(sink_attention, has_flash=dtype == torch.bfloat16)
    for kernel in (attention_with_sinks, fast):
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))   # as Attention does where flash cannot be used
        y = kernel(q, keys, values, sinks, mask, is_causal)
        results.append((y, *torch.autograd.grad(y, (q, k, v, sinks), gradient)))
    for plain, other in zip(*results, strict=True):
        assert (plain.double() - other.double()).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * plain.double().norm()


@pytest.mark.parametrize("flags", [{}, {"optimizer": "muon"}, {"state_dtype": "bfloat16"}])
def test_a_step_that_is_not_finite_changes_no_bit(flags):
    """The optimizer is told on the device, by found_inf, which the host does not read."""
    model = random_model(tiny_config()).to(CUDA)
    config = TrainConfig(**flags)
    optimizer, scaler = build_optimizer(model, config), torch.amp.GradScaler("cuda", enabled=False)
    parameters = list(model.parameters())
    for bad in (False, True):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if bad:
            parameters[3].grad.view(-1)[0] = float("nan")
        before = [p.detach().clone() for p in parameters] + [t.clone() for state in optimizer.state.values() for t in state.values()]
        assert train._update(optimizer, scaler, parameters, torch.ones((), device=CUDA), 1.0)[1].item() is bad
        after = parameters + [t for state in optimizer.state.values() for t in state.values()]
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("flags", [["--compile"], ["--optimizer", "muon"], ["--document_mask", "--dtype", "bfloat16"], ["--no-use_attention_bias", "--activation_checkpointing"],
                                   ["--dtype", "float16"], ["--micro_batch", "auto"]])
def test_it_trains(data, tmp_path, flags):  # noqa: F811
    """The whole program, with pinned prefetching, in the ways that a GPU takes."""
    run = Run(data, tmp_path)
    assert run("--device", "cuda", "--max_steps", "12", "--lr", "1e-2", *flags) == 0
    losses = [r["loss"] for r in run.records() if r["kind"] == "train"]
    assert losses[-1] < losses[0] and not run.final().run["skipped_steps"]


@pytest.mark.parametrize("table", ["--use_attention_bias", "--no-use_attention_bias"])
def test_a_deterministic_run_resumes_bit_for_bit(data, tmp_path, table):  # noqa: F811
    flags = ["--device", "cuda", "--dtype", "bfloat16", "--deterministic", table, "--max_steps"]
    try:
        straight, cut = Run(data, tmp_path / "straight"), Run(data, tmp_path / "cut")
        assert straight(*flags, "8") == 0
        plan = train.make_plan(_settings(*MODEL, *SPEED, *cut.folders, *flags, "8"))
        cut.ckpt_dir.parent.mkdir()
        assert train.run(dataclasses.replace(plan, config=dataclasses.replace(plan.config, save_interval=4))) == 0
        (cut.ckpt_dir / "latest.pt").unlink()
        for path in cut.ckpt_dir.glob("*.pt"):
            if path.name != "step_0000004.pt":
                path.unlink()
        assert cut("--resume", fresh=False) == 0
        assert_same(straight.final(), cut.final())
    finally:
        torch.use_deterministic_algorithms(False)


def decoder_on_gpu(changes: dict, packed: bool, **options) -> tuple[LLM, Decoder]:
    """(a model on the CPU, a decoder of its copy on the GPU)."""
    model = random_model(tiny_config(context_length=CONTEXT, **changes), 3).eval()
    if packed:
        quantize_(model)
    on_gpu = copy.deepcopy(model).to(CUDA)
    choose_kernels(on_gpu, CUDA, torch.float32)
    return model, Decoder(on_gpu, **options)


def assert_same_texts(model: LLM, decoder: Decoder, **settings) -> None:
    """Ragged prompts, greedy, with the next step always on its way."""
    expected = [alone(model, prompt, 80, temperature=0, **settings) for prompt in PROMPTS]
    assert generated(decoder, PROMPTS, 80, temperature=0, **settings) == expected


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_captured_step_gives_the_cpus_texts(changes, packed, monkeypatch):
    """Across the end of the context and up to it. Several graphs in one memory."""
    monkeypatch.setattr(inference, "GRAPH_SPAN", 4)
    model, decoder = decoder_on_gpu(changes, packed)
    for slide in (True, False):
        assert_same_texts(model, decoder, slide=slide)


@pytest.mark.parametrize("changes, packed", COMPILED_CASES.values(), ids=COMPILED_CASES)
def test_a_compiled_step_gives_the_cpus_texts(changes, packed, monkeypatch):
    """Each case compiles a whole model for each span of the cache, up to a minute.

    They were 16 cases of four or five spans, each twice: some 70 compiles, which no rented quarter
    of an hour has room for. Now two cases of two spans.
    """
    monkeypatch.setattr(inference, "GRAPH_SPAN", COMPILED_SPAN)
    model, decoder = decoder_on_gpu(changes, packed, compile=True)
    assert_same_texts(model, decoder, slide=True)


def test_a_step_waits_for_nothing():
    """Neither drawing nor the next step may stop the host; the copy of the drawn ids, which it then waits for, is its own."""
    model = random_model(tiny_config(context_length=64)).to(CUDA).eval()
    choose_kernels(model, CUDA, torch.float32)
    decoder = Decoder(model)
    texts = decoder.texts(3, 64)
    assert all(len(row) == 5 for row in generated(decoder, PROMPTS[:3], 5, texts))   # captured now
    drawn = torch.tensor([1, 2, 3], device=CUDA)
    generators = [torch.Generator(CUDA).manual_seed(i) for i in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            drawn = sample(decoder.step(texts, drawn), 0.8, 5, 0.9, None, generators, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights_on_a_gpu_give_what_they_give_on_a_cpu(dtype):
    model = quantize_(random_model(tiny_config(), 1)).eval()
    on_gpu = copy.deepcopy(model).to(CUDA)
    ids = torch.randint(0, model.config.vocabulary_size, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        logits = on_gpu(ids.to(CUDA)).logits
    assert (logits.float().cpu() - model(ids).logits).norm() <= (0.1 if dtype == torch.bfloat16 else 1e-4) * model(ids).logits.norm()
