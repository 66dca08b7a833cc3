"""The Makefile: what it says before it installs, and what it hands to pip. Nothing is installed."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess

import pytest

from benchmarks.settings import COMMANDS
from runtime.posttraining import tasks
from runtime.posttraining.flags import settings_of
from tests import children
from tests.conftest import REPO

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")

# Stands in for Python: `-m venv FOLDER` makes a pip that prints how it is called.
PYTHON = """#!/bin/sh
if [ "$1" = -m ]; then
    mkdir -p "$3/bin"
    printf '#!/bin/sh\\necho "pip $*"\\nexit {code}\\n' > "$3/bin/pip"
    chmod +x "$3/bin/pip"
fi
"""


def make(*arguments: str) -> subprocess.CompletedProcess:
    # Under `make test` this is a make within a make, which says what folder it enters and leaves:
    # once that line was taken for a command of the demo.
    words = ["make", "--no-print-directory", *arguments]
    return subprocess.run(words, cwd=REPO, capture_output=True, text=True)


@pytest.fixture
def fake(tmp_path):
    """Returns the arguments of make for an environment whose pip ends with an exit code."""

    def arguments(code: int = 0) -> list[str]:
        python = tmp_path / "python"
        python.write_text(PYTHON.replace("{code}", str(code)))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return [f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]

    return arguments


def commands(target: str, *arguments: str) -> list[str]:
    """Return what make would run for a target, a command a line."""
    done = make("-n", target, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("target", ["demo", "test", "test-fast", "test-llamacpp", "lint"])
def test_pip_shows_its_progress_and_gets_pip_args(target, tmp_path):
    """`pip --quiet` downloaded gigabytes for minutes, and nothing moved on the screen."""
    given = "--find-links /wheels --no-index"
    lines = commands(target, f"VENV={tmp_path / 'new'}", f"PIP_ARGS={given}")
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == {"demo": 1, "test-llamacpp": 3}.get(target, 2)
    assert [line for line in installs if given not in line] == []
    assert not re.search(r"--quiet| -q\b|--progress-bar off", "\n".join(installs))
    # Before pip runs, what comes is said.
    said = lines.index(next(line for line in lines if "This step needs a network" in line))
    assert said < lines.index(installs[0])


def test_demo_says_what_it_installs_how_much_and_that_it_needs_a_network(fake, tmp_path):
    arguments = fake()
    stamp = tmp_path / "venv" / "installed"
    done = make(str(stamp), *arguments, "PIP_ARGS=--no-index --find-links wheels")
    assert done.returncode == 0, done.stderr
    said, _, pip = done.stdout.partition("-m venv")
    for words in ("requirements.txt", "PyTorch", "needs a network", "0.3 GB", "2.9 GB", "PIP_ARGS"):
        assert words in said, words
    (ran,) = re.findall(r"^pip (.*)$", pip, re.MULTILINE)
    assert ran.split()[0] == "install" and ran.endswith("-r requirements.txt")
    assert " --no-index --find-links wheels " in ran and stamp.exists()
    # A second make installs nothing.
    again = make(str(stamp), *arguments)
    assert again.returncode == 0 and "pip" not in again.stdout


def test_an_install_that_fails_is_tried_again(fake, tmp_path):
    arguments, stamp = fake(code=1), tmp_path / "venv" / "installed"
    assert make(str(stamp), *arguments).returncode != 0 and not stamp.exists()
    assert make(str(stamp), *fake()).returncode == 0 and stamp.exists()


def test_the_demo_needs_no_network_after_the_install(tmp_path):
    """Its text comes from the embedded generator, its vocabulary from that text."""
    lines = commands("demo", f"VENV={tmp_path / 'new'}")
    prepare, train, predict = [line for line in lines if re.search(r"python \w+\.py", line)][:3]
    assert "--dataset toy" in prepare and "--tokenizer bpe:" in prepare
    assert "train.py" in train and "predict.py --ckpt demo/checkpoints/best.pt" in predict


def test_no_registry_is_named():
    """PyTorch's page says which index holds which build, and it changes."""
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"https?://\S+", text) == []


