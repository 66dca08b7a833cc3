"""The attention benchmark at a tiny size: all variants agree, and a failing one says why."""

import json
import math

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module

from benchmarks import attention, common
from runtime.kernels import cpu_attention
from tests.numeric import rounding

HEADS = ["--num_heads", "4", "--num_kv_heads", "2", "--head_dim", "16"]
TINY = [
    "--name",
    "tiny",
    "--batch_size",
    "2",
    *HEADS,
    "--context_length",
    "40",
    "--documents",
    "3",
    "--repeats",
    "1",
    "--min_sample_seconds",
    "1e-6",
]
# Whatever the processor; the last one where there is a compiler.
ON_A_CPU = ("manual", "sdpa_grouped", "sdpa_expanded", "sdpa_math", "c")
if cpu_attention.library()[0] is None:
    ON_A_CPU = ON_A_CPU[:-1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run main(flags) and return what it stored; restore PyTorch's settings and the environment."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "REPO", tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(
        torch.utils.deterministic,
        "fill_uninitialized_memory",
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)

    def run(*flags: str) -> dict:
        assert attention.main([*TINY, "--device", "cpu", *flags]) == 0
        return json.loads((tmp_path / "attention_tiny.json").read_text())

    return run


# Scores over 16 and sums over 40 keys, twice more backward, where a key meets 40 queries of 2
# heads.
BOUND = rounding(torch.float32, *3 * [16, 40, 40], 40 * 2)


