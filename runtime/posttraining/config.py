"""Settings that all training after pre-training shares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from config_model import TrainConfig, option
from runtime.posttraining.forms import read_columns

# Settings of the model that a run may choose: they change no weight and no meaning of one.
MODEL_FLAGS = ("aux_loss_coef", "z_loss_coef", "router_bias_rate", "dropout")


# What a setting of pre-training means here.
HELP = {
    "batch_size": "rows per micro-batch; of pairs, so many of chosen and of rejected answers",
    "data_dir": "folder of the base's shards, for its loss on its own text; it may be missing",
    "document_mask": "for pre-training alone: here no example sees another",
    "save_interval": "steps between checkpoints and plots; best.pt is the best of them",
    "seed": "seed of data order, sampled answers, adapters and dropout",
}
# Settings of pre-training that would change nothing: validation takes all that is held out.
NOT_HERE = frozenset(("val_steps",))


def changed(name: str, default: object) -> Any:
    """Return TrainConfig's field with another default, and with its meaning here."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    metadata = dict(fields[name].metadata)
    return field(default=default, metadata=metadata | {"help": HELP.get(name, metadata["help"])})


@dataclass(frozen=True)
class PostTrainConfig(TrainConfig):
    """One run after pre-training: its data, its score, its adapters."""

    data_dir: str = changed("data_dir", TrainConfig.data_dir)
    document_mask: bool = changed("document_mask", TrainConfig.document_mask)
    seed: int = changed("seed", TrainConfig.seed)
    # data
    dataset: str = option(
        "",
        "toy: the embedded tasks, made from the grammar of the toy stories; the default without "
        "--data",
        choices=("", "toy"),
    )
    data: tuple = option(
        (),
        "file, folder or pattern of examples (.jsonl, .json, .csv, .tsv, .parquet); may be given "
        "more than once",
    )
    toy_examples: int = option(
        10_000, "embedded examples that a run learns from", minimum=2, maximum=1_000_000
    )
    columns: str = option(
        "", "columns under other names, as prompt=question,completion=answer; empty: their own"
    )
    raw: bool = option(
        False, "prompt and completion as they are, without chat layout: the answer ends the text"
    )
    train_on: str = option(
        "all",
        "answers of a conversation that are learned: all, or the last",
        choices=("all", "last"),
    )
    too_long: str = option(
        "drop",
        "examples beyond the context: drop; cut_prompt: drop their oldest turns; refuse",
        choices=("drop", "cut_prompt", "refuse"),
    )
    row_tokens: int = option(
        0,
        "tokens of a row that examples share; 0 = twice the context (the context where they share "
        "none)",
        minimum=0,
        maximum=1_000_000,
    )
    # score
    score_prompts: int = option(
        256, "held-out prompts that are answered at each validation; 0 = none", minimum=0
    )
    max_new_tokens: int = option(
        192, "tokens of an answer, its end included", minimum=1, maximum=1_000_000
    )
    # adapters
    lora_rank: int = option(
        0, "train adapters of this rank instead of the weights (LoRA); 0 = all weights", minimum=0
    )
    lora_expert_rank: int = option(
        0, "rank of the experts' adapters; 0 = lora_rank / top_k, at least 1", minimum=0
    )
    lora_alpha: float = option(
        32.0, "scale of the adapters: alpha / rank times their product is added", above=0.0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset and self.data:
            raise ValueError("give either --dataset toy or --data, not both")
        for name in ("columns", "raw"):
            if getattr(self, name) and not self.data:
                raise ValueError(f"--{name} has no effect without --data: leave it out")
        if self.data and self.toy_examples != type(self).toy_examples:
            raise ValueError("--toy_examples has no effect with --data: leave it out")
        if self.raw and self.train_on != "all":
            raise ValueError("--train_on has no effect with --raw, which has one answer a row")
        for name in ("lora_expert_rank", "lora_alpha"):
            if getattr(self, name) != getattr(type(self), name) and not self.lora_rank:
                raise ValueError(f"--{name} has no effect without --lora_rank: leave it out")
        if self.document_mask:
            raise ValueError(
                "document_mask is for pre-training: no example sees another here, so leave it out"
            )

    @property
    def is_toy(self) -> bool:
        """Return whether the examples are the embedded tasks."""
        return not self.data

    def column_names(self) -> dict[str, str]:
        """Return our name -> the file's name of a column. Raise ValueError for other text."""
        return read_columns(self.columns)
