"""Watch runs in a browser while they train, or look at finished ones.

    python -m scripts.watch                            the runs below artifacts/graphs
    python -m scripts.watch runs/a runs/b              folders that --graph_dir named
    python -m scripts.watch runs --out curves.html     one file to keep or to send; no server

The page reads the files that runs write and changes nothing: start it before a run, during it or
after it. It is served to this machine alone. From another machine, use the ssh line that it prints.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

import os
import signal
import threading
from pathlib import Path

from config_model import TrainConfig
from runtime.base.cli import parser, run_main
from runtime.base.files import write_text_atomic
from runtime.serving.watch import PORT, Server, Watch, snapshot, tunnel_line


def folders_given(names: list[str], may_come_later: bool) -> list[Path]:
    """Return the folders to watch. Raise ValueError for what is no folder."""
    if not names:
        # A run that begins later makes it.
        return [Path(TrainConfig.graph_dir)]
    for name in names:
        if not may_come_later and not os.path.isdir(name):
            reason = "is a file" if os.path.exists(name) else "is not there"
            raise ValueError(f"{name} {reason}: give folders of runs (--graph_dir of train.py)")
    return [Path(name) for name in dict.fromkeys(names)]


def follow_parent(parent: int) -> None:
    """End this process when the one that started it has ended, however it did."""

    def wait() -> None:
        ended = threading.Event()
        while os.getppid() == parent:
            ended.wait(1)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def write_page(watch: Watch, path: Path) -> int:
    """Write the page of the runs as they are now. Raise ValueError if there is none."""
    page, count = snapshot(watch), len(watch.runs())
    if not count:
        raise ValueError("these folders hold no metrics.jsonl: there is no run to show")
    write_text_atomic(path, page)
    print(f"{path}: {count} run{'s' * (count != 1)}, {len(page.encode()):,} bytes")
    return 0


def server_of(watch: Watch, port: int, any_port: bool) -> Server:
    """Return a server at `port`; with `any_port`, at a free one if another run's has it."""
    try:
        return Server(watch, port)
    except ValueError:
        if not any_port:
            raise
        return Server(watch, 0)


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("folders", nargs="*", help=f"folders of runs ({TrainConfig.graph_dir})")
    p.add_argument("--port", type=int, default=PORT, help=f"port; 0 = any that is free ({PORT})")
    p.add_argument("--out", help="HTML file to write instead of serving a page")
    p.add_argument("--parent", type=int, default=0, help="end with the process of this number")
    args = p.parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, not {args.port}")
    watch = Watch(folders_given(args.folders, bool(args.parent)))
    if args.out is not None:
        return write_page(watch, Path(args.out))
    with server_of(watch, args.port, bool(args.parent)) as server:
        if args.parent:
            follow_parent(args.parent)
        print(f"watch    {server.url}", flush=True)
        print(f"         from another machine: {tunnel_line(server.port)}", flush=True)
        # So that the first page finds the files read.
        threading.Thread(target=watch.runs, daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        server.serve_forever()
    return 0


if __name__ == "__main__":
    run_main(main)
