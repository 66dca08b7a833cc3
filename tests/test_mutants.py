"""The mutants fit the code, the runner tells caught from missed, and what no other test noticed."""

from __future__ import annotations

import ast
import dataclasses
import re
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as model_module
import predict
import train
from config_model import TrainConfig
from model import generate, sample
from model_parts import KVCache
from runtime.base import process
from runtime.base.process import StopRequest
from runtime.data.shards import open_data
from runtime.data.tokenizer import Tokenizer
from runtime.inference import predictor
from runtime.inference.cpu_decode import native_model
from runtime.inference.decoder import Decoder
from runtime.inference.decoder import generate as generate_texts
from runtime.training.state import RecentLoss, RunState
from tests import anchors, builders_runs
from tests import mutants as mutants_module
from tests.builders import random_model, tiny_config
from tests.builders_data import write_pair
from tests.builders_inference import biased_model, predictor_of, save
from tests.builders_runs import Fixed, Run, poison, poisoned
from tests.conftest import REPO
from tests.mutants import (
    CONFIRMED,
    IN_PART,
    MUTANTS,
    NOT_APPLICABLE,
    OWN,
    Mutant,
    caught_before,
    default_jobs,
    main,
    mutated,
    names,
)
from tests.mutants import run as try_mutants
from tests.nightly import nightly_but

needs_git = pytest.mark.skipif(
    not (REPO / ".git").exists(), reason="the files to copy are those that git knows of"
)


# -------------------------------------------------------------------------------------- the mutants
def misfit(one: Mutant) -> str:
    """Return why a mutant does not fit the code, or nothing."""
    source = (REPO / one.file).read_text(encoding="utf-8")
    python = one.file.endswith(".py")
    try:
        changed = one.put_into(source)
        if python:
            ast.parse(changed)
    except (ValueError, SyntaxError) as error:
        return str(error)
    if changed == source or python and anchors.same(changed, source):
        return "the code says the same with it"
    for test in one.tests:
        file, function = test.split("::")
        signature = rf"^def {re.escape(function.partition('[')[0])}\("
        if not re.search(signature, (REPO / file).read_text(encoding="utf-8"), re.MULTILINE):
            return f"there is no {test}"
    return ""


def test_each_mutant_fits_the_code():
    """What it replaces is there once, the result is other code, and its tests exist.

    Where this fails, the code has moved: move the mutant after it.
    """
    wrong = [(name, misfit(one)) for name, one in zip(names(), MUTANTS, strict=True)]
    assert [f"{name}: {why}" for name, why in wrong if why] == []


@pytest.mark.parametrize(
    "change, says",
    [
        ({"old": "no such thing"}, "model.py has 0 times, not once"),
        ({"old": "self"}, "times, not once"),
        ({"old": "import math", "new": "import"}, "invalid syntax"),
        ({"old": "import math", "new": "import math  # ematics"}, "says the same"),
        (
            {"tests": ("tests/base/test_text.py::test_nothing",)},
            "there is no tests/base/test_text.py::test_",
        ),
    ],
)
def test_a_mutant_that_does_not_fit_is_named(change, says):
    fitting = Mutant(OWN, "", "model.py", "import math", "import cmath", ())
    assert misfit(fitting) == ""
    assert says in misfit(dataclasses.replace(fitting, **change))


SOURCE = """\
def f(x):
    # why
    if x:
        y = g(x, "it's", f"{x!r:>{x}}",)
        y += h[x:1.5, ]
    return {  # a set
        y, 'b',
    }
"""


@pytest.mark.parametrize(
    "old, new, expected",
    [
        # Quotes, white space, comments and the comma that closes a list do not count.
        ("g(\n  x,\n  'it\\'s',  # that\n  f'{x!r:>{x}}'\n)", "x", ("        y = x\n",)),
        ("h[x : 1.5]", "h[x]", ("h[x]",)),
        ('return {y, "b"}', "return y", ("    return y\n",)),
        # A part of what stands in brackets.
        ("if x: y = g(", "if x:\n    y = k(", ("    if x:\n        y = k(x, ",)),
        # Lines after the first are indented as the line in which the anchor begins.
        (
            "y += h[x:1.5]",
            "for _ in y:\n    y -= 1",
            ("        for _ in y:\n            y -= 1\n",),
        ),
        # Nothing in its place.
        ("y += h[x:1.5]", "", ("        \n    return",)),
        # Not a whole token: the inside of a string, or a comment.
        ("t's", "t is", ('"it is"',)),
        ("why", "Why", ("# Why",)),
    ],
)
def test_anchors_are_found_however_the_code_is_formatted(old, new, expected):
    changed = anchors.replace(SOURCE, old, new, python=True)
    assert changed != SOURCE and all(part in changed for part in expected)
    ast.parse(changed)


