"""Reruns the promises of reliability that are counted, with the counts that docs/reliability.md
quotes.

    python -m benchmarks.reliability
            all: about a quarter of an hour on one core, into
            benchmarks/results/reliability.json
    python -m benchmarks.reliability --only 3 6 --counts nightly --name try

Each promise is a function in tests/promises, which pytest runs too, with smaller counts. What was
measured before and is not asked for now stays in the file. Exit code 1 if anything did not hold.
"""

from __future__ import annotations

import json
import time

from benchmarks.common import RESULTS, environment, save_results
from runtime.base import cli


def promises() -> list:
    """All of them, by number."""
    from tests.promises import (
        adapters,
        conversations,
        damage,
        disconnects,
        evaluation,
        expert_parallel,
        flags,
        hostile,
        many_ranks,
        memory,
        model,
        network,
        numbers,
        packing,
        pages,
        pairing,
        policy,
        prompt,
        published,
        rank_checkpoints,
        rank_faults,
        runs,
        serve_page,
        server_process,
        serving,
        serving_http,
        slow_clients,
        texts,
        traffic,
        training,
        tuning_ranks,
        tuning_runs,
    )

    return sorted(
        (
            *memory.PROMISES,
            *numbers.PROMISES,
            *published.PROMISES,
            *runs.PROMISES,
            *damage.PROMISES,
            *pairing.PROMISES,
            *hostile.PROMISES,
            *model.PROMISES,
            *training.PROMISES,
            *prompt.PROMISES,
            *flags.PROMISES,
            *texts.PROMISES,
            *network.PROMISES,
            *packing.PROMISES,
            *pages.PROMISES,
            *evaluation.PROMISES,
            *conversations.PROMISES,
            *adapters.PROMISES,
            *policy.PROMISES,
            *tuning_runs.PROMISES,
            *tuning_ranks.PROMISES,
            *many_ranks.PROMISES,
            *rank_faults.PROMISES,
            *expert_parallel.PROMISES,
            *traffic.PROMISES,
            *rank_checkpoints.PROMISES,
            *serving.PROMISES,
            *serving_http.PROMISES,
            *serve_page.PROMISES,
            *disconnects.PROMISES,
            *slow_clients.PROMISES,
            *server_process.PROMISES,
        ),
        key=lambda promise: promise.number,
    )


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of promises (default: all)")
    parser.add_argument(
        "--counts",
        choices=("at_push", "nightly", "published"),
        default="published",
        help="how often each is tried (default: published)",
    )
    parser.add_argument(
        "--name",
        default="reliability",
        help="results go to benchmarks/results/NAME.json (default: reliability)",
    )
    args = parser.parse_args(argv)
    chosen = [promise for promise in promises() if args.only is None or promise.number in args.only]
    if unknown := set(args.only or []) - {promise.number for promise in chosen}:
        raise ValueError(
            f"there is no promise {min(unknown)}; there are "
            f"{', '.join(str(p.number) for p in promises())}"
        )
    path = RESULTS / f"{args.name}.json"
    rows = (
        {row["text"]: row for row in json.loads(path.read_text())["promises"]}
        if path.exists()
        else {}
    )
    # Before the results of the first are a change that is not committed.
    code = {name: environment()[name] for name in ("commit", "uncommitted_changes")}
    failed = 0
    for promise in chosen:
        started, count = time.perf_counter(), getattr(promise, args.counts)
        if not count:
            # Too long for every push.
            continue
        tally = promise.run(count)
        rows[promise.text] = {
            "number": promise.number,
            "text": promise.text,
            "held": tally.held,
            "tried": tally.tried,
            "detail": tally.detail,
            "failures": tally.failures[:20],
            "reference": promise.reference,
            "seconds": round(time.perf_counter() - started, 1),
            "measured": code | {"time": environment()["time"]},
        }
        failed += tally.held != tally.tried or not tally.tried
        print(
            f"{promise.number:3} {promise.text}: {tally.held} of {tally.tried}"
            + "".join(f", {name} {value}" for name, value in tally.detail.items()),
            flush=True,
        )
        known = [promise.text for promise in promises()]
        save_results(
            args.name, {"promises": [rows[text] for text in known if text in rows]}
        )  # after each: the next may take long
    return int(failed > 0)


if __name__ == "__main__":
    cli.run_main(main)
