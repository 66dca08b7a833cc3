"""Train the merges of a byte-pair encoding with the `tokenizers` library, in a process of its own.

The library computes all merges in one call, of many minutes for a large text. Python hears Ctrl-C
only after such a call, and a thread in it cannot be ended. A process can: `train_merges` starts one
that runs `work`, and sends it the texts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import IO, BinaryIO

LOOK_AGAIN_SECONDS = 0.2
# What the process runs: it imports from where its parent does.
START = """
import json, sys
settings = json.loads(sys.stdin.buffer.readline())
sys.path[:] = settings.pop("path")
from runtime.data.bpe_trainer import work
work(**settings)
"""


def train_merges(texts: Iterable[str], num_tokens: int, pattern: str) -> list[list[str]]:
    """Return the merges, in order, of a byte-level BPE of at most `num_tokens` tokens.

    A merge is a pair of tokens as byte-level BPEs spell them. pattern: how texts are cut into
    words. Progress is shown on a terminal. Raise ValueError if the process ends early.
    """
    settings = {
        "path": [str(folder) for folder in sys.path],
        "num_tokens": num_tokens,
        "pattern": pattern,
        "show_progress": sys.stderr.isatty(),
    }
    process = _start()
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            for item in _then_none(settings, texts):
                stdin.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
            stdin.flush()
        # It reads its input to the end, then prints, so neither side waits for the other.
        printed = _read(stdout)
        if code := process.wait():
            raise ValueError(
                f"the process that trains the tokenizer ended with exit code {code}: "
                "if the memory was full, train it on less text"
            )
        return json.loads(printed)
    finally:
        process.kill()
        process.wait()
        for pipe in (stdin, stdout):
            # What could not be sent is dropped.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _read(pipe: IO[bytes]) -> bytes:
    """Return all of a pipe, and hear Ctrl-C meanwhile, however shortly before it comes.

    A signal that arrives after Python's last look at signals and before the system call leaves the
    call waiting. So a thread reads, and this one looks again and again.
    """
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append(pipe.read()), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_AGAIN_SECONDS)
    return read[0]


def _then_none(settings: dict, texts: Iterable[str]) -> Iterator[dict | str | None]:
    """Yield the settings, the texts, and None as their end."""
    yield settings
    yield from texts
    yield None


def _start() -> subprocess.Popen:
    """Start the process. Ctrl-C at a terminal reaches its parent only, which then kills it."""
    command = [sys.executable, "-P", "-c", START]
    if sys.platform == "win32":
        group = subprocess.CREATE_NEW_PROCESS_GROUP
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, creationflags=group
        )
    # A blocked signal stays blocked in a child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------- in the process
def work(num_tokens: int, pattern: str, show_progress: bool) -> None:
    """Read texts from stdin, as `train_merges` sends them, and print their merges."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    model.train_from_iterator(_received(sys.stdin.buffer), trainer)
    print(json.dumps(json.loads(model.to_str())["model"]["merges"]), flush=True)
    # Without the end of the interpreter, which would wait for the thread that waits for the parent.
    os._exit(0)


def _received(lines: BinaryIO) -> Iterator[str]:
    """Yield the texts up to None. A parent that ends early, now or later, ends this process."""
    for line in lines:
        if (text := json.loads(line)) is None:
            threading.Thread(target=_end_with_parent, daemon=True).start()
            return
        yield text
    os._exit(1)


def _end_with_parent() -> None:
    """Wait until the parent closes its end of the pipe, which a killed one does too."""
    os.read(0, 1)
    os._exit(1)
