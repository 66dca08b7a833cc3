"""A model changed as a researcher would change it: no fast path and no export is silently wrong,
each says what it does not know.

A sigmoid router was 3 lines and a shared expert 19. Training was right, and predict.py decoded with
C code that knew neither: logits were off by 0.19 and 2.92 of 2.14, exit code 0, no word. The GGUF
of the former read back "as the model's", and test.py, export_hf and export_gguf answered the latter
with tracebacks.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from runtime.inference import cpu_decode
from tests import children
from tests.builders import random_model, tiny_config
from tests.builders_export import write_folder
from tests.changed_models import CHANGES, FIELDS
from tests.conftest import REPO
from tests.nightly import nightly_but

pytestmark = pytest.mark.slow
# What each of them names. The first has no name: it is found by its logits alone.
NAMES = {
    "sigmoid in place": "",
    "sigmoid by a field": "ModelConfig.router_scores 'sigmoid'",
    "shared expert": "ModelConfig.shared_d_ff 16, layers.*.moe.shared (SharedExpert)",
    "extra norm": "layers.*.norm3 (RMSNorm)",
}
HAS_CODE, _ = cpu_decode.library()
EACH = pytest.mark.parametrize("name", CHANGES)


def copy_sources(folder: Path) -> None:
    """All code, and the licence that custom code carries."""
    folder.mkdir()
    for path in (*REPO.glob("*.py"), REPO / "LICENSE"):
        shutil.copyfile(path, folder / path.name)
    for name in ("runtime", "scripts", "tests", "benchmarks"):
        shutil.copytree(
            REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )


@functools.cache
def said(name: str, *rest: str) -> dict:
    """What a copy of the code with the change in it says."""
    with tempfile.TemporaryDirectory(prefix="changed-") as folder:
        copy = Path(folder) / "copy"
        copy_sources(copy)
        # As a published model, whatever our own becomes.
        published = Path(folder) / "published"
        write_folder(random_model(tiny_config(vocabulary_size=260, context_length=64)), published)
        for file, old, new in CHANGES[name]:
            text = (copy / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{file} has {text.count(old)} times, not once: {old!r}"
            (copy / file).write_text(text.replace(old, new), encoding="utf-8")
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONPATH", "GPTOSS_TRACEBACK")
        }
        run = children.run(
            ["-m", "tests.changed_models", name, published, *rest],
            cwd=copy,
            timeout=600,
            env=environment,
            libraries=["transformers.modeling_utils", "onnxscript"],
        )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", nightly_but(CHANGES, list(CHANGES).index("extra norm")))
def test_the_c_decoder_steps_aside_with_a_line(name):
    """One line that names the field or the module, or says that the logits are others; the text is
    the plain model's.
    """
    found = said(name)["c_kernel"]
    assert not found["is_native"] and found["same_text"] and "\n" not in found["note"]
    if HAS_CODE is None:
        return
    if NAMES[name]:
        assert found["why_not_native"] == f"the C decoder does not know {NAMES[name]}"
    else:
        assert (
            "the C decoder's logits are not the plain model's: they differ by"
            in found["why_not_native"]
        )
    assert (found["why_not_step"] or found["why_not_native"]) in found["note"]


@pytest.mark.parametrize("name", nightly_but(CHANGES, list(CHANGES).index("sigmoid in place")))
def test_decode_step_steps_aside_or_is_right(name):
    """It asks the model's own router, so a change inside that makes no difference to it.

    The text is the plain model's in any case.
    """
    found = said(name)["step"]
    assert found["same_text"]
    assert found["why_not_step"] == (
        f"decode_step does not know {NAMES[name]}" if NAMES[name] else ""
    )


@pytest.mark.parametrize("name", nightly_but(CHANGES, list(CHANGES).index("sigmoid in place")))
def test_predict_says_it_in_one_line(name):
    code, text = said(name)["predict"]
    assert code == 0
    lines = [line for line in text.split("\n") if line.startswith("note: ")]
    assert len(lines) == 1
    assert NAMES[name] in lines[0] and (
        NAMES[name] or HAS_CODE is None or "the C decoder's logits" in lines[0]
    )


@EACH
@pytest.mark.parametrize(
    "export, what",
    [("export_gguf", "the export to GGUF"), ("export_hf", "the exchange with published classes")],
)
def test_exports_refuse_with_the_name(name, export, what):
    """Or, where there is none, because the file's architecture computes other logits. A KeyError's
    traceback is no answer.
    """
    kind, line = said(name)[export]
    if NAMES[name]:
        assert (kind, line.split(": ")[0]) == ("ValueError", f"{what} does not know {NAMES[name]}")
    else:
        assert (
            kind == "ExportError" and "logits differ by" in line and "nothing was written" in line
        )


IMPORTS = {
    "sigmoid in place": (
        "ExportError",
        "qwen3_moe, as the architecture computes it: logits differ by",
    ),
    "sigmoid by a field": (
        0,
        "qwen3_moe, as the architecture computes it: largest logit difference",
    ),
    "shared expert": (0, "qwen3_moe, as the architecture computes it: largest logit difference"),
    "extra norm": (
        "ValueError",
        "the exchange with published classes does not know layers.*.norm3 (RMSNorm)",
    ),
}


@EACH
def test_an_import_is_what_the_architecture_computes_or_is_refused(name):
    """A published model's weights in a model that computes something else are no import."""
    code, text = said(name)["import_hf"]
    expected, words = IMPORTS[name]
    assert code == expected and words in text


@EACH
def test_what_follows_the_real_code_stays_right(name):
    """Custom code is the model's own source: its check passes."""
    code, text = said(name)["custom_code"]
    assert code == 0 and "largest logit difference 0.0e+00" in text


@pytest.mark.nightly
@EACH
def test_onnx_follows_the_real_code(name):
    """The graph is traced from the model, and onnxruntime gives its logits: the check says so."""
    code, text = said(name, "onnx")
    assert code == 0 and text.count("largest logit difference") == 2


@EACH
def test_reports_count_the_model_as_it_is(name):
    """test.py ended with an AssertionError where the closed form was another number than the
    module's.
    """
    found = said(name)
    assert found["total_is_real"] and found["test.py"][0] == found["draw"][0] == 0
    assert (
        f"the closed forms of config_model.py do not know {NAMES[name]}" in found["counts"]
    ) == bool(NAMES[name])
    assert (f"note: {found['counts']}" in found["test.py"][1]) == bool(NAMES[name])
    assert (
        f"note: the drawing does not know {NAMES[name]}: the picture is without it"
        in found["draw"][1]
    ) == bool(NAMES[name])
    new = "layers.*.moe.shared.up.weight, layers.*.moe.shared.down.weight"
    assert (f"LLM.initialise does not know {new}" in found["initial"]) == (name == "shared expert")


@pytest.mark.parametrize("name", FIELDS)
def test_a_new_field_at_its_default_changes_nothing_and_a_test_asks_for_it(name):
    """All fast paths stay, all exports pass their checks. That the random configurations leave it
    out is found.
    """
    found = said(name)
    (field,) = FIELDS[name]
    assert found["not varied"] == [field]
    default = found["at its default"]
    assert (
        default["c_kernel"]["is_native"] == (HAS_CODE is not None)
        and default["step"]["why_not_step"] == ""
    )
    assert (
        default["c_kernel"]["same_text"]
        and default["step"]["same_text"]
        and default["counts"] == default["initial"] == ""
    )
    assert default["export_gguf"][0] == default["export_hf"][0] == 0
