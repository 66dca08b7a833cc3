"""How ranks start and fail: what they agree on, and what they say."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from config_model import TrainConfig
from runtime.base import cli, process
from runtime.base.process import StopRequest
from runtime.base.ranks import Ranks
from runtime.checkpoint.folder import find_latest
from runtime.distributed import failure, launch
from runtime.distributed.failure import Report
from runtime.kernels.choose import choose_kernels
from runtime.training import plan as plan_module
from runtime.training.optimizer import build_optimizer
from runtime.training.reporter import profiled
from runtime.training.state import RecentLoss, RunState
from runtime.training.task import GivenTask
from tests.builders import tiny_config
from tests.builders_runs import MODEL, SPEED, settings_of
from tests.promises.rank_faults import FLAGS, Fault, RanksRun, straight
from tests.ranks import run_on

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")


# ------------------------------------------------------------------------------------------ a start
def meet(store: dist.Store, world: int, late: int | None = None) -> list[str]:
    """Return the name that each of `world` ranks agrees to. late: starts after the others."""
    names: dict[int, str] = {}

    def rank(number: int) -> None:
        names[number] = launch._agreed_name(store, number, world)

    threads = [threading.Thread(target=rank, args=(n,), daemon=True) for n in range(world)]
    for number, thread in enumerate(threads):
        if number != late:
            thread.start()
    if late is not None:
        threads[(late + 1) % world].join(0.3)
        assert not names, "those agreed without the late one"
        threads[late].start()
    for thread in threads:
        thread.join(20)
    return [names[number] for number in range(world)]


@pytest.mark.parametrize("late", [None, 0, 2])
def test_every_generation_of_ranks_meets_under_a_name_of_its_own(late):
    """What earlier ranks left in the store looked like the addresses of the present ones.

    torchrun's own count of restarts is no such name: each node has its own.
    """
    store = dist.HashStore()
    first, again = meet(store, 3), meet(store, 3, late)
    assert len(set(first)) == len(set(again)) == 1 and first != again


def test_a_smaller_generation_meets_too():
    store = dist.HashStore()
    assert len(set(meet(store, 3))) == len(set(meet(store, 2))) == 1


def test_ranks_that_never_come_are_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(launch, "MEETING_SECONDS", 0.2)
    with pytest.raises(ValueError, match="rank 0 has waited 0 s for the other 1 to start"):
        launch._agreed_name(dist.HashStore(), 0, 2)


def test_a_group_waits_for_a_late_rank_and_meanwhile_hears_of_failures(monkeypatch):
    """NCCL waits in its store for the address of a group's first rank.

    That was half a minute, and a rank that had more to compile or to read ended the run. The wait
    keeps the store's connection busy, so that whoever watches for failures needs another.
    """
    monkeypatch.setattr(launch, "STORE_SECONDS", 0.3)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("ADDR", "127.0.0.1"), ("PORT", str(server.port))):
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = launch._store()
    group_store, found = launch._store_of_group("name", store), []

    def ask(question: Callable, key) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.append(question(key)), daemon=True)
        thread.start()
        return thread

    waiting = ask(group_store.get, "address")
    waiting.join(0.6)
    assert waiting.is_alive()
    ask(store.check, ["name/failed"]).join(5)
    assert found == [False], "it waited with the other"
    dist.PrefixStore("name", server).set("address", "here")
    waiting.join(10)
    assert found == [False, b"here"]


def test_the_digest_of_the_code_is_of_every_file_that_a_run_loads(monkeypatch, tmp_path):
    for folder in ("runtime/distributed", "scripts"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("config_model", "model_parts", "model", "train", "scripts/sft", "runtime/x"):
        (tmp_path / f"{name}.py").write_text("1")
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "runtime/distributed/launch.py"))
    before = launch._code_digest()
    assert before == launch._code_digest()
    for name in ("model", "scripts/sft", "runtime/x"):
        (tmp_path / f"{name}.py").write_text("2")
        assert launch._code_digest() != before
        before = launch._code_digest()


# ------------------------------------------------------------------------------------------- errors
LOST = RuntimeError("[/third_party/gloo/tcp/pair.cc:1] Connection closed by peer. This is bad.")


class Left(BaseException):
    """Raised in place of the process's end."""


