"""A server for a long time: memory over time, and answers that stay the same bits.

    python -m benchmarks.soak --seconds 600

Clients ask without a pause, as those of guarantee 85 do: answers and streams of all sizes, several
answers for a prompt, requests that are refused, and clients that go amid head, body or answer. In
between, each client asks one of 16 requests with log-probabilities whose answers were had before,
alone. Every 5 seconds the resident memory of the server's process is noted. `growth`: the median of
its last tenth less that of its second one, because the first fills caches. Saved:
benchmarks/results/soak_NAME.json. Exit code 1 if an answer was another one, or a status wrong.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import random
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import save_results
from runtime.base import cli
from runtime.inference.predictor import READY
from tests.builders_server_process import Process, serving
from tests.promises.server_process import MIB, PATH, STORY, mixed, said

FLAGS = ("--slots", "8", "--max_waiting", "64", "--max_new_tokens", "1000000", "--no-log_requests")
LARGEST_BODY = ("--max_body_bytes", str(1 << 16))
NUM_CHECKED = 16
# One in so many requests is one whose answer is known.
CHECKED_EACH = 5
SAMPLE_SECONDS = 5.0


def known_request(number: int) -> dict:
    """Return a request that is answered alone before, and in company later."""
    r = random.Random(number)
    return {
        "prompt": f"{STORY} {'there was a cat ' * r.randint(0, 12)}",
        "max_tokens": r.randint(8, 60),
        "seed": number,
        "temperature": r.choice((0, 0.8, 1)),
        "logprobs": 3,
        "stream": r.random() < 0.5,
    }


class Soak:
    """What clients found. alone: the known answers."""

    def __init__(self, server: Process, seconds: float):
        self.server = server
        self.alone = [said(server.raw(PATH, known_request(i))) for i in range(NUM_CHECKED)]
        # After these: on a busy machine they may take longer than a short soak.
        self.until = time.monotonic() + seconds
        self.statuses: Counter[int] = Counter()
        self.same = 0
        self.wrong: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        """Ask until the end."""
        r = random.Random(number)
        i = number * 10**6
        while time.monotonic() < self.until:
            i += 1
            if i % CHECKED_EACH:
                status, right = mixed(self.server, i)
                with self._lock:
                    self.statuses[status] += 1
                    if status not in right:
                        self.wrong.append(f"request {i}: {status}, not {right}")
                continue
            known = r.randrange(NUM_CHECKED)
            is_same = said(self.server.raw(PATH, known_request(known))) == self.alone[known]
            with self._lock:
                self.statuses[200] += 1
                self.same += is_same
                if not is_same:
                    self.wrong.append(f"request {i}: not the answer that {known} has alone")

    def watch(self) -> None:
        """Note the memory until the end."""
        started = time.monotonic()
        while (now := time.monotonic()) < self.until:
            self.memory.append((now - started, self.server.memory_bytes()))
            time.sleep(SAMPLE_SECONDS)


def growth(memory: list[tuple[float, int]]) -> float:
    """Return the median bytes of the last tenth of some samples less those of the second tenth."""
    tenth = max(1, len(memory) // 10)
    values = [size for _, size in memory]
    return statistics.median(values[-tenth:]) - statistics.median(values[tenth : 2 * tenth])


def soak(ckpt: str | Path, seconds: float, clients: int) -> dict:
    """Return what a server did under so many clients."""
    with serving(*FLAGS, *LARGEST_BODY, ckpt=ckpt) as server:
        run = Soak(server, seconds)
        with ThreadPoolExecutor(clients + 1) as pool:
            watching = pool.submit(run.watch)
            asking = [pool.submit(run.client, number) for number in range(clients)]
            for one in (watching, *asking):
                one.result()
    return {
        "seconds": seconds,
        "clients": clients,
        "requests": sum(run.statuses.values()),
        "statuses": {str(status): n for status, n in sorted(run.statuses.items())},
        "same_as_alone": run.same,
        "wrong": run.wrong[:20],
        "num_wrong": len(run.wrong),
        "memory_mib": [[round(s), round(size / MIB, 1)] for s, size in run.memory],
        "growth_mib": round(growth(run.memory) / MIB, 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--name", default="public", help="results go to soak_NAME.json (public)")
    parser.add_argument("--ckpt", default=str(READY), help="checkpoint (default: the public one)")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default: 600)")
    parser.add_argument("--clients", type=int, default=16, help="at the same time (default: 16)")
    args = parser.parse_args(argv)
    if args.seconds <= 0 or args.clients < 1:
        raise ValueError("--seconds must be above 0 and --clients at least 1")
    found = soak(args.ckpt, args.seconds, args.clients)
    print(
        f"{found['requests']:,} requests, {found['same_as_alone']:,} compared, "
        f"{found['num_wrong']} wrong, memory {found['growth_mib']:+.1f} MiB"
    )
    for line in found["wrong"]:
        print(f"  {line}")
    save_results(f"soak_{args.name}", found)
    return 1 if found["num_wrong"] else 0


if __name__ == "__main__":
    cli.run_main(main)