@pytest.mark.parametrize(
    "old", ["x = ", "y - = 1", '"its"', "h[x:15]", "g(x,)", "if  xx", "f(x)", "y", " "]
)
def test_other_code_is_not_found(old):
    """Nowhere, or more than once: neither says what is to be replaced."""
    source = SOURCE + "f(x)\n"
    with pytest.raises(ValueError, match="times, not once"):
        anchors.replace(source, old, "", python=True)


def test_white_space_does_not_count_in_c():
    source = "int  f(void)\n{\n    return 1; }\n"
    assert anchors.find(source, "f(void) {  return 1;", python=False) == [(5, 28)]
    assert anchors.find(source, "f(void){", python=False) == []
    changed = anchors.replace(source, "return 1;", "g();\nreturn 2;", python=False)
    assert changed == "int  f(void)\n{\n    g();\n    return 2; }\n"


def test_every_confirmed_fault_is_put_back_or_cannot_be():
    made = {one.fault for one in MUTANTS}
    assert made <= {*CONFIRMED, *IN_PART, OWN}
    assert (
        made & set(CONFIRMED) | NOT_APPLICABLE.keys() == set(CONFIRMED)
        and not made & NOT_APPLICABLE.keys()
    )
    assert all(NOT_APPLICABLE.values()) and sum(one.fault == OWN for one in MUTANTS) >= 15
    assert (
        len(set(names())) == len({(one.file, one.old, one.new) for one in MUTANTS}) == len(MUTANTS)
    )


@needs_git
@pytest.mark.parametrize("jobs", nightly_but([1, 2], 0))
def test_the_runner_tells_a_mutant_that_is_caught_from_one_that_survives(jobs):
    """A real one, one that changes a comment, and one whose module cannot be imported.

    And one that uses a name which is gone: a fault counted as caught for months after `train_step`
    had renamed a variable.
    """
    tests = ("tests/base/test_text.py::test_human_bytes",)
    chosen = {
        "real": ('return f"{number:.0f} B"', 'return f"{number:.1f} B"'),
        "comment": ("# From here on the next", "# from here on the next"),
        "broken": ("import unicodedata\n", "import unicodedata_\n"),
        "renamed": ('return f"{number:.0f} B"', 'return f"{numeral:.1f} B"'),
    }
    said = []
    mutants = [
        (name, Mutant(OWN, name, "runtime/base/text.py", old, new, tests))
        for name, (old, new) in chosen.items()
    ]
    outcomes = try_mutants(mutants, said.append, jobs)
    assert [(o.name, o.caught) for o in outcomes[:2]] == [("real", True), ("comment", False)]
    assert (
        outcomes[0].said.startswith("tests/base/test_text.py::test_human_bytes[")
        and outcomes[1].said == "its tests pass"
    )
    assert outcomes[2].said.startswith(("exit code 2", "pytest ended with 4"))
    assert not outcomes[3].caught and "name 'numeral' is not defined" in outcomes[3].said
    assert said[0].startswith("1 tests on the unchanged code: exit code 0")
    verdicts = ["caught" if o.caught else "SURVIVES" for o in outcomes]
    assert sorted(line.split()[0] for line in said[1:]) == sorted(verdicts)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["-j", "0"], "--jobs must be at least 1, not 0"),
        (["--only", "M999"], "there is no mutant M999"),
    ],
)
def test_what_the_runner_cannot_do_is_refused_in_one_line(flags, says):
    with pytest.raises(ValueError, match=says) as error:
        main(flags)
    assert "\n" not in str(error.value)