def said(monkeypatch, capsys, rank: int, error: Exception, others: dict | None) -> tuple[int, str]:
    """Return the exit code and what a rank of 4 says of an error. others: theirs, by rank."""
    report = Report(rank, 4)
    if others is not None:
        report.store = report.lasting = dist.HashStore()
        for other, (line, is_lost) in others.items():
            failure.note(report.store, other, line, is_lost)

    def leave(code: int):
        raise Left(code)

    monkeypatch.setattr(failure, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(failure.os, "_exit", leave)
    handlers = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    try:
        report.leave(error)
    except Left as left:
        return left.args[0], capsys.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("it did not leave")


MINE = ValueError("no such data")


@pytest.mark.parametrize(
    "rank, error, others, code, expected",
    [
        # An error that all ranks have is said once; one that a rank alone has, with its number.
        (0, MINE, {}, 2, "error: no such data\n"),
        (2, MINE, {0: ("error: no such data", False)}, 2, ""),
        (2, MINE, {}, 2, "rank 2: error: no such data\n"),
        (2, MINE, {0: ("error: another", False)}, 2, "rank 2: error: no such data\n"),
        # Those that lose a rank that told why are silent; else the first of them says it.
        (1, LOST, {2: ("error: no such data", False)}, 1, ""),
        (1, LOST, {0: ("closed", True), 2: ("closed", True)}, 1, ""),
        (
            0,
            LOST,
            {1: ("closed", True), 2: ("closed", True)},
            1,
            "error: lost rank 3: it was killed, hangs or cannot be reached "
            "(Connection closed by peer)\n",
        ),
        (
            1,
            LOST,
            {2: ("closed", True)},
            1,
            "error: lost ranks 0, 3: they were killed, hang or cannot be reached "
            "(Connection closed by peer)\n",
        ),
        (
            0,
            LOST,
            dict.fromkeys((1, 2, 3), ("closed", True)),
            1,
            "error: lost the connection between the ranks (Connection closed by peer)\n",
        ),
        (
            3,
            dist.DistNetworkError("The client socket has failed to connect"),
            None,
            1,
            "error: lost torchrun: it was killed or cannot be reached (The client socket has "
            "failed to connect)\n",
        ),
    ],
)
def test_an_error_is_said_once_by_the_rank_that_has_it(
    monkeypatch, capsys, rank, error, others, code, expected
):
    assert said(monkeypatch, capsys, rank, error, others) == (code, expected)


def test_a_bug_on_a_rank_has_its_traceback(monkeypatch, capsys):
    try:
        raise KeyError("a bug")
    except KeyError as error:
        code, text = said(monkeypatch, capsys, 1, error, {})
    assert code == 1 and text.startswith("Traceback") and "rank 1: error: 'a bug'" in text


def test_a_reader_that_has_gone_is_no_error(monkeypatch, capsys):
    assert said(monkeypatch, capsys, 0, BrokenPipeError(), {}) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("gone", [False, True])
def test_a_rank_ends_soon_after_another_has_failed(monkeypatch, gone):
    """It waited for the other until the time-out; where torchrun was killed, forever."""

    class Store:
        def check(self, keys):
            if gone:
                raise dist.DistNetworkError("Broken pipe")
            return keys == [failure.FAILED_KEY]

    left: list[int] = []
    monkeypatch.setattr(failure, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(failure, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(failure.os, "_exit", left.append)
    failure.watch(Store(), threading.Event())  # type: ignore[arg-type]
    assert left == [1]
    ended = threading.Event()
    ended.set()
    failure.watch(Store(), ended)  # type: ignore[arg-type]
    assert left == [1]


# ----------------------------------------------------------------------------------------- signals
@pytest.fixture
def handlers():
    """Puts all handlers of signals back."""
    before = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    yield
    process._ignored.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_of_several_ranks_one_says_that_it_stops(monkeypatch, capfd, handlers):
    """Eight lines said it on eight GPUs."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", rank)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested() and stop.exit_code == 128 + signal.SIGTERM
        assert capfd.readouterr().err.count("finishing this step") == lines


def test_a_rank_that_stops_because_another_was_told_to_has_an_exit_code_too():
    """128 + None ended the run with a TypeError, after its save."""
    assert StopRequest().exit_code == 128 + signal.SIGTERM


def test_a_rank_at_its_end_is_not_ended_by_the_end_of_another(monkeypatch, handlers):
    """torchrun ends the others with SIGTERM as soon as one has ended.

    One that failed is to say why. One of a stopped run printed its last lines when the first had
    left, and was reported as killed by signal 15, not as stopped with code 143.
    """
    before = signal.getsignal(signal.SIGTERM)
    for ranks, handler in ((False, before), (True, signal.SIG_IGN)):
        if ranks:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        with pytest.raises(KeyError), StopRequest():
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) == handler
        with StopRequest():
            pass
        assert signal.getsignal(signal.SIGTERM) == handler


def test_ranks_that_went_back_to_a_checkpoint_can_be_stopped(monkeypatch, handlers):
    """After a rollback they ignored SIGTERM, Ctrl-C and the rest to the end of the run."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    assert process._ignored[signal.SIGTERM] == before


def test_one_rank_of_a_machine_says_what_is_wrong_with_the_command(monkeypatch, capsys):
    """Eight ranks said that they did not know a flag."""

    def main(argv):
        raise ValueError("unknown flag")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    for rank, said in (("0", "error: unknown flag\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as left:
            cli.run_main(main)
        assert left.value.code == 2 and capsys.readouterr().err == said


# ---------------------------------------------------------------------------------- steps and plans
class Windows:
    """Random ids that depend on a sample's number alone."""

    def batch(self, first: int):
        ids = torch.randint(0, 32, (1, 9), generator=torch.Generator().manual_seed(first))
        return ids[:, :-1], ids[:, 1:]


def bits_after_nan(ranks: Ranks, where: str) -> tuple[bool, list[int]]:
    """Take two good steps, then one with NaN on rank 1 alone; return (skipped, changed tensors)."""
    config = TrainConfig(batch_size=1, grad_accum=2, max_steps=10, warmup_steps=0, optimizer="muon")
    torch.manual_seed(0)
    model = train.LLM(tiny_config(vocabulary_size=32, context_length=8, num_experts=4, top_k=2))
    choose_kernels(model, torch.device("cpu"), torch.float32)
    ranks.arrange(1, "full", 4)
    ranks.shard(model, torch.float32)
    optimizer = build_optimizer(model, config, ranks)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    recent = RecentLoss(RunState(), 0.0, torch.device("cpu"))
    is_bad = False

    def loss_fn(model, batch):
        out = train.next_token_loss(model, batch)
        if not is_bad:
            return out
        total = out.cross_entropy_sum
        # Value 0 with a gradient that is infinite, or a loss that is NaN.
        bad = (total - total.detach()).sqrt() if where == "gradient" else math.nan
        return out._replace(cross_entropy_sum=total + bad)

    def tensors() -> list[torch.Tensor]:
        state = [t for p in model.parameters() for t in optimizer.state[p].values()]
        return [ranks.local(t.detach()).clone() for t in (*model.state_dict().values(), *state)]

    task = GivenTask(Windows(), loss_fn)
    for step in range(3):
        is_bad = step == 2 and ranks.rank == 1
        before = tensors() if step else []
        result = train.train_step(
            *(model, task, [Windows().batch(2 * step + ranks.rank)], 16, optimizer, scaler),
            *(recent, config, torch.float32),
            step=step,
            ranks=ranks,
        )
    changed = [i for i, (a, b) in enumerate(zip(before, tensors(), strict=True)) if not a.equal(b)]
    return bool(result.skipped), changed


@needs_fork
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_on_one_rank_changes_no_bit_on_any(where):
    assert run_on(2, bits_after_nan, where) == [(True, [])] * 2


def micro_batch(ranks: Ranks, data: str, fitting: list[int]) -> list:
    """Return what --micro_batch auto takes where `fitting` sequences fit each rank, or the line."""
    sizes = ("--batch_size", "4", "--grad_accum", "4", "--micro_batch", "auto")
    folders = ("--data_dir", data, "--ckpt_dir", f"{data}/no_run")
    settings = settings_of(*MODEL, *SPEED, *folders, *sizes)
    plan = plan_module.make_plan(settings, train.pretraining, ranks=ranks)
    config = dataclasses.replace(plan.config, batch_size=fitting[ranks.rank] or 1)
    needed = plan_module._estimate(dataclasses.replace(plan, config=config))
    free = int(needed / 0.8 * ranks.local_world) + 16 if fitting[ranks.rank] else 0
    with mock.patch.object(plan_module, "memory_bytes", lambda device: (free, 1 << 40)):
        try:
            chosen = plan_module.with_largest_micro_batch(plan, lambda candidate: True)
        except ValueError as error:
            return [str(error)]
    return [chosen.config.batch_size, chosen.config.grad_accum]


@needs_fork
def test_the_micro_batch_is_the_largest_that_fits_every_rank(data):
    """Each rank took its own, and 16 sequences must be shared out evenly."""
    assert run_on(2, micro_batch, str(data), [8, 2]) == [[2, 8]] * 2
    assert run_on(2, micro_batch, str(data), [16, 16]) == [[8, 2]] * 2
    lines = run_on(2, micro_batch, str(data), [8, 0])
    assert all("not even one sequence" in line for [line] in lines)


@pytest.mark.parametrize(
    "allowed, expected", [(1, 1), (3, 3), (16, 4)], ids=["torchrun's", "the user's", "PyTorch's"]
)
def test_the_ranks_of_a_machine_share_its_cores(monkeypatch, allowed, expected):
    """What OMP_NUM_THREADS gave to each process was shared out once more."""
    set_to: list[int] = []
    ranks = Ranks()
    ranks.local_world = 2
    monkeypatch.setattr(process, "usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: allowed)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    plan_module._prepare_process(TrainConfig(device="cpu", dtype="float32"), ranks)
    assert set_to == [expected]


def test_a_profile_is_of_the_first_rank(data, tmp_path):
    """All ranks wrote the same two files: one took the other's away, and the run ended."""
    folders = ["--data_dir", data, "--ckpt_dir", tmp_path / "c", "--graph_dir", tmp_path]
    flags = [*MODEL, *SPEED, *folders, "--max_steps", "10", "--profile"]
    plan = plan_module.make_plan(settings_of(*map(str, flags)), train.pretraining)
    for rank, names in ((1, set()), (0, {"trace.json", "trace.txt"})):
        plan.ranks = Ranks()
        plan.ranks.rank = rank
        with profiled(plan, RunState(), print) as on_step:
            for _ in range(10):
                on_step()
        assert {path.name for path in tmp_path.iterdir()} == names


# --------------------------------------------------------------------------------------- whole runs
@needs_fork
@pytest.mark.slow
def test_a_folder_with_another_run_is_refused_once():
    """Also of ranks that were restarted: what they may continue is their own run."""
    run = RanksRun()
    run.ckpt_dir.symlink_to(straight().ckpt_dir)
    run.server.set(launch.RUN_KEY, "another run's")
    ended = run.start()
    lines = [line for line in ended.output.splitlines() if "error: " in line]
    assert ended.codes == [2, 2] and len(lines) == 1, ended.output
    assert "holds the checkpoints of another run" in lines[0]


@needs_fork
@pytest.mark.slow
def test_data_that_one_rank_cannot_read_ends_all_of_them():
    run = RanksRun()
    ended = run.start(flags_of={1: ["--data_dir", "nowhere"]})
    lines = [line for line in ended.output.splitlines() if "error: " in line]
    assert ended.codes == [2, 2] and len(lines) == 1, ended.output
    assert "rank 1: nowhere" in lines[0] and not run.ckpt_dir.exists()


@needs_fork
@pytest.mark.slow
def test_ranks_go_back_to_a_checkpoint_together():
    """Each looked for it by itself, and might have found another, or none."""
    run = RanksRun(flags=[*FLAGS, "--max_steps", "44", "--max_rollbacks", "1"])
    ended = run.start(Fault("bad stretch", 1, 6))
    assert ended.codes == [0, 0], ended.output
    assert ended.output.count("back to step 4, continuing after the data already used") == 1
    saved = find_latest(run.ckpt_dir)[0].run
    assert (saved["step"], saved["rollbacks"]) == (44, 1)
