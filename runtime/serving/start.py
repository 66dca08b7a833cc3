"""From flags to a running server: load the models, listen, serve until a signal, drain."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Callable, Mapping

from runtime.base.text import visible
from runtime.inference.predictor import LoadedModel
from runtime.serving.app import State, make_app
from runtime.serving.config import ServeConfig
from runtime.serving.engine import Engine
from runtime.serving.http_server import Server, config_of, listening_socket, url_of
from runtime.serving.security import key_note, read_key, rules_of
from runtime.serving.served import Limits, Models, Served

# Of a commit and of a digest in a fingerprint.
COMMIT_CHARACTERS, DIGEST_CHARACTERS = 12, 16


def fingerprint_of(loaded: LoadedModel, config: ServeConfig, commit: str) -> str:
    """Return what changes when the same request and seed may give another answer.

    The commit of the code, then the digest of the checkpoint and of the settings of the model.
    """
    origin = loaded.origin
    settings = (config.dtype, config.quantize, config.context_length, config.rope_scaling)
    about = repr((origin.digest or origin.weights_digest, settings, str(loaded.device)))
    digest = hashlib.sha256(about.encode()).hexdigest()
    return f"{commit[:COMMIT_CHARACTERS] or 'unknown'}-{digest[:DIGEST_CHARACTERS]}"


def serve_model(name: str, path: str, config: ServeConfig, commit: str) -> Served:
    """Load a checkpoint and start its engine. Raise ValueError as predict.py does."""
    loaded = LoadedModel(config.predict(path))
    for line in loaded.notes:
        print(f"note: {line}", file=sys.stderr, flush=True)
    engine = Engine(
        loaded.decoder,
        slots=config.slots,
        max_waiting=config.max_waiting,
        prefill_chunk=config.prefill_chunk,
        banned_ids=loaded.banned_ids,
    )
    c = loaded.model.config
    limits = Limits(
        defaults=config.sampling_defaults(),
        max_new_tokens=config.max_new_tokens,
        most_choices=config.slots + config.max_waiting,
        plain_chat=config.plain_chat,
    )
    print(f"model    {name}: {path}; {engine.line}; {engine.memory_line}", flush=True)
    return Served(
        name=name,
        rendering=loaded,
        engine=engine,
        context_length=c.context_length,
        vocabulary_size=min(c.vocabulary_size, loaded.tokenizer.vocabulary_size),
        fingerprint=fingerprint_of(loaded, config, commit),
        limits=limits,
        num_experts=c.num_experts,
    )


def say(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


async def drained(state: State, seconds: float) -> None:
    """Answer nothing new; wait until all answers are out, or cancel those that are left."""
    state.is_draining = True
    state.idle.clear()
    most = f", at most {seconds:g} s; a second signal ends them" if state.num_active else ""
    print(f"drain    requests being answered: {state.num_active}{most}", flush=True)
    if state.num_active:
        try:
            await asyncio.wait_for(state.idle.wait(), seconds)
        except TimeoutError:
            print(f"drain    {state.num_active} requests are cut off", flush=True)
    for served in state.models.by_name.values():
        await asyncio.to_thread(served.engine.close)


def serve(
    config: ServeConfig,
    checkpoints: Mapping[str, str],
    commit: str,
    load: Callable[[str, str, ServeConfig, str], Served] = serve_model,
) -> int:
    """Serve until a signal; return the exit code. Raise ValueError for flags and checkpoints."""
    rules = rules_of(
        config.host, config.allow_host, config.allow_origin, read_key(config.api_key_file)
    )
    if line := key_note(config.api_key_file):
        say(f"note: {line}")
    # Before the model is loaded, which may take minutes.
    listening = listening_socket(config.host, config.port)
    models = Models()
    state = State(
        models=models,
        rules=rules,
        version=commit or "unknown",
        max_body_bytes=config.max_body_bytes,
        log=say if config.log_requests else lambda line: None,
        is_loading=True,
    )

    async def begin() -> None:
        for name, path in checkpoints.items():
            models.add(await asyncio.to_thread(load, name, path, config, commit))
        state.is_loading = False
        print(f"serve    {url_of(listening)}", flush=True)

    async def drain() -> None:
        await drained(state, config.drain_seconds)

    server = Server(config_of(make_app(state), config.request_seconds), begin, drain)
    asyncio.run(server.serve(sockets=[listening]))
    if server.failure is not None:
        raise server.failure
    return 128 + server.signal
