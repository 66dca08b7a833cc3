"""Teach a model which of two answers is the better one: direct preference optimization.

    python -m scripts.dpo --init_from checkpoints/sft/best.pt                  the embedded tasks
    python -m scripts.dpo --init_from checkpoints/sft/best.pt --data my.jsonl  pairs of your own
    python -m scripts.dpo --resume                                             continue the run

Start from a model that answers already (scripts.sft). Files hold a prompt, a chosen and a rejected
answer, or two conversations that begin alike: docs/post-training.md says what they look like, and
what each number means. Watch the score next to the accuracy: DPO can raise one and lower the other.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

from runtime.base import process

# Here, because PyTorch reads the environment when it is imported.
process.before_torch()
# ruff: noqa: E402

import train
from runtime.base.cli import run_main
from runtime.posttraining.flags import settings_of
from runtime.posttraining.preference import DpoConfig, Preference


def main(argv: list[str] | None = None) -> int:
    settings = settings_of(__doc__, argv, DpoConfig)
    return train.launch(settings, Preference, DpoConfig)


if __name__ == "__main__":
    run_main(main)
