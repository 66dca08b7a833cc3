"""Shared fixtures: where the real text and tokenizer file are, and what happens without them.

Codes such as M1 or T8 in the tests' docstrings number the faults of the original implementation (M
model, T training, D data, P prediction, S security). Each test's docstring says what the fault was.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GPTOSS_SHARED", REPO.parent / "shared"))
O200K_CACHE_NAME = (
    # The name under which tiktoken caches o200k_base.
    "fb374d419588a4632f3f557e76b4b70aebbca790"
)

# Their assertions say what was compared, as those of test modules do.
pytest.register_assert_rewrite(
    "tests.shared_checks",
    *(f"tests.{path.stem}" for path in Path(__file__).parent.glob("builders*.py")),
)

# The models here are tiny: two threads would mostly wait for each other, and for busy neighbours.
# `make test-cpus` asks for two once.
torch.set_num_threads(int(os.environ.get("GPTOSS_TEST_THREADS", "1")))


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connections leave this process only to itself; looking a name up fails at once."""

    def local(address) -> bool:
        # A str: a Unix socket.
        return (
            isinstance(address, (str, bytes))
            or str(address[0]) in ("localhost", "::1")
            or str(address[0]).startswith("127.")
        )

    def refuse(what):
        raise OSError(f"tests reach no network: {what}")

    connect, look_up = socket.socket.connect, socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket.socket,
            "connect",
            lambda self, address: connect(self, address) if local(address) else refuse(address),
        )
        patch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *args, **kwargs: (
                look_up(host, *args, **kwargs) if local((host,)) or host is None else refuse(host)
            ),
        )
        yield


@pytest.fixture(autouse=True, scope="session")
def no_pictures():
    """A save draws no plots, which take longer than the runs of tests. `pictures` draws them."""
    from runtime.training import reporter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporter, "draw_plots", lambda *_, **__: [])
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Draw plots, as a run does."""
    from runtime.training import plots, reporter

    monkeypatch.setattr(reporter, "draw_plots", plots.draw_plots)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder, and return it.

    In the repository the default folders are those of whoever trains there: 24 tests of plans found
    a run, which is not theirs to continue.
    """
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_amx():
    """A CPU with products in bfloat16 is timed to see whether they are faster.

    On a busy machine two runs of one test would differ.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            patch.setattr(torch.cpu, name, lambda: False, raising=False)
        yield


def need(path: Path) -> Path:
    """Skip the test if `path` is not on this machine; under CI it must be."""
    if not path.exists():
        message = (
            f"{path.name} is not on this machine (set GPTOSS_SHARED to the folder that has it)"
        )
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the real TinyStories text and the original implementation's checkpoints."""
    return need(SHARED)


@pytest.fixture(scope="session")
def o200k(tmp_path_factory):
    """Make tiktoken find the real o200k_base file without network, and return the cache folder.

    The folder is also in TIKTOKEN_CACHE_DIR.
    """
    source = need(SHARED / "o200k_base.tiktoken")
    folder = tmp_path_factory.mktemp("tiktoken")
    shutil.copy(source, folder / O200K_CACHE_NAME)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TIKTOKEN_CACHE_DIR"]
    else:
        os.environ["TIKTOKEN_CACHE_DIR"] = before


# What these need is imported only where one is used: a test of text files needs no train.py.
@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Return a folder with prepared byte shards."""
    from tests.builders_runs import prepared

    return prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tales(shared_dir) -> list[str]:
    """Return the real validation texts."""
    from tests.builders_tokenizer import read_tales

    return read_tales(shared_dir)


@pytest.fixture(scope="module")
def mixtral(tales, tmp_path_factory) -> Path:
    """Return a folder with a tokenizer as Mixtral's."""
    from tests.builders_tokenizer import mixtral_folder

    return mixtral_folder(tales, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def qwen(tales, tmp_path_factory) -> Path:
    """Return a folder with a tokenizer as Qwen3's."""
    from tests.builders_tokenizer import qwen_folder

    return qwen_folder(tales, tmp_path_factory.mktemp("qwen"))