STAGES = ["sft", "dpo", "grpo"]


def demo_chat(*arguments: str) -> list[str]:
    """Return what `make demo-chat` would run once the environment is there."""
    lines = commands("demo-chat", "-o", f"{REPO}/.venv/installed", *arguments)
    return lines[lines.index("rm -rf demo-chat") + 1 :]


def test_the_chat_demo_trains_each_stage_from_the_one_before(tmp_path):
    """SFT is the command as it is by default; both others start from what it learned."""
    lines = demo_chat(f"VENV={tmp_path / 'new'}")
    tuned = [shlex.split(line)[3:] for line in lines if " -m scripts." in line]
    assert len(tuned) == len(STAGES) and "--dataset toy" in lines[0]
    for stage, start, words in zip(STAGES, ("base", "sft", "sft"), tuned, strict=True):
        config = settings_of(None, words, COMMANDS[stage]).build(COMMANDS[stage])
        folders = (config.init_from, config.data_dir, config.ckpt_dir, config.graph_dir)
        names = (f"{start}/best.pt", "data", stage, f"graphs/{stage}")
        assert folders == tuple(f"demo-chat/{name}" for name in names)
    assert len(tuned[0]) == 8
    steps = [f"DEMO_{name}STEPS={i}" for i, name in enumerate(("", "SFT_", "DPO_", "GRPO_"), 2)]
    lines = demo_chat(*steps, "DEMO_FLAGS=--score_prompts 4")
    found = [re.findall(r"--max_steps (\d+)", line) for line in lines if "max_steps" in line]
    assert found == [["2"], ["3"], ["4"], ["5"]]
    assert sum(line.endswith("--score_prompts 4") for line in lines) == 3


@pytest.mark.nightly
@pytest.mark.slow
def test_the_chat_demo_runs(tmp_path):
    """All of its lines but the install, on less text and for two steps a stage."""
    steps = [f"DEMO_{name}STEPS=2" for name in ("", "SFT_", "DPO_", "GRPO_")]
    flags = "--score_prompts 2 --max_new_tokens 8 --num_threads 1 --batch_size 2 --toy_examples 200"
    lines = demo_chat(f"VENV={tmp_path / 'env'}", *steps, f"DEMO_FLAGS={flags}")
    output = ""
    for line in lines:
        line = line.replace("demo-chat/", f"{tmp_path}/demo-chat/")
        line = line.replace("--dataset toy", "--dataset toy --max_tokens 200000")
        said, pipe, program = line.rpartition(" | ")
        words = shlex.split(program)
        if not words[0].endswith("python"):
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        else:
            piped = subprocess.run(["sh", "-c", said], capture_output=True, text=True).stdout
            done = children.run(words[1:], cwd=REPO, input=piped, timeout=600)
        assert done.returncode == 0, line + done.stdout[-2000:] + done.stderr[-2000:]
        output += done.stdout
    folder = tmp_path / "demo-chat"
    for stage in STAGES:
        assert (folder / stage / "best.pt").exists()
        assert (folder / "graphs" / stage / "metrics.jsonl").exists()
    # A table of each stage, the base's loss in it, because the demo has the base's text.
    tables = re.split(r"^score +step ", output, flags=re.MULTILINE)[1:]
    assert len(tables) == 3
    assert all("base loss" in table and "story loss" in table for table in tables)
    assert output.count("> Tell a story about Pip the badger") == 3
    # The questions are held out from every stage.
    asked = re.findall(r"^> (.*)$", output.split("A chat of three messages")[1], re.MULTILINE)
    beginning, _ = tasks.interview("test", 18)[0].prompt.rsplit("\n", 1)
    assert [line.removesuffix("\\") for line in asked[:2]] == beginning.split("\n")
    request = re.search(r"^DEMO_REQUEST = (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert request[1] == tasks.request("test", 19).prompt
