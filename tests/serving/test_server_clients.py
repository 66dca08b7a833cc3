"""The command itself with the model that comes with the repository, and clients that people use."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from config_model import PredictConfig
from runtime.evaluation.lm_eval import Reader
from runtime.inference.predictor import READY, Predictor
from runtime.inference.scorer import Scorer
from runtime.serving.config import ServeConfig
from tests.builders_server import JSON, events_of, live, post, wait_for
from tests.conftest import REPO
from tests.shared_checks import needs_code

SECONDS = 300
STORY = "Once upon a time"
ARGUMENTS = {"prompt": STORY, "max_tokens": 30, "seed": 3}


@dataclass
class Running:
    """A server in a process of its own. lines: what it printed so far, both streams."""

    process: subprocess.Popen
    lines: list[str]
    url: str = ""

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def post(self, path: str, body: dict) -> bytes:
        connection = http.client.HTTPConnection(*self.address, timeout=SECONDS)
        connection.request("POST", path, json.dumps(body), JSON)
        data = connection.getresponse().read()
        connection.close()
        return data


@contextlib.contextmanager
def running(*flags: str, environment: dict[str, str] | None = None) -> Iterator[Running]:
    command = [sys.executable, "-m", "scripts.serve", "--port", "0", "--device", "cpu", *flags]
    process = subprocess.Popen(
        command,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )
    found = Running(process, [])

    def follow() -> None:
        for line in process.stdout:
            found.lines.append(line.rstrip("\n"))

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        wait_for(
            lambda: (
                process.poll() is not None or any(line.startswith("serve ") for line in found.lines)
            ),
            SECONDS,
        )
        urls = [line.split()[1] for line in found.lines if line.startswith("serve ")]
        assert urls, found.lines
        found.url = urls[0]
        yield found
    finally:
        process.kill()
        process.wait(SECONDS)
        reader.join(SECONDS)


@pytest.fixture(scope="module")
def server():
    with running(
        "--ckpt", str(READY), f"own/again={READY}", "--plain_chat", "--slots", "4"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(PredictConfig(ckpt=str(READY), device="cpu"))


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_the_text_is_predicts_with_the_same_seed(server, predictor):
    """One model, one way of loading and rendering: the server adds nothing of its own."""
    for seed, settings in ((3, {}), (4, {"temperature": 0.0}), (5, {"top_k": 3, "stop": "."})):
        stop = (settings["stop"],) if "stop" in settings else ()
        config = PredictConfig(
            **({"seed": seed, "max_new_tokens": 30} | settings | {"stop": stop}), when_full="stop"
        )
        text = "".join(predictor.stream(STORY, config))
        answer = json.loads(server.post("/v1/completions", ARGUMENTS | {"seed": seed} | settings))
        assert answer["choices"][0]["text"] == text
        assert answer["usage"]["completion_tokens"] == len(predictor.last.ids)


def test_openai_python_completes_streams_and_scores(client):
    whole = client.completions.create(model="stories", **ARGUMENTS, logprobs=2)
    assert len(whole.choices[0].text) > 20 and whole.usage.completion_tokens == 30
    assert len(whole.choices[0].logprobs.top_logprobs) == 30
    stream = client.completions.create(
        model="stories", **ARGUMENTS, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text and chunks[-1].usage.completion_tokens == 30
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    many = client.completions.create(model="stories", **ARGUMENTS, n=3)
    assert many.choices[0].text == whole.choices[0].text
    assert len({choice.text for choice in many.choices}) == 3
    other = client.completions.create(
        model="own/again", **(ARGUMENTS | {"seed": 4}), extra_body={"experts": True, "top_k": 50}
    )
    # Answer 1 of seed 3 is answer 0 of seed 4, by the same weights under another name.
    assert other.choices[0].text == many.choices[1].text
    experts = other.choices[0].model_extra["experts"]
    assert len(experts["ids"]) == 30 and len(experts["ids"][0]) == 4


def test_openai_python_chats_with_a_plain_model(client):
    messages = [{"role": "user", "content": STORY}]
    arguments = {"model": "stories", "messages": messages, "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    content = whole.choices[0].logprobs.content
    assert "".join(one.token for one in content) == text
    assert len(content[0].top_logprobs) == 2


def test_openai_python_lists_models_and_raises_its_own_errors(client):
    import openai

    assert [model.id for model in client.models.list()] == ["stories", "own/again"]
    assert client.models.retrieve("own/again").model_extra["batch_invariant"] in (True, False)
    with pytest.raises(openai.NotFoundError, match="stories, own/again") as raised:
        client.completions.create(model="gpt-4", prompt="a")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="stories", prompt="a", logit_bias={"1": 5})
    assert raised.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError, match="lower max_tokens"):
        client.completions.create(model="stories", prompt=STORY, max_tokens=256)
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.responses.create(model="stories", input="a")


def test_many_clients_at_a_time_get_what_each_gets_alone(server):
    bodies = [
        ARGUMENTS
        | {"prompt": STORY * (1 + i % 3), "seed": i, "logprobs": i % 3, "stream": i % 2 == 0}
        for i in range(12)
    ]

    def said(data: bytes) -> list:
        chunks = events_of(data)[:-1] if data.startswith(b"data") else [json.loads(data)]
        return [
            [chunk["choices"][0][key] for key in ("text", "logprobs", "finish_reason")]
            for chunk in chunks
        ]

    alone = [said(server.post("/v1/completions", body)) for body in bodies]
    together: dict[int, list] = {}

    def one(i: int) -> None:
        together[i] = said(server.post("/v1/completions", bodies[i]))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [together[i] for i in range(len(bodies))] == alone


def test_openai_python_gets_a_prompts_scores_with_echo(client):
    """max_tokens 0 scores a text alone; the first token has nothing before it."""
    scores = [
        client.completions.create(
            model="stories", prompt=STORY, max_tokens=most, seed=3, echo=True, logprobs=0
        ).choices[0]
        for most in (0, 3)
    ]
    assert scores[0].text == STORY and scores[1].text.startswith(STORY)
    (one, more) = (choice.logprobs.token_logprobs for choice in scores)
    assert more[: len(one)] == one and len(more) == len(one) + 3
    assert "".join(scores[0].logprobs.tokens) == STORY


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_guides_commands_work_as_they_stand(server):
    """docs/serving.md, with this server's port in place of 8000."""
    blocks = re.findall(r"```\n(.*?)```", (REPO / "docs/serving.md").read_text(), re.DOTALL)
    (block,) = (one for one in blocks if one.startswith("curl") and "/v1/completions" in one)
    port = server.address[1]
    commands = [one.replace(":8000", f":{port}") for one in block.strip().split("\n\n")]
    environment = os.environ | {"no_proxy": "*"}
    whole, streamed = (
        subprocess.run(
            one, shell=True, capture_output=True, text=True, check=True, env=environment
        ).stdout
        for one in commands
    )
    answer = json.loads(whole)
    assert answer["usage"]["completion_tokens"] > 0 and answer["choices"][0]["text"]
    *chunks, done = events_of(streamed.encode())
    assert done == "[DONE]" and chunks[0]["choices"][0]["experts"]["ids"]


