"""Teach a trained model to answer: supervised fine-tuning on conversations.

    python -m scripts.sft --init_from checkpoints/best.pt                  the embedded tasks
    python -m scripts.sft --init_from checkpoints/best.pt --data my.jsonl  conversations of your own
    python -m scripts.sft --resume                                         continue the run

Files hold conversations (messages), ShareGPT, Alpaca, or prompt and completion:
docs/post-training.md says what each looks like. Then talk to the model:

    python predict.py --chat --ckpt checkpoints/sft/best.pt
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
from runtime.posttraining.sft import Sft, SftConfig


def main(argv: list[str] | None = None) -> int:
    settings = settings_of(__doc__, argv, SftConfig)
    return train.launch(settings, Sft, SftConfig)


if __name__ == "__main__":
    run_main(main)
