"""What only a CUDA GPU runs: its kernels against the plain paths on a CPU.

Also skipped steps, compiled training, resuming, ranks.
"""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import train
from config_model import TrainConfig
from model import sample
from model_parts import attention_mask, attention_with_sinks
from runtime.base.device import autocast
from runtime.base.ranks import ONE_PROCESS
from runtime.checks.kernels import settle_kernels
from runtime.distributed.parallel import Parallel
from runtime.inference import decoder as inference
from runtime.inference.decoder import Decoder
from runtime.inference.quantize import quantize_
from runtime.kernels.attention_choice import card_of, choose_attention, gpu_attention
from runtime.kernels.bias_attention import VARIABLE, bias_attention, plain_attention
from runtime.kernels.choose import choose_kernels
from runtime.kernels.linear_cross_entropy import IGNORE, add_product_
from runtime.kernels.sink_attention import sink_attention
from runtime.posttraining.rollouts import Sampler
from runtime.serving.engine import Engine
from runtime.training.optimizer import build_optimizer
from runtime.training.plan import make_plan
from tests.builders import random_model, sink_case, tiny_config
from tests.builders_inference import (
    COMPILED_CASES,
    COMPILED_SPAN,
    MODELS,
    PROMPTS,
    after_an_update,
    assert_same_texts,
    decoder_on,
    generated,
)
from tests.builders_precision import dtypes_seen
from tests.builders_ranks import Trained, trained
from tests.builders_runs import MODEL, SPEED, Run, assert_same, settings_of
from tests.builders_serving import Client, ids_of_generate, request_of
from tests.ranks import run_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")