def test_what_was_caught_before_need_not_be_tried_again(monkeypatch):
    """Half an hour went by for one mutant whose test had been mended.

    A mutant of other text, or a result of code that nobody can look up, is tried again.
    """
    same, changed, survivor = (
        Mutant(OWN, what, "a.py", "old", "new", ("t",)) for what in ("same", "changed", "survivor")
    )
    then = {"then": [same, dataclasses.replace(changed, new="other"), survivor]}
    monkeypatch.setattr(mutants_module, "listed_at", then.__getitem__)
    entries = [
        {"fault": OWN, "what": one.what, "caught": one is not survivor} for one in then["then"]
    ]
    stored = {
        "environment": {"commit": "then", "uncommitted_changes": False},
        "mutants": entries,
    }
    kept = caught_before(stored)
    assert kept[same]["commit"] == "then" and changed not in kept and survivor not in kept
    later = {"environment": {"commit": "now", "uncommitted_changes": True}}
    assert caught_before(later | {"mutants": [kept[same]]}).keys() == {same}
    stored["environment"]["uncommitted_changes"] = True
    assert caught_before(stored) == {}


def test_a_mutant_is_in_the_copy_only_while_it_is_tried(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x = 1\ny = 1\n")
    with mutated(tmp_path, Mutant(OWN, "", "a.py", "x = 1", "x = 2", ()), 1_000_000_000):
        assert path.read_text() == "x = 2\ny = 1\n" and path.stat().st_mtime == 1_000_000_000
    assert path.read_text() == "x = 1\ny = 1\n" and path.stat().st_mtime == 1_000_000_001
    for old in ("= 1", "z"):
        with (
            pytest.raises(ValueError, match="times, not once"),
            mutated(tmp_path, Mutant(OWN, "", "a.py", old, "", ()), 0),
        ):
            pass


@needs_git
@pytest.mark.nightly
def test_all_mutants_are_caught():
    outcomes = try_mutants(list(zip(names(), MUTANTS, strict=True)), jobs=default_jobs())
    survivors = [f"{o.name}: {o.mutant.what} ({o.said})" for o in outcomes if not o.caught]
    assert survivors == []


# ------------------------------------------------------------ what no other test noticed: the model
def test_positions_stay_exact_in_a_bfloat16_model(monkeypatch):
    """M3b: tables in the model's own dtype would round positions by 2e-3.

    Every number would still be finite.
    """
    made, real = [], model_module.rope_tables
    monkeypatch.setattr(
        model_module, "rope_tables", lambda *arguments: made.append(real(*arguments)) or made[-1]
    )
    random_model(tiny_config(), dtype=torch.bfloat16)(torch.tensor([[1, 2, 3]]))
    ((cos, sin),) = made
    assert cos.dtype == sin.dtype == torch.float32


def test_compiling_in_place_renames_nothing():
    """T1: the other tests compile the blocks by themselves.

    A prefix from compile_in_place would show only in a run with --compile.
    """
    model = random_model(tiny_config())
    before = list(model.state_dict())
    model.compile_in_place()
    assert list(model.state_dict()) == before == [name.replace("_orig_mod.", "") for name in before]


def test_half_precision_logits_are_drawn_from_in_float32():
    """P14: as if they had been float32, noise included: a bfloat16 probability has 8 bits."""
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    for settings in ((1.0, 0, 1.0), (0.7, 50, 1.0), (1.3, 0, 0.9)):
        half, full = (
            sample(given, *settings, generator=torch.Generator().manual_seed(1))
            for given in (logits, logits.float())
        )
        assert torch.equal(half, full)


def test_temperatures_beyond_float32_draw_as_they_should():
    """P2: 1e-300 is 0 there and 1e300 infinite; 0 / 0 and -inf / inf are NaN.

    argmax takes the first NaN: id 0, which one draw may well be.
    """
    logits, banned = torch.tensor([[1.0, 9.0, 3.0]]).expand(1000, 3), torch.tensor([1])
    for temperature in (1e-40, 1e-46, 1e-300, 5e-324):
        assert set(sample(logits, temperature).tolist()) == {1} and set(
            sample(logits, temperature, banned_ids=banned).tolist()
        ) == {2}
    for temperature in (1e30, 1e39, 1e300):
        counts = (
            sample(
                logits, temperature, banned_ids=banned, generator=torch.Generator().manual_seed(0)
            )
            .bincount(minlength=3)
            .tolist()
        )
        assert counts[1] == 0 and min(counts[0], counts[2]) > 400


def test_a_prompt_s_logits_are_those_of_its_last_token():
    """P16: the other logits would be T x V numbers for nothing, 1.6 GB at the default's size.

    The text is the same.
    """
    model, seen = random_model(tiny_config()), []
    model.norm.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    assert len(list(generate(model, torch.tensor([[1, 2, 3, 4, 5]]), 3))) == 3 and seen == [1, 1, 1]


def test_what_a_bad_answer_left_behind_a_shorter_text_counts_for_nothing():
    """PyTorch's steps read as much of each row's cache as the longest row needs.

    The test in test_inference.py overwrites the NaN before it could count.
    """
    model = random_model(tiny_config()).eval()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    decoder = Decoder(model, native=False)
    texts = decoder.texts(2, 32)
    with pytest.raises(ValueError, match="not finite"):
        list(generate_texts(decoder, texts, [[1, 2, 7, 3, 4, 5, 6, 1], [1]], 5, temperature=0))
    drawn = list(generate_texts(decoder, texts, [[1], [3] * 12], 3, temperature=0, banned_ids=[7]))
    for row, prompt in enumerate(([1], [3] * 12)):
        assert [step[row][1] for step in drawn] == [
            i.item()
            for i in generate(model, torch.tensor([prompt]), 3, temperature=0, banned_ids=[7])
        ]


@pytest.mark.parametrize("chunk", [1, 12])
def test_keys_that_are_not_numbers_are_not_hidden(chunk):
    """Where only keys are NaN, a bound on the softmax's exponent would make all scores equal.

    Text from a damaged weight, and no error.
    """
    model = random_model(tiny_config())
    with torch.no_grad():
        model.layers[-1].attention.W_k.weight.fill_(float("nan"))
    native, why = native_model(model)
    if native is None:
        pytest.skip(why)
    cache = KVCache(model.config, 1, 32)
    for first in range(0, 12, chunk):
        logits = native.forward([cache], [list(range(first, first + chunk))])
    assert not torch.isfinite(logits).any()


# --------------------------------------------------------------------------------- ... the training
def fit(model, steps: int, loss_fn=train.next_token_loss, **more):
    """Steps of training on random tokens; (state, records)."""
    records, inputs = [], torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(0))
    on_log = more.pop("on_log", lambda record: None)
    fields = ("log_interval", "save_interval", "val_interval")
    config = TrainConfig(
        batch_size=2,
        grad_accum=2,
        max_steps=steps,
        warmup_steps=0,
        device="cpu",
        **{name: more.pop(name) for name in fields if name in more},
    )
    state = builders_runs.fit(
        model,
        Fixed(inputs, inputs.roll(1, 1), 2),
        config,
        loss_fn,
        on_log=lambda record: (records.append(record), on_log(record)),
        **more,
    )
    return state, records


