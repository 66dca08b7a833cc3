"""The settings of an evaluation, which are also the flags of scripts/evaluate.py."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from config_model import PredictConfig, check_fields, option
from runtime.data.tokenizer import NONE
from runtime.evaluation.requirements import Requirement, read_requirement

# Parts of a report that held-out text gives.
OF_TEXT = {"bits_per_byte", "text", "calibration", "loss"}


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and how."""

    ckpt: str = option(
        "checkpoints/best.pt", "checkpoint to judge (our format or the original implementation's)"
    )
    against: str = option(
        "", "second checkpoint: the paired differences on the same documents and questions"
    )
    # the texts
    files: tuple = option(
        (),
        "held-out text: files, folders or quoted patterns, in the formats of prepare_data.py "
        "(default: the validation shards in data_dir)",
    )
    data_dir: str = option("data", "folder of prepare_data.py, whose val shards are read")
    text_column: str = option("text", "column that holds the text of files with columns")
    documents: int = option(
        2000, "documents to read, the first of the files; 0 = all", minimum=0, maximum=10**9
    )
    stride: int = option(
        0,
        "documents longer than the context are read in windows that begin so many tokens apart: "
        "smaller is slower and gives each token more context; 0 = the context",
        minimum=0,
        maximum=16_777_216,
    )
    # what else is measured
    tasks: tuple = option(
        (), "multiple choice: JSON lines, one task a file; docs/evaluation.md has the forms"
    )
    own_tasks: bool = option(False, "also tasks that are made of the held-out text")
    questions: int = option(
        0,
        "questions of each task, evenly spread; 0 = all (own_tasks: 500)",
        minimum=0,
        maximum=10**9,
    )
    stories: int = option(
        0,
        "also continuations of so many held-out stories, next to how their authors continued them",
        minimum=0,
        maximum=10**6,
    )
    train_files: tuple = option(
        (), "with --stories: the training text, in which copies are looked for"
    )
    lm_eval: str = option(
        "",
        'tasks of lm-evaluation-harness (pip install -e ".[lm-eval]"): names or YAML files, '
        "with commas between them",
    )
    chat: bool = option(
        False, "also the exercises of scripts.sft and scripts.grpo; for models trained on chats"
    )
    experts: bool = option(False, "also what the experts of each block specialise in")
    expert_off: int = option(
        0,
        "also the loss without each expert, on so many documents; reads them once for each expert",
        minimum=0,
        maximum=10**6,
    )
    # the report
    require: tuple = option(
        (),
        'what must hold, such as "bits_per_byte<=0.80"; else the exit code is 1; may be given more '
        "than once",
    )
    json: str = option("", "file to write the report to, as JSON")
    markdown: str = option("", "file to write the report to, as Markdown")
    html: str = option("", "file to write the report to, as a page with plots")
    resamples: int = option(
        2000, "resamples of the documents, for the intervals", minimum=100, maximum=1_000_000
    )
    # how it runs
    tokenizer: str = option("", "tokenizer for a checkpoint without one, as predict.py has it")
    device: str = option("auto", "auto, cuda, cuda:N, mps or cpu")
    dtype: str = option(
        "float32",
        "dtype of weights and compute; auto = the best for the device",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quantize: str = option(
        "none",
        "int8, int4: judge the model as predict.py --quantize runs it",
        choices=("none", "int8", "int4"),
    )
    c_kernel: bool = option(True, "CPU: score with the C kernel if it gives the model's logits")
    num_threads: int = option(
        0, "CPU threads; 0 = all cores available to this process", minimum=0, maximum=4_096
    )

    def __post_init__(self):
        check_fields(self)
        if self.tokenizer == NONE:
            raise ValueError(
                "--tokenizer none: bits per byte and tasks need text; name the model's tokenizer"
            )
        if self.expert_off and self.quantize != "none":
            raise ValueError("--expert_off needs weights that are not packed: omit --quantize")
        if self.train_files and not self.stories:
            raise ValueError("--train_files has no effect without --stories: leave it out")
        if not self.has_text and (why := self._needs_text()):
            raise ValueError(
                f"there is no {self.data_dir}/val, and {why} needs held-out text: give --files, "
                "or --data_dir of prepare_data.py"
            )
        if self.lm_eval and not self.lm_eval_tasks():
            raise ValueError(f"--lm_eval {self.lm_eval!r} names no task: give names or .yaml files")
        self.requirements()
        self._check_outputs()

    def _check_outputs(self) -> None:
        """Raise ValueError for a file that the report cannot be written to.

        runtime/evaluation/inputs.py compares them with the files that are read.
        """
        taken: dict[str, str] = {}
        for name, path in self.outputs().items():
            said, folder = f"--{name} {path}", os.path.dirname(path) or "."
            if not os.path.isdir(folder):
                raise ValueError(f"{said}: there is no folder {folder}")
            if os.path.isdir(path):
                raise ValueError(f"{said} is a folder: name a file in it")
            if not os.access(folder, os.W_OK):
                raise ValueError(f"{said}: the folder {folder} cannot be written to")
            if owner := taken.get(os.path.realpath(path)):
                raise ValueError(f"{said} is the file of {owner}: give each its own")
            taken[os.path.realpath(path)] = f"--{name}"

    def outputs(self) -> dict[str, str]:
        """Return flag -> the file that the report is written to."""
        return {
            name: path for name in ("json", "markdown", "html") if (path := getattr(self, name))
        }

    @property
    def has_text(self) -> bool:
        """Whether there is held-out text to read."""
        return bool(self.files) or os.path.isdir(os.path.join(self.data_dir, "val"))

    def _needs_text(self) -> str:
        """Return a flag that was given and needs held-out text, or "" if none was."""
        wants: dict[str, object] = {"--against": self.against and not self.tasks}
        wants |= {"--own_tasks": self.own_tasks}
        wants |= {"--experts": self.experts, "--expert_off": self.expert_off}
        wants |= {"--stories": self.stories}
        given = [flag for flag, value in wants.items() if value]
        if given or self.tasks or self.lm_eval or self.chat:
            return next(iter(given), "")
        return "an evaluation without --tasks, --lm_eval and --chat"

    @property
    def has_questions(self) -> bool:
        """Whether two checkpoints are asked the same questions, which can be compared."""
        return bool(self.tasks or self.own_tasks)

    def lm_eval_tasks(self) -> list[str]:
        """Return the names in --lm_eval."""
        return [name.strip() for name in self.lm_eval.split(",") if name.strip()]

    def parts(self) -> set[str]:
        """Return the parts that the report will have."""
        parts = set(OF_TEXT) if self.has_text else set()
        if self.against:
            parts |= {"against"} | ({"comparison"} if self.has_text else set())
            parts |= {"compared_tasks"} if self.has_questions else set()
        parts |= {"tasks"} if self.tasks or self.own_tasks or self.lm_eval else set()
        parts |= {name for name in ("stories", "chat") if getattr(self, name)}
        return parts | ({"experts"} if self.experts or self.expert_off else set())

    def sections(self) -> dict[str, list[str]]:
        """Return the names of the sections that each part with several may have.

        Without pairs of experts, or experts that two models share, a note says why.
        """
        asked: dict[str, dict[str, object]] = {
            "tasks": {"files": self.tasks, "own": self.own_tasks, "lm_eval": self.lm_eval},
            "compared_tasks": {"files": self.tasks, "own": self.own_tasks},
            "experts": {
                "specialities": self.experts,
                "together": self.experts,
                "shared": self.experts and self.against,
                "off": self.expert_off,
            },
            "chat": {"exercises": self.chat},
        }
        asked["against.tasks"] = asked["compared_tasks"] if self.against else {}
        return {
            part: [name for name, flag in names.items() if flag] for part, names in asked.items()
        }

    def requirements(self) -> list[Requirement]:
        """Return what --require says. Raise ValueError."""
        parts = self.parts()
        return [read_requirement(text, parts) for text in self.require]

    def predict(self, ckpt: str, tokenizer: str = "") -> PredictConfig:
        """Return the settings that load a checkpoint. tokenizer: the name of its own, or ""."""
        shared = {f.name for f in dataclasses.fields(PredictConfig)} & {
            "device",
            "dtype",
            "quantize",
            "c_kernel",
            "num_threads",
        }
        values = {name: getattr(self, name) for name in sorted(shared)}
        return PredictConfig(ckpt=ckpt, tokenizer=tokenizer, quiet=True, **values)
