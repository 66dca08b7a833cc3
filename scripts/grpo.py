"""Let a tuned model learn from rewards: group relative policy optimization (GRPO).

    python -m scripts.grpo --init_from checkpoints/sft/best.pt                 embedded requests
    python -m scripts.grpo --init_from sft.pt --data my.jsonl --reward my.py:score   your prompts
    python -m scripts.grpo --resume                                            continue the run

The model answers each prompt --group_size times, the reward judges the answers, and those above
their group's mean become likelier. A reward is a Python function:

    def score(messages, text, **columns):
        return float("please" in text)

messages: the prompt; text: the answer; columns: the row's other ones, by name. It returns a number,
or a dict of parts, such as {"polite": 1.0, "short": 0.5}: their sum is the reward, and each is
logged. An answer without an end earns at most 0, unless the function has an argument `ended`.
docs/post-training.md says more. Then talk to the model:

    python predict.py --chat --ckpt checkpoints/grpo/best.pt
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
from runtime.posttraining.policy import Grpo, GrpoConfig


def main(argv: list[str] | None = None) -> int:
    settings = settings_of(__doc__, argv, GrpoConfig)
    return train.launch(settings, Grpo, GrpoConfig)


if __name__ == "__main__":
    run_main(main)