def test_the_logged_loss_is_the_cross_entropy_alone():
    """M6: with the balance loss in it the original implementation's perplexity was 27 % too high.

    Here at step 1, whose weights are given, with a coefficient that would show.
    """
    model = random_model(tiny_config(aux_loss_coef=1.0, z_loss_coef=1.0))
    inputs = torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(inputs).logits.double().flatten(0, 1), inputs.roll(1, 1).flatten()
        ).item()
    _, (record, *_) = fit(model, 1)
    assert record["loss"] == pytest.approx(expected, rel=1e-5) and record["aux_loss"] > 1


def test_a_skipped_step_moves_no_selection_bias():
    """T8: a skipped step changes nothing, so not the experts' balance either.

    Their loads are finite even where the loss is not.
    """
    model = random_model(tiny_config(router_bias_rate=0.5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state, _ = fit(model, 3, poisoned(set(range(6)), "loss"))
    assert state.skipped_steps == 3 and all(
        torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()
    )
    fit(model, 1)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_speed_excludes_validation_and_saving(monkeypatch):
    """T18: 234 tokens/s were reported where 2,468 were trained.

    With our own clock: a micro-batch takes a second, everything else hours.
    """
    now, model = [0.0], random_model(tiny_config())
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def later(seconds: float) -> None:
        now[0] += seconds

    def loss(model, batch):
        later(1 if model.training else 3600)
        return train.next_token_loss(model, batch)

    validation = [(torch.ones(1, 12, dtype=torch.int64),) * 2] * 2
    state, records = fit(
        model,
        6,
        loss,
        log_interval=2,
        val_interval=1,
        save_interval=3,
        val_batches=validation,
        on_log=lambda record: later(3600),
        on_save=lambda *_: later(3600),
    )
    assert state.train_seconds == 6 * 2 and now[0] > 10 * 3600
    assert [r["tokens_per_sec"] for r in records if r["kind"] == "train"] == pytest.approx(
        [24.0] * 3
    )


@pytest.mark.parametrize(
    "number",
    [
        s
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
        if (s := getattr(signal, name, None))
    ],
    ids=lambda number: number.name,
)
def test_every_polite_signal_is_a_wish_to_stop(monkeypatch, number):
    monkeypatch.setattr(process.os, "write", lambda *_: None)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert signal.getsignal(number) != before, "it would end the process"
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested() and stop.signal == number
    assert signal.getsignal(number) == before


def test_a_loss_that_stands_still_has_no_spikes():
    """Late in training the variance is almost 0: a loss 0.1 % above the mean is many deviations
    away.

    One 10 % above is a spike.
    """
    recent = RecentLoss(RunState(), 6.0, torch.device("cpu"))
    for _ in range(200):
        recent.add(torch.tensor(2.0), torch.tensor(False))
    assert not recent.is_spike(torch.tensor(2.002)) and recent.is_spike(torch.tensor(2.2))


def test_a_run_stopped_amid_bad_steps_goes_back_before_them(data, tmp_path, monkeypatch, capsys):
    """The checkpoint that a signal asked for lies in the bad stretch.

    A resume begins there, a rollback must not.
    """
    monkeypatch.setattr(train, "MOST_SKIPPED_IN_A_ROW", 5)
    # Steps 6 to 13 of 2 micro-batches.
    poison(monkeypatch, range(10, 26))
    run, steps = Run(data, tmp_path), []

    def requested(self):
        steps.append(1)
        if len(steps) == 8:
            self.signal = signal.SIGTERM
        return self.signal is not None

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", requested)
        assert run("--max_steps", 16, "--save_interval", 5) == 128 + signal.SIGTERM
    stopped = run.final()
    assert stopped.step == 8 and stopped.run["skipped_in_a_row"] == 3
    assert run("--resume", fresh=False) == 0
    assert (
        "back to step 5, continuing after the data already used (rollback 1 of at most 2)"
        in capsys.readouterr().out
    )
    final = run.final()
    assert (
        final.step == 16
        and final.run["rollbacks"] == 1
        and final.run["samples_seen"] >= (16 + 12 - 5) * 4 - 4
    )


# -------------------------------------------------------------------------- ... data and prediction
def test_training_reads_no_damaged_shard(tmp_path):
    """D5: digests help only if the trainer asks for them; open_data is what it calls."""
    for split in ("train", "val"):
        folder = write_pair(tmp_path / split)
        path = folder / split / "shard_0000.npy"
        ids = np.load(path)
        ids[7] ^= 1
        np.save(path, ids)
        with pytest.raises(ValueError, match=f"{split}/shard_0000.npy is damaged"):
            open_data(folder)


def test_holes_of_a_vocabulary_are_banned(tmp_path, monkeypatch):
    """P1: o200k_base has 19 such ids; they are made up here, as that file may be missing.

    The model wants nothing else.
    """
    monkeypatch.setattr(Tokenizer, "undecodable_ids", [65, 66])
    predictor, config = predictor_of(
        save(tmp_path, biased_model(biases={65: 90.0, 66: 95.0})),
        max_new_tokens=20,
        temperature=5.0,
        top_k=0,
    )
    assert predictor.banned_ids == [65, 66, 257, 258, 259]
    assert not set("AB") & set("".join(predictor.stream("x", config)))


def test_many_answers_move_no_terminal_either(tmp_path, monkeypatch, capsys):
    """S1: one answer's control characters are tested elsewhere.

    Another function shows those of many answers.
    """

    def fake(decoder, texts, prompts, max_new_tokens, finished, **settings):
        yield from ([(row, token) for row in range(len(prompts))] for token in b"\x1b[31m")
        finished.update(range(len(prompts)))
        yield [(row, ord(".")) for row in range(len(prompts))]

    monkeypatch.setattr(predictor, "generate", fake)
    argv = [
        "--ckpt",
        save(tmp_path, biased_model()),
        "--prompt",
        "\x07",
        "--num_samples",
        "2",
        "--device",
        "cpu",
        "--quiet",
    ]
    predict.main(argv)
    assert capsys.readouterr().out == "\x07\x1b[31m.\n\n\x07\x1b[31m.\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    predict.main(argv)
    assert capsys.readouterr().out == "\\x07\\x1b[31m.\n\n\\x07\\x1b[31m.\n"