def losses_and_gradients(
    model, device: torch.device, dtype: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).to(device)
    choose_kernels(model, device, dtype)
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocabulary_size, (2, 32)).to(device)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    with autocast(device, dtype):
        out = model(ids, targets)
    (out.cross_entropy_sum / out.num_targets + out.aux_loss).backward()
    return (out.cross_entropy_sum / out.num_targets).item(), {
        n: p.grad.float().cpu() for n, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_attention_bias": True, "qk_norm": False},
        {"expert_activation": "gelu", "expert_bias": True, "head_bias": True},
        {"sliding_window": 8},
        {"attention_sinks": True, "qk_norm": False},
        MODELS["gpt-oss"],
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_gpu_computes_what_a_cpu_does(changes, dtype, tolerance):
    """Grouped experts, flash or memory-efficient attention, chunked loss.

    Loss and every gradient.
    """
    model = random_model(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            # bfloat16 follows small weights; large ones make other experts win.
            parameter.mul_(0.3)
    loss, gradients = losses_and_gradients(model, torch.device("cpu"), torch.float32)
    on_gpu, gradients_on_gpu = losses_and_gradients(model, CUDA, dtype)
    assert on_gpu == pytest.approx(loss, rel=tolerance / 5)
    for name, expected in gradients.items():
        assert (gradients_on_gpu[name] - expected).norm() <= tolerance * expected.norm() + 1e-6, (
            name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_attention_with_sinks_by_a_gpus_kernels(seed, dtype):
    """cuDNN (Hopper) or flash without a mask beyond causality, else the memory-efficient kernel.

    Results and all gradients, in tiny heads of 8.
    """
    q, k, v, sinks, mask, is_causal = (
        x.to(CUDA) if isinstance(x, torch.Tensor) else x for x in sink_case(seed, torch.float64)
    )
    q, k, v = (
        torch.cat((x, x), dim=-1)[..., :8].to(dtype).detach().requires_grad_() for x in (q, k, v)
    )
    sinks = sinks.float().detach().requires_grad_()
    gradient, results = torch.randn_like(q), []
    for kernel in (attention_with_sinks, functools.partial(sink_attention, card=card_of(CUDA))):
        y = kernel(q, k, v, sinks, mask, is_causal)
        results.append((y, *torch.autograd.grad(y, (q, k, v, sinks), gradient)))
    for plain, other in zip(*results, strict=True):
        assert (plain.double() - other.double()).norm() <= (
            1e-4 if dtype == torch.float32 else 3e-2
        ) * plain.double().norm()


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
        before = [p.detach().clone() for p in parameters] + [
            t.clone() for state in optimizer.state.values() for t in state.values()
        ]
        assert (
            train._update(optimizer, scaler, parameters, torch.ones((), device=CUDA), 1.0)[1].item()
            is bad
        )
        after = parameters + [t for state in optimizer.state.values() for t in state.values()]
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "flags",
    [
        ["--compile"],
        ["--optimizer", "muon"],
        ["--document_mask", "--dtype", "bfloat16"],
        ["--no-use_attention_bias", "--activation_checkpointing"],
        ["--dtype", "float16"],
        ["--micro_batch", "auto"],
    ],
)
def test_it_trains(data, tmp_path, flags):
    """The whole program, with pinned prefetching, in the ways that a GPU takes."""
    run = Run(data, tmp_path)
    assert run("--device", "cuda", "--max_steps", "12", "--lr", "1e-2", *flags) == 0
    losses = [r["loss"] for r in run.records() if r["kind"] == "train"]
    assert losses[-1] < losses[0] and not run.final().run["skipped_steps"]


@pytest.mark.parametrize("table", ["--use_attention_bias", "--no-use_attention_bias"])
def test_a_deterministic_run_resumes_bit_for_bit(data, tmp_path, table):
    flags = ["--device", "cuda", "--dtype", "bfloat16", "--deterministic", table, "--max_steps"]
    try:
        straight, cut = Run(data, tmp_path / "straight"), Run(data, tmp_path / "cut")
        assert straight(*flags, "8") == 0
        plan = make_plan(settings_of(*MODEL, *SPEED, *cut.folders, *flags, "8"), train.pretraining)
        cut.ckpt_dir.parent.mkdir()
        assert (
            train.run(
                dataclasses.replace(plan, config=dataclasses.replace(plan.config, save_interval=4))
            )
            == 0
        )
        (cut.ckpt_dir / "latest.pt").unlink()
        for path in cut.ckpt_dir.glob("*.pt"):
            if path.name != "step_0000004.pt":
                path.unlink()
        assert cut("--resume", fresh=False) == 0
        assert_same(straight.final(), cut.final())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_captured_step_gives_the_cpus_texts(changes, packed, monkeypatch):
    """Across the end of the context and up to it. Several graphs in one memory."""
    monkeypatch.setattr(inference, "GRAPH_SPAN", 4)
    model, decoder = decoder_on(CUDA, changes, packed)
    for slide in (True, False):
        assert_same_texts(model, decoder, slide=slide)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_serving_engine_gives_the_cpus_texts(changes, monkeypatch):
    """Chunks by the model, single tokens by captured steps, and those with experts by the model."""
    monkeypatch.setattr(inference, "GRAPH_SPAN", 4)
    model, decoder = decoder_on(CUDA, changes, False)
    requests = [
        request_of(ids, 60, temperature=0.0, logprobs=2, experts=i == 1)
        for i, ids in enumerate(PROMPTS)
    ]
    engine = Engine(decoder, slots=3, prefill_chunk=6)
    try:
        assert not engine.is_exact
        clients = [Client(engine, request) for request in requests]
        drawn = [client.ids for client in clients]
    finally:
        engine.close()
    assert drawn == [ids_of_generate(model, request) for request in requests]


def test_two_serving_engines_capture_their_graphs_at_a_time(monkeypatch):
    """As a server's with two models, a thread each: one's capture must not end the other's."""
    monkeypatch.setattr(inference, "GRAPH_SPAN", 4)
    both = [decoder_on(CUDA, {"num_experts": experts}, False) for experts in (4, 8)]
    requests = [request_of(ids, 60, temperature=0.0) for ids in PROMPTS]
    engines = [Engine(decoder, slots=3, prefill_chunk=6) for _, decoder in both]
    try:
        clients = [[Client(engine, request) for request in requests] for engine in engines]
        drawn = [[client.ids for client in own] for own in clients]
    finally:
        for engine in engines:
            engine.close()
    assert drawn == [[ids_of_generate(model, request) for request in requests] for model, _ in both]


@pytest.mark.parametrize("changes, packed", COMPILED_CASES.values(), ids=COMPILED_CASES)
def test_a_compiled_step_gives_the_cpus_texts(changes, packed, monkeypatch):
    """Each case compiles a whole model for each span of the cache, up to a minute.

    They were 16 cases of four or five spans, each twice: some 70 compiles, which no rented quarter
    of an hour has room for. Now two cases of two spans.
    """
    monkeypatch.setattr(inference, "GRAPH_SPAN", COMPILED_SPAN)
    model, decoder = decoder_on(CUDA, changes, packed, compile=True)
    assert_same_texts(model, decoder, slide=True)


def test_a_step_waits_for_nothing():
    """Neither drawing nor the next step may stop the host.

    It only waits for the copy of the drawn ids.
    """
    model = random_model(tiny_config(context_length=64)).to(CUDA).eval()
    choose_kernels(model, CUDA, torch.float32)
    decoder = Decoder(model)
    texts = decoder.texts(3, 64)
    # Captured now.
    assert all(len(row) == 5 for row in generated(decoder, PROMPTS[:3], 5, texts))
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
    ids = torch.randint(
        0, model.config.vocabulary_size, (1, 20), generator=torch.Generator().manual_seed(0)
    )
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        logits = on_gpu(ids.to(CUDA)).logits
    assert (logits.float().cpu() - model(ids).logits).norm() <= (
        0.1 if dtype == torch.bfloat16 else 1e-4
    ) * model(ids).logits.norm()


# ------------------------------------------------------------------------- attention by each kernel
BACKENDS = {0: "torch", 1: "flash", 2: "efficient", 3: "cudnn"}


def attention_case(T: int, mask: str, D: int = 64, dtype: torch.dtype = torch.bfloat16):
    """Queries of 4 heads, keys and values of 2, a mask or None; all on the GPU."""
    torch.manual_seed(0)
    random = (torch.randn(2, T, heads, D, device=CUDA, dtype=dtype) for heads in (4, 2, 2))
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in random)
    position = torch.arange(T, device=CUDA)
    window = attention_mask(position, position, 50)
    return q, k, v, None if mask == "none" else window


def attention_operations(function) -> set[str]:
    """The attention kernels that PyTorch calls in a function."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "attention" in str(op):
                names.add(str(op).split(".")[1])
            return op(*args, **(kwargs or {}))

    names: set[str] = set()
    with Record():
        function()
    return names


@pytest.mark.parametrize("grad", [True, False], ids=["training", "generating"])
@pytest.mark.parametrize("T, mask", [(256, "none"), (256, "fixed"), (192, "fixed"), (200, "none")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_pytorch_takes_the_kernel_that_the_table_says(dtype, T, mask, grad):
    """Where it is not called by name. A wrong guess would copy heads, or hold all scores."""
    q, k, v, given = attention_case(T, mask, dtype=dtype)
    choice = choose_attention(card_of(CUDA), dtype, mask, T, 64, grad)
    if choice.by_name:
        pytest.skip("called by its name")
    if choice.copies_heads:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    with torch.set_grad_enabled(grad):
        taken = torch._fused_sdp_choice(
            q, k, v, given, 0.0, given is None, scale=None, enable_gqa=k.shape[1] != 4
        )
    assert BACKENDS[taken] == choice.kernel


@pytest.mark.parametrize(
    "T, mask", [(256, "none"), (192, "none"), (1, "none"), (192, "fixed"), (200, "fixed")]
)
def test_attention_on_a_gpu_is_the_plain_one(T, mask):
    """By whichever kernel: results and gradients, training and generating, against float64."""
    q, k, v, given = attention_case(T, mask)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    repeated = (x.repeat_interleave(2, dim=1) for x in wide[1:])
    exact = torch.nn.functional.scaled_dot_product_attention(
        wide[0], *repeated, attn_mask=given, is_causal=given is None
    )
    y = gpu_attention(q, k, v, given, given is None, 0.0, card_of(CUDA))
    gradient = torch.randn_like(y)
    with torch.no_grad():
        generated_y = gpu_attention(q, k, v, given, given is None, 0.0, card_of(CUDA))
    expected = (exact, exact, *torch.autograd.grad(exact, wide, gradient.double()))
    for got, want in zip(
        (y, generated_y, *torch.autograd.grad(y, (q, k, v), gradient)), expected, strict=True
    ):
        # Weights and results are rounded to bfloat16, gradients also see the rounded results.
        assert (got.double() - want).norm() <= 8 * 2**-8 * want.norm() + 1e-6


@pytest.mark.parametrize("T, D", [(256, 64), (192, 32), (1024, 128), (130, 64)])
def test_sinks_at_full_size_by_a_gpus_kernels(T, D):
    """The kernel that trains, cuDNN on Hopper, and the one that generates."""
    q, k, v, _ = attention_case(T, "none", D)
    sinks = torch.randn(4, device=CUDA, requires_grad=True)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    exact = attention_with_sinks(*wide, None, True)
    y = sink_attention(q, k, v, sinks, None, True, card_of(CUDA))
    gradient = torch.randn_like(y)
    with torch.no_grad():
        generated_y = sink_attention(q, k, v, sinks, None, True, card_of(CUDA))
    expected = (exact, exact, *torch.autograd.grad(exact, wide, gradient.double()))
    got = (y, generated_y, *torch.autograd.grad(y, (q, k, v, sinks), gradient))
    for one, want in zip(got, expected, strict=True):
        assert (one.double() - want).norm() <= 8 * 2**-8 * want.norm() + 1e-6


# --------------------------------------------------------------------- the learned bias, by Triton
def bias_case(B: int, H: int, G: int, T: int, D: int, L: int, dtype: torch.dtype):
    """Queries, keys, values, a table and the gradient of the output, as the model has them."""
    g = torch.Generator(CUDA).manual_seed(T)
    random = [torch.randn(B, T, n, D, generator=g, device=CUDA, dtype=dtype) for n in (H, G, G, H)]
    q, k, v, dy = (x.transpose(1, 2) for x in random)
    return [q, k, v, torch.randn(H, L, L, generator=g, device=CUDA)], dy


def with_gradients(function, given, dy) -> list[torch.Tensor]:
    """The output, and the gradients of all that is given."""
    leaves = [x.detach().requires_grad_() for x in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize(
    "B, H, G, T, D, L, dtype",
    [
        (2, 4, 2, 200, 32, 256, torch.bfloat16),
        (1, 8, 1, 65, 64, 65, torch.bfloat16),
        (3, 4, 4, 63, 128, 64, torch.bfloat16),
        (1, 2, 1, 130, 24, 160, torch.float16),
        (1, 2, 1, 1, 32, 16, torch.bfloat16),
        (2, 4, 1, 100, 32, 112, torch.float32),
        (16, 32, 8, 2048, 32, 2048, torch.bfloat16),
    ],
    ids=str,
)
def test_the_learned_bias_by_triton_is_the_plain_one(B, H, G, T, D, L, dtype):
    """Against float64; the default model's size against the same in float32, a few heads of it.

    Two runs give the same bits. What no query sees has a gradient of 0, in memory that held NaN.
    """
    given, dy = bias_case(B, H, G, T, D, L, dtype)
    ours = functools.partial(bias_attention, dtype=dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = with_gradients(ours, given, dy), with_gradients(ours, given, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    dtable = first[-1]
    assert not dtable.triu(1).any() and not dtable[:, T:].any()
    group = H // G
    q, k, v, table = given
    # All query heads of the first key head; the others are as many computations of the same kind.
    given = [q[:, :group], k[:, :1], v[:, :1], table[:group]]
    wide = torch.float64 if T < 1000 else torch.float32
    exact = with_gradients(plain_attention, [x.to(wide) for x in given], dy[:, :group].to(wide))
    y, dq, dk, dv, _ = first
    got = [y[:, :group], dq[:, :group], dk[:, :1], dv[:, :1], dtable[:group]]
    for one, want in zip(got, exact, strict=True):
        # As for the other kernels here; float32 is not rounded to TF32.
        bound = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert (one.double() - want.double()).norm() <= bound * want.double().norm() + 1e-6


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_model_trains_by_triton(monkeypatch, compile):
    """Chosen by the variable, asked, and used: loss and gradients are a CPU's."""
    monkeypatch.setenv(VARIABLE, "triton")
    model = random_model(tiny_config(use_attention_bias=True, qk_norm=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    loss, gradients = losses_and_gradients(model, torch.device("cpu"), torch.float32)
    on_gpu = copy.deepcopy(model).to(CUDA)
    choose_kernels(on_gpu, CUDA, torch.bfloat16)
    (line,) = settle_kernels(on_gpu)
    assert line.startswith("Triton computes attention with the learned bias")
    if compile:
        on_gpu.layers[0].attention.compile(fullgraph=True, dynamic=False)
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocabulary_size, (2, 32)).to(CUDA)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    with autocast(CUDA, torch.bfloat16):
        out = on_gpu(ids, targets)
    mean = out.cross_entropy_sum / out.num_targets
    (mean + out.aux_loss).backward()
    assert mean.item() == pytest.approx(loss, rel=0.02)
    for name, parameter in on_gpu.named_parameters():
        expected = gradients[name]
        difference = (parameter.grad.float().cpu() - expected).norm()
        assert difference <= 0.1 * expected.norm() + 1e-6, name


def test_a_run_says_that_it_is_by_triton(data, tmp_path, monkeypatch, capsys):
    """The whole program, and a step under a document mask, which the kernels do not know."""
    monkeypatch.setenv(VARIABLE, "triton")
    flags = ["--device", "cuda", "--dtype", "bfloat16", "--max_steps", "12", "--lr", "1e-2"]
    run = Run(data, tmp_path / "one")
    assert run(*flags, "--use_attention_bias") == 0
    losses = [r["loss"] for r in run.records() if r["kind"] == "train"]
    assert losses[-1] < losses[0] and not run.final().run["skipped_steps"]
    assert "Triton computes attention" in "".join(capsys.readouterr())
    other = Run(data, tmp_path / "other")
    assert other(*flags, "--use_attention_bias", "--document_mask") == 0
    assert "the kernels know no documents" in "".join(capsys.readouterr())


def test_generating_builds_no_plan_of_cudnn():
    """A plan costs 0.4 s for each new length of a prompt."""
    model = random_model(tiny_config(context_length=64)).to(CUDA, torch.bfloat16)
    choose_kernels(model, CUDA, torch.bfloat16)
    decoder = Decoder(model)
    (text,) = decoder.texts(1, 64)

    def read():
        for length in (7, 19, 31):
            decoder.read(text, list(range(length)))

    with torch.inference_mode():
        assert not any("cudnn" in name for name in attention_operations(read))


def test_the_heads_gradient_is_summed_unrounded():
    """torch.addmm with out_dtype, in the shapes of the loss: a slice of padded rows, transposed."""
    g = torch.Generator(CUDA).manual_seed(0)
    buffer = torch.randn(300, 192, generator=g, device=CUDA).bfloat16()
    h = torch.randn(300, 64, generator=g, device=CUDA).bfloat16()
    chunk, total = buffer[:, :187], torch.full((187, 64), float("nan"), device=CUDA)
    exact, magnitude = chunk.double().T @ h.double(), chunk.double().abs().T @ h.double().abs()
    for times in (1, 2, 3):
        add_product_(total, chunk, h, is_first=times == 1)
        bound = times * 301 * 2**-24 * times * magnitude
        assert ((total.double() - times * exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_rollouts_on_a_gpu_follow_the_weights(changes, dtype, most):
    """The graphs of the first sampling read the weights of the second.

    Autocast's memory of cast weights would be that of the capture. The median, because routers may
    send some tokens elsewhere: as a share of the largest logit.
    """
    model = random_model(tiny_config(context_length=32, **changes), 3).to(CUDA).eval()
    prompts, banned = PROMPTS[:4], [0, 7]
    sampler = Sampler(
        model, stop_ids=[9, 10, 11], banned_ids=banned, max_new_tokens=12, dtype=dtype
    )
    for _ in range(2):
        off = []
        for prompt, group in zip(prompts, sampler.sample(prompts, 3, 7), strict=True):
            for answer in group:
                ids_1T = torch.tensor([prompt + answer.ids], device=CUDA)
                with torch.no_grad(), autocast(CUDA, dtype):
                    logits_TV = model(ids_1T).logits[0, len(prompt) - 1 : -1].double().cpu()
                masked_TV = logits_TV.index_fill(1, torch.tensor(banned), -torch.inf)
                expected_T = masked_TV.log_softmax(1)[range(len(answer.ids)), answer.ids]
                off.append((torch.tensor(answer.log_probs) - expected_T).abs())
        assert torch.cat(off).median() <= most * logits_TV.abs().max()
        after_an_update(model)


# --------------------------------------------------------------------------------------- the ranks
# Of losses after some steps, whose products are in another order, and in bfloat16 on both sides.
RANKS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@pytest.fixture
def one_rank(tmp_path):
    """Return a group of one rank on the GPU, by NCCL."""
    if not dist.is_nccl_available():
        pytest.skip("this PyTorch has no NCCL")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    backend = "cpu:gloo,cuda:nccl"
    torch.cuda.set_device(0)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield Parallel(torch.device("cuda", 0), 1)
    finally:
        dist.destroy_process_group()


def assert_same_losses(one: Trained, other: Trained, dtype: str) -> None:
    assert len(one.records) == len(other.records) > 3
    for expected, found in zip(one.records, other.records, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=RANKS_TOLERANCE[dtype])
        assert all(value == value for value in found.values() if isinstance(value, float))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "muon", "activation_checkpointing": True}, {"shard": "none"}]
)
def test_one_rank_with_shards_is_one_process(one_rank, dtype, changes):
    """--shard full on a GPU, where nothing is split, computes what plain training does."""
    config, changes = tiny_config(), changes | dict(dtype=dtype)
    one = trained(ONE_PROCESS, config, changes, CUDA)
    assert_same_losses(one, trained(one_rank, config, changes, CUDA), dtype)


def test_a_router_on_a_gpu_has_float32_weights(one_rank):
    """Matrices are gathered in bfloat16 there; what a router or a norm computes with is not."""
    found = dtypes_seen(one_rank, "bfloat16")
    used = {name.removeprefix("layers.0."): dtype for name, dtype in found.items()}
    for name in ("moe.router.weight", "norm1.weight", "attention.sinks", "embed.weight"):
        assert used[name] == "float32", name
    for name in ("moe.experts.w_in", "attention.W_q.weight", "attention.out_proj.weight"):
        assert used[name] == "bfloat16", name


def on_the_one_gpu(ranks, config, changes: dict) -> Trained | str:
    """Return what one of several ranks on one GPU trained, or why gloo does not carry it."""
    try:
        return trained(Parallel(torch.device("cuda", 0), ranks.world), config, changes, CUDA)
    except (RuntimeError, NotImplementedError) as error:
        if "gloo" not in str(error).lower():
            raise
        return str(error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_share_one_gpu(dtype):
    """NCCL wants a GPU for each rank. Gloo carries what a GPU holds, by way of the host."""
    config, changes = tiny_config(), dict(dtype=dtype)
    others = run_on(2, on_the_one_gpu, config, changes)
    if isinstance(others[0], str):
        pytest.skip(f"gloo: {others[0][:200]}")
    one = trained(ONE_PROCESS, config, changes, CUDA)
    for other in others:
        assert_same_losses(one, other, dtype)
