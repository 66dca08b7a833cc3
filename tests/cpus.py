"""The tests that compare numbers, run as other CPUs would run them: `make test-cpus`, or

python -m tests.cpus both settings below, a few minutes each python -m tests.cpus --only plain -x
one of them, with further flags for pytest

Libraries choose their code by what the processor has. Told to do with less, they add in other
orders, as they do elsewhere. Exit code 1 if a test fails under a setting.
"""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runtime.base import cli

REPO = Path(__file__).resolve().parent.parent
NO_AVX512 = "-mno-avx512f " if platform.machine() in ("x86_64", "AMD64") else ""

# ATen's own kernels, oneDNN's, MKL's (on AMD it knows only MKL_CBWR), the C decoder's compiler
# flags, and the number of threads.
SETTINGS = {
    "plain": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "COMPATIBLE",
        "GPTOSS_CFLAGS": f"{NO_AVX512}".strip(),
        "GPTOSS_TEST_THREADS": "1",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AUTO",
        "GPTOSS_CFLAGS": f"{NO_AVX512}-O1",
        "GPTOSS_TEST_THREADS": "2",
    },
}
# Files whose tests compare two computations of the same numbers.
FILES = [
    "checks/test_kernels.py",
    "evaluation/test_lm_eval_harness.py",
    "inference/test_company.py",
    "inference/test_cpu_decode.py",
    "inference/test_rounded_inputs.py",
    "inference/test_scorer.py",
    "kernels/test_cpu_attention.py",
    "kernels/test_cpu_experts.py",
    "kernels/test_loss_in_c.py",
    "kernels/test_newton_schulz.py",
    "kernels/test_norms.py",
    "kernels/test_router.py",
    "kernels/test_routed_experts.py",
    "kernels/test_trained_rows.py",
    "interop/test_custom_code.py",
    "scripts/test_export_hf.py",
    "scripts/test_export_onnx.py",
    "interop/test_huggingface.py",
    "interop/test_llamacpp.py",
    "scripts/test_import_hf.py",
    "inference/test_decoder.py",
    "inference/test_fork.py",
    "posttraining/test_lora.py",
    "posttraining/test_policy.py",
    "posttraining/test_rollouts.py",
    "test_model.py",
    "test_model_parts.py",
    "training/test_optimizer.py",
    "training/test_muon.py",
    "inference/test_quantize.py",
    "checks/test_rounding.py",
    "distributed/test_training.py",
]
# And single tests of other files.
TESTS = [
    "benchmarks/test_attention.py::test_flex_gives_the_same_numbers",
    "benchmarks/test_decode.py::test_the_same_tokens",
    "benchmarks/test_benchmarks.py::test_loop_is_our_model",
    "benchmarks/test_benchmarks.py::test_hugging_face_is_our_model",
    "benchmarks/test_benchmarks.py::test_both_sides_take_the_same_steps",
    "checkpoint/test_checkpoint.py::test_reference_checkpoints_compute_what_they_computed_there",
    "checkpoint/test_checkpoint.py::test_reference_gradients",
    "test_train.py::test_gradient_accumulation_equals_the_big_batch",
    "test_train.py::test_validation_is_the_loss_and_draws_nothing",
    "test_train.py::test_a_window_s_numbers_are_means_over_its_steps",
    "test_train.py::test_clipping_is_by_the_norm_of_the_whole_gradient",
    "test_train.py::test_packed_documents_loss_is_that_of_each_document_behind_its_end_of_text",
    *(
        f"promises/test_promises.py::test_it_holds[{name}]"
        for name in (
            "12-cached",
            "12-native",
            "13-causality",
            "15-same_function",
            "16-experts",
            "17-loss",
            "24-context_policy",
        )
    ),
]


def environment(name: str) -> dict[str, str]:
    """This process's variables with those of a setting."""
    # Threads that wait for each other spin: a little of that, as the Makefile has it, or two of
    # them on a busy machine take ten times as long.
    spin = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
    # The compiler's cache takes code for one capability for that of another, and then fails to
    # compile it: each setting has its own.
    cache = {
        "TORCHINDUCTOR_CACHE_DIR": str(
            Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{name}"
        )
    }
    return (
        os.environ
        | spin
        | cache
        | SETTINGS[name]
        | {"OMP_NUM_THREADS": SETTINGS[name]["GPTOSS_TEST_THREADS"]}
    )


def run(name: str, flags: list[str]) -> int:
    """Pytest's exit code for all of these tests under a setting."""
    shown = " ".join(
        f"{key}={value!r}" if " " in value else f"{key}={value}"
        for key, value in SETTINGS[name].items()
    )
    print(f"{name}: {shown}", flush=True)
    started = time.perf_counter()
    tests = [f"tests/{test}" for test in FILES + TESTS]
    code = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, *flags], cwd=REPO, env=environment(name)
    ).returncode
    print(f"{name}: pytest's exit code {code}, {time.perf_counter() - started:.0f} s", flush=True)
    return code


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--only", choices=list(SETTINGS), help="one setting (default: all)")
    args, flags = parser.parse_known_args(argv)
    codes = [run(name, flags) for name in ([args.only] if args.only else SETTINGS)]
    return int(any(codes))


if __name__ == "__main__":
    cli.run_main(main)