def test_the_guides_program_for_openai_python_works_as_it_stands(server):
    pytest.importorskip("openai")
    blocks = re.findall(r"```\n(.*?)```", (REPO / "docs/serving.md").read_text(), re.DOTALL)
    (program,) = (one for one in blocks if one.startswith("from openai import"))
    # The server of the guide's first command has this model and answers chats, as this one.
    assert "scripts.serve --ckpt public/stories.pt --plain_chat " in blocks[0]
    assert ":8000" in program
    program = program.replace(":8000", f":{server.address[1]}")
    command = [sys.executable, "-c", program.replace("max_tokens=60", "max_tokens=5")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()[0]) > 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_the_guides_way_to_send_a_key_keeps_it_out_of_the_arguments(tmp_path):
    """The key stood in curl's arguments, which everyone on a machine can read."""
    lines = (REPO / "docs/serving.md").read_text().splitlines()
    (command,) = (line for line in lines if "key.txt" in line and "curl" in line)
    assert "$(cat key.txt)" not in command.partition("curl")[2]
    (tmp_path / "key.txt").write_text("a-secret\n")
    with live(key=b"a-secret") as running:
        own = command.replace("http://box.example:8000", running.url)
        found = subprocess.run(
            f"{own} -sS", shell=True, cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"no_proxy": "*"},
        )  # fmt: skip
    assert json.loads(found.stdout)["data"][0]["id"] == "toy", found.stderr


def test_the_guide_has_the_flags_own_defaults():
    rows = re.findall(r"^\| `--(\w+)` \| ([\d.]+) \|", (REPO / "docs/serving.md").read_text(), re.M)
    assert len(rows) >= 7
    for name, default in rows:
        assert float(default) == getattr(ServeConfig, name), name


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_completes_and_streams(server):
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "--noproxy", "*", "-m", "120", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    kind = ("-H", "Content-Type: application/json")
    body = json.dumps(ARGUMENTS)
    answer = json.loads(curl(f"{server.url}/v1/completions", *kind, "-d", body))
    streamed = curl(
        "-N", f"{server.url}/v1/completions", *kind, "-d", body[:-1] + ', "stream": true}'
    )
    chunks = events_of(streamed.encode())
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == answer["choices"][0]["text"]
    # Without the header curl sends a form, as a page of another site could.
    refused = json.loads(curl(f"{server.url}/v1/completions", "-d", body))
    assert "Content-Type" in refused["error"]["message"]
    health = curl("-o", os.devnull, "-w", "%{http_code}", f"{server.url}/health")
    assert health == "200"