def problem(case: str, *flags: str) -> attention.Problem:
    parser = attention.cli.parser("")
    for name, value in dict(num_heads=4, num_kv_heads=2, head_dim=16, documents=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return attention.make_problem(
        parser.parse_args(flags), case, 2, 40, torch.device("cpu"), torch.float32
    )


def check_row(row: dict, case: str, flops: int) -> None:
    leaves = {"q", "k", "v"} | {name for name in ("table", "sinks") if name in case}
    assert row["errors"].keys() == row["same_bits"].keys() == leaves | {"output"}
    # float32 against float64.
    assert 0 < max(row["errors"].values()) < BOUND
    assert (
        row["flops_per_sec"] == pytest.approx(flops / row["seconds"]["median"])
        and row["calls_per_sample"] == 1
    )
    # At least the output and the gradients.
    assert row["peak_above_inputs_bytes"] > 4 * 2 * (2 * 4 + 2 * 2) * 40 * 16


def test_benchmark_end_to_end(run, capsys):
    results = run("--cases", "causal,table,documents,table_documents")
    assert {"command", "commit", "hardware", "versions"} <= results["environment"].keys()
    assert [*results["cases"], "sinks"] == list(attention.CASES) and (
        results["batch_size"],
        results["context_length"],
        results["documents"],
    ) == (2, 40, 3)
    for case, figures in results["cases"].items():
        assert list(figures["variants"]) == [
            name for name in attention.VARIANTS if name != "sdpa_compiled"
        ]
        for name, modes in figures["variants"].items():
            assert list(modes) == ["default", "deterministic"]
            for row in modes.values():
                assert "why" not in row or name not in ON_A_CPU
                if "why" in row:
                    assert (
                        row.keys() == {"why"}
                        and row["why"].startswith("not supported here: ")
                        and len(row["why"]) > 40
                    )
                else:
                    check_row(row, case, figures["flops"])
            if name in ON_A_CPU:
                assert all(modes["deterministic"]["same_bits"].values())
        variants = {name: modes["default"] for name, modes in figures["variants"].items()}
        assert "FlexAttention does not support backward on CPU" in variants["flex"]["why"]
        assert (
            variants["sdpa_math"]["kernel"] == "math"
            and variants["manual"]["kernel"] is None
            and "viable" in variants["sdpa_cudnn"]["why"]
        )
        # Scores, masked, weights.
        assert variants["manual"]["peak_above_inputs_bytes"] > 3 * 4 * 2 * 4 * 40 * 40
    assert results["cases"]["causal"]["variants"]["sdpa_flash"]["default"]["kernel"] == "flash"
    assert results["cases"]["causal"]["visible_share"] == 41 / 80
    assert (
        results["cases"]["documents"]["visible_share"] < 0.4
        and "differ in" not in capsys.readouterr().out
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_sinks(run):
    """The kernels with rescaled results equal the full score matrix, without holding it.

    PyTorch's own function has no sinks and says so.
    """
    variants = {
        name: modes["default"]
        for name, modes in run("--cases", "sinks", "--variants", "manual,sdpa_expanded,rescaled")[
            "cases"
        ]["sinks"]["variants"].items()
    }
    for name in ("manual", "rescaled"):
        check_row(variants[name], "sinks", 6 * 2 * 4 * 16 * 2 * 40 * 41 // 2)
    assert (
        "knows no sinks" in variants["sdpa_expanded"]["why"]
        and variants["rescaled"]["peak_above_inputs_bytes"]
        < 0.5 * variants["manual"]["peak_above_inputs_bytes"]
    )


@pytest.mark.skipif(
    not hasattr(flex_module, "_validate_device"),
    reason="this PyTorch refuses its backward pass on a CPU elsewhere",
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", attention.CASES)
def test_flex_gives_the_same_numbers(case, monkeypatch):
    """Without the compiler FlexAttention can do its backward pass on a CPU, if it is let."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "compiled", lambda function: function)
    p = problem(case)
    errors = attention.relative_errors(
        attention.run_once(attention.prepare_flex(p), p), attention.expected(p)
    )
    assert (
        len(errors) == (4 if case in ("causal", "documents") else 5)
        and max(errors.values()) < BOUND
    )


def test_the_compiled_variant_is_compiled(monkeypatch):
    monkeypatch.setattr(
        attention,
        "compiled",
        lambda function: torch.compile(function, fullgraph=True, backend="aot_eager"),
    )
    p = problem("table_documents")
    results = attention.run_once(attention.VARIANTS["sdpa_compiled"](p), p)
    assert (
        max(attention.relative_errors(results, attention.expected(p)).values()) < BOUND
        and attention.kernel_of(results["output"]) == "compiled"
    )


def test_a_wrong_mask_and_changed_bits_are_seen(run, monkeypatch, capsys):
    """The columns error and bits are measured.

    Both show a variant that sees everything and adds noise.
    """

    def wrong(p):
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            p.q_BHTD + 1e-3 * torch.rand(()), *p.expanded()
        )

    monkeypatch.setitem(attention.VARIANTS, "manual", wrong)
    row = run("--cases", "causal", "--variants", "manual")["cases"]["causal"]["variants"]["manual"][
        "default"
    ]
    assert (
        row["errors"]["output"] > 0.1
        and not row["same_bits"]["output"]
        and "differ in output, q" in capsys.readouterr().out
    )


def test_what_fails_loses_no_other(run, monkeypatch):
    """Out of memory at full size, an error only during timing.

    Also an operation without a deterministic kernel.
    """
    calls = []

    def out_of_memory(p):
        if p.q_BHTD.shape[2] == 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return lambda: attention.manual(p)

    def breaks_later(p):
        def attend():
            calls.append(p)
            if len(calls) > 6:
                raise RuntimeError("worn\nout")
            return attention.manual(p)

        return attend

    def not_deterministic(p):
        def attend():
            if torch.are_deterministic_algorithms_enabled():
                raise RuntimeError("no deterministic implementation")
            return attention.manual(p)

        return attend

    monkeypatch.setattr(attention, "CHECK_TOKENS", 20)
    monkeypatch.setitem(
        attention.VARIANTS, "flex", lambda p: lambda: math.nan * attention.manual(p)
    )
    for name, prepare in dict(
        sdpa_math=out_of_memory, sdpa_grouped=breaks_later, sdpa_expanded=not_deterministic
    ).items():
        monkeypatch.setitem(attention.VARIANTS, name, prepare)
    rows = run(
        "--cases",
        "table",
        "--variants",
        "sdpa_math,sdpa_grouped,sdpa_expanded,flex,manual",
        "--repeats",
        "3",
    )["cases"]["table"]["variants"]
    assert rows["sdpa_math"]["default"] == {"why": "out of memory"}
    assert rows["sdpa_grouped"]["default"] == {"why": "not supported here: RuntimeError: worn out"}
    assert (
        "seconds" in rows["sdpa_expanded"]["default"]
        and "no deterministic" in rows["sdpa_expanded"]["deterministic"]["why"]
    )
    assert rows["flex"]["default"]["why"].endswith(
        "ArithmeticError: not a number in output, q, k, v, table"
    )
    assert all("seconds" in row for row in rows["manual"].values())


def test_the_reason_is_the_librarys():
    warned = [
        "Flash attention kernel not used because: (Triggered internally at x.cpp:9.)",
        "Flash does not take a mask. (Triggered internally at x.cpp:7.)",
        "CuDNN attention has been runtime disabled. (Triggered internally at x.cpp:8.)",
    ]
    assert attention.reason(RuntimeError("No available kernel. Aborting."), warned) == (
        "not supported here: RuntimeError: No available kernel. Aborting. Flash does not "
        "take a mask."
    )
    assert attention.reason(ValueError("a\n b"), warned) == "not supported here: ValueError: a b"
    for said in (
        """(\"no backward on 'cpu'\")""",
        """([ConstantVariable(str: "no backward on 'cpu'")])""",
    ):
        wrapped = RuntimeError(
            f"Observed exception. Explanation: ... raised exception NotImplementedError{said}"
            + "x" * 1000
        )
        assert (
            attention.reason(wrapped, [])
            == "not supported here: NotImplementedError: no backward on 'cpu'"
        )
    assert len(attention.reason(RuntimeError("x" * 1000), [])) == attention.REASON_CHARACTERS


@pytest.mark.usefixtures("run")
def test_modes_end_with_their_block():
    for mode, inside in (("deterministic", True), ("default", False)):
        with pytest.raises(KeyError), attention.mode_set(mode):
            assert torch.are_deterministic_algorithms_enabled() is inside
            raise KeyError
        assert not torch.are_deterministic_algorithms_enabled()


def test_peak_is_what_was_held_at_once():
    def function():
        for _ in range(3):
            held = torch.empty(1000, dtype=torch.float64)
        return held, torch.empty(500, dtype=torch.float64)

    assert 12_000 <= attention.peak_bytes(function, torch.device("cpu")) < 21_000


def test_documents_begin_where_they_are_cut():
    starts = attention.random_starts(3, 50, 5, torch.device("cpu"))
    positions = torch.arange(50)
    assert (
        (starts <= positions).all()
        and (starts[:, 0] == 0).all()
        and not torch.equal(starts[0], starts[1])
    )
    assert all(
        len(row.unique()) == 5 and (row[row.unique()] == row.unique()).all() for row in starts
    )
    assert torch.equal(attention.random_starts(1, 4, 9, torch.device("cpu")), torch.arange(4)[None])
    p = problem("documents", "--documents", "4")
    assert p.visible_pairs() == p.mask().sum() and p.flops() == 12 * 4 * 16 * p.visible_pairs()
    assert problem("causal").visible_pairs() == 2 * 40 * 41 / 2


def test_laid_out_as_the_model_does():
    p = problem("table")
    assert (
        p.q_BHTD.shape == (2, 4, 40, 16)
        and p.k_BGTD.shape == (2, 2, 40, 16)
        and p.table_HTT.shape == (4, 40, 40)
    )
    assert (
        all(t.transpose(1, 2).is_contiguous() for t in (p.q_BHTD, p.k_BGTD, p.v_BGTD, p.dy_BHTD))
        and p.table_HTT.dtype == torch.float32
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cases", "causal,none"], "unknown case 'none': there are causal, table"),
        (["--variants", "flash"], "unknown variant 'flash'"),
        (["--documents", "0"], "documents must be at least 1, not 0"),
        (["--num_kv_heads", "3"], "num_heads 4 must be a multiple of num_kv_heads 3"),
    ],
)
def test_refuses(flags, message):
    with pytest.raises(ValueError, match=message):
        attention.main([*TINY, "--device", "cpu", *flags])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(run):
    results = run(
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
        "--context_length",
        "256",
        "--head_dim",
        "32",
        "--variants",
        "sdpa_grouped,sdpa_expanded,sdpa_efficient,triton,flex",
    )
    kernels = {
        case: {name: modes["default"].get("kernel") for name, modes in figures["variants"].items()}
        for case, figures in results["cases"].items()
    }
    assert (
        kernels["causal"]["sdpa_grouped"] != "math"
        and kernels["table"]["sdpa_efficient"] == "efficient"
    )
    for case, figures in results["cases"].items():
        for modes in figures["variants"].values():
            assert all(
                "why" in row
                or math.isfinite(row["seconds"]["median"])
                and max(row["errors"].values()) < 0.05
                for row in modes.values()
            )
        assert "why" not in figures["variants"]["sdpa_expanded"]["default"], case
    by_triton = results["cases"]["table"]["variants"]["triton"]["default"]
    assert all(by_triton["same_bits"].values()), by_triton
