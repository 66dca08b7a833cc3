"""Train the model of public/stories.pt on generated stories alone, and write it and its card.

    python -m scripts.make_stories --force
    python -m scripts.make_stories --force --resume     continue after an interruption

It is the model of `make demo`, trained longer. Shards, checkpoints and plots go to --work_dir.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

from runtime.base import process

# Here, because PyTorch reads the environment when it is imported.
process.before_torch()
# ruff: noqa: E402

from pathlib import Path

import prepare_data
import train
from runtime.base.cli import parser, run_main
from runtime.base.files import write_text_atomic
from runtime.checkpoint.folder import BEST, find_latest
from runtime.data.sources import DEFAULT_TOY_STORIES
from runtime.interop.export import check_output
from runtime.interop.release import commit, release

# Those of `make demo`, but for the steps. Inside a story only its own names are seen. Copying of
# names forms earlier from larger initial weights, and with a learning rate that stays high for
# longer: benchmarks/names.py.
RECIPE = ["--preset=plain-nano", "--document_mask", "--schedule=wsd", "--decay_fraction=0.3"]
RECIPE += ["--init_std=0.1"]
VOCABULARY, STEPS = 3072, 1800


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--out", default="public/stories.pt", help="file to write, its card next to it")
    p.add_argument("--work_dir", default="artifacts/stories", help="folder for what a run writes")
    p.add_argument("--num_stories", type=int, help=f"stories to make ({DEFAULT_TOY_STORIES})")
    p.add_argument("--vocabulary", type=int, help=f"tokens of the tokenizer ({VOCABULARY})")
    p.add_argument("--max_steps", type=int, default=STEPS, help=f"optimizer steps ({STEPS})")
    p.add_argument("--num_threads", type=int, default=0, help="CPU threads; 0 = PyTorch's choice")
    p.add_argument("--resume", action="store_true", help="continue the run in --work_dir")
    p.add_argument("--force", action="store_true", help="replace an existing file")
    args = p.parse_args(argv)
    if args.resume and (args.num_stories or args.vocabulary):
        raise ValueError("--num_stories and --vocabulary have no effect with --resume: omit them")
    out = check_output(args.out, args.force, source=args.work_dir)
    made_at, work = commit(), Path(args.work_dir)
    folders = [f"--data_dir={work / 'data'}", f"--ckpt_dir={work / 'checkpoints'}"]
    folders.append(f"--graph_dir={work / 'graphs'}")
    running = [f"--max_steps={args.max_steps}", f"--num_threads={args.num_threads}"]
    command = f"python -m scripts.make_stories {running[0]}"
    # One line for each start of the run.
    history = work / "commands.txt"
    if args.resume:
        step = find_latest(work / "checkpoints")[0].step
        commands = history.read_text(encoding="utf-8")
        commands += f"{command} --resume # from step {step}\n"
        write_text_atomic(history, commands)
        code = train.main(["--resume", *folders, *running])
    else:
        num_stories = f"--num_stories={args.num_stories or DEFAULT_TOY_STORIES}"
        vocabulary = args.vocabulary or VOCABULARY
        data = ["--dataset=toy", num_stories, f"--out_dir={work / 'data'}"]
        prepare_data.main([*data, f"--tokenizer=bpe:{vocabulary}"])
        commands = f"{command} {num_stories} --vocabulary={vocabulary}\n"
        write_text_atomic(history, commands)
        code = train.main([*RECIPE, *folders, *running])
    if code == 0:
        metrics = work / "graphs" / "metrics.json"
        card = release(work / "checkpoints" / BEST, metrics, out, commands.splitlines(), made_at)
        print(f"{out}: {out.stat().st_size:,} bytes; {card} says how it was made")
    return code


if __name__ == "__main__":
    run_main(main)