def test_the_log_has_no_texts(server):
    server.post("/v1/completions", ARGUMENTS | {"prompt": "a-secret-word"})
    wait_for(lambda: any("/v1/completions 200" in line for line in server.lines))
    printed = "\n".join(server.lines)
    assert "a-secret-word" not in printed and STORY not in printed
    assert "Traceback" not in printed


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)]
)
def test_a_signal_lets_a_stream_end_and_then_the_server(number):
    flags = ["--ckpt", str(READY), "--when_full", "slide", "--max_new_tokens", "100000"]
    with running(*flags) as server:
        with socket.create_connection(server.address, timeout=SECONDS) as connection:
            body = ARGUMENTS | {"max_tokens": 1_000, "stream": True, "logprobs": 0}
            connection.sendall(post("/v1/completions", body))
            found = connection.recv(100)
            server.process.send_signal(number)
            while b"[DONE]" not in found[-100:]:
                chunk = connection.recv(1 << 16)
                assert chunk, found[-300:]
                found += chunk
        assert server.process.wait(SECONDS) == 128 + number
        assert any(line.startswith("drain ") for line in server.lines), server.lines
        assert "Traceback" not in "\n".join(server.lines)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_second_signal_ends_it_at_once():
    flags = ["--ckpt", str(READY), "--when_full", "slide", "--max_new_tokens", "10000000"]
    body = ARGUMENTS | {"max_tokens": 10_000_000, "stream": True}
    with (
        running(*flags) as server,
        socket.create_connection(server.address, timeout=SECONDS) as connection,
    ):
        connection.sendall(post("/v1/completions", body))
        connection.recv(100)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: any(line.startswith("drain ") for line in server.lines))
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 143


def instances(number: int) -> list[tuple[str, str]]:
    """Return contexts and continuations of words, some contexts empty."""
    r, words = random.Random(4), ("Tom", "Mia", "had", "a", "red", "ball", "ran", "to", "the", ".")
    whole = [" ".join(r.choice(words) for _ in range(r.randint(1, 12))) for _ in range(2 * number)]
    return [
        (before if i % 5 else "", f" {after}")
        for i, (before, after) in enumerate(zip(whole[::2], whole[1::2], strict=True))
    ]


@pytest.fixture(scope="module")
def reader(predictor) -> Reader:
    """What scripts/evaluate.py lets lm-eval ask, of the same checkpoint."""
    return Reader(Scorer(predictor.decoder), predictor.tokenizer)


@needs_code
def test_the_scores_of_evaluate_and_of_the_server_are_one(server, reader):
    """Of the same ids, both read by the C kernel: the log-probabilities are the same bits.

    Evaluation adds a text's own in float64.
    """
    tokenizer = reader.tokenizer
    for before, after in instances(20):
        pair = [reader.start, *tokenizer.encode(before)], tokenizer.encode(after)
        body = {"prompt": [*pair[0], *pair[1]], "max_tokens": 0, "echo": True, "logprobs": 1}
        choice = json.loads(server.post("/v1/completions", body))["choices"][0]
        scores = choice["logprobs"]["token_logprobs"][len(pair[0]) :]
        ((total, _),) = reader.log_likelihoods([pair], starts=False)
        assert len(scores) == len(pair[1]) and all(score < 0 for score in scores)
        assert math.isclose(math.fsum(scores), total, rel_tol=1e-12)


@pytest.mark.lm_eval
@pytest.mark.slow
def test_lm_eval_scores_through_the_server(server, tmp_path, monkeypatch):
    """lm-eval reads token_logprobs by number and compares floats with ==."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("aiohttp", reason="lm-eval[api] is not installed")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {"good": f"{name} had a red ball.", "bad": f"{name} red had ball a."}
        for name in ("Tom", "Mia")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own_pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
    }
    Path(tmp_path / "own.yaml").write_text(json.dumps(task))
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "stories",
            "base_url": f"{server.url}/v1/completions",
            "max_length": 256,
            "num_concurrent": 2,
        },
        tasks=["own_pairs"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["own_pairs"]["acc,none"] == 1.0


@needs_code
@pytest.mark.lm_eval
@pytest.mark.slow
def test_lm_eval_gets_the_same_scores_from_the_server_as_from_our_own_model(server, reader):
    """With the server's tokenizer (/tokenizer_info, /tokenize), which it finds by itself."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("aiohttp", reason="lm-eval[api] is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = f"{server.url}/v1/completions"
    theirs = LocalCompletionsAPI(base_url=url, model="stories", max_length=256, num_concurrent=2)
    assert theirs.tokenizer_backend == "remote", lm_eval.__version__
    assert theirs.prefix_token_id == reader.start
    pairs = instances(20)
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    # It sends no start token; where there is no context, it sends the end of text.
    ids = [theirs._encode_pair(*pair) if pair[0] else None for pair in pairs]
    own = reader.log_likelihoods(
        (
            one or ([reader.start], reader.tokenizer.encode(after))
            for one, (_, after) in zip(ids, pairs, strict=True)
        ),
        starts=False,
    )
    for (total, is_greedy), (mine, is_mine) in zip(theirs.loglikelihood(asked), own, strict=True):
        assert math.isclose(total, mine, rel_tol=1e-12) and is_greedy == is_mine
