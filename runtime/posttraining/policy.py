"""Group relative policy optimization: a model samples answers, and learns from what they earn.

Read `Grpo` from the top. A sample is a prompt with its group of answers. A batch is made by
sampling with the weights of now (`RolloutLoader`), so nothing is fetched ahead. The mathematics is
in policy_loss.py, the sampling in rollouts.py, the reward in reward.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from config_model import (
    ModelConfig,
    TrainConfig,
    kv_cache_bytes_per_token,
    option,
    total_parameters,
)
from model import LLM, Output
from runtime.base.device import DTYPES, autocast, to_device
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.format import Checkpoint
from runtime.posttraining.config import PostTrainConfig, changed
from runtime.posttraining.conversations import ExampleFiles
from runtime.posttraining.groups import Group, Rolled, pack_groups
from runtime.posttraining.policy_loss import Clip, advantages_of, kl_terms, policy_loss
from runtime.posttraining.prompts import FilePrompts, Prompts, ToyPrompts, refilled
from runtime.posttraining.reward import load_reward, toy_reward
from runtime.posttraining.rollouts import MOST_ROWS, Sampler, without_ids
from runtime.posttraining.score import Exam, Score
from runtime.posttraining.tuning import FineTuning
from runtime.training.state import PER_STEP
from runtime.training.task import Batch

TOKEN, SEQUENCE = "token", "sequence"
# A score draws other numbers than a step.
SCORE_SEED = 1
# Settings of several updates from one sampling; with one update the ratio is 1.
OF_SEVERAL_UPDATES = ("ratio", "clip_low", "clip_high")


@dataclass(frozen=True)
class GrpoConfig(PostTrainConfig):
    """One run of reinforcement learning: prompts, groups of answers, a reward."""

    ckpt_dir: str = changed("ckpt_dir", "checkpoints/grpo")
    graph_dir: str = changed("graph_dir", "artifacts/graphs/grpo")
    batch_size: int = option(8, "prompts per micro-batch", minimum=1, maximum=1_000_000)
    grad_accum: int = changed("grad_accum", 1)
    max_steps: int = changed("max_steps", 80)
    schedule: str = changed("schedule", "constant")
    lr: float = changed("lr", 3e-4)
    min_lr: float = changed("min_lr", 3e-5)
    warmup_steps: int = changed("warmup_steps", 5)
    weight_decay: float = changed("weight_decay", 0.0)
    log_interval: int = changed("log_interval", 5)
    val_interval: int = changed("val_interval", 40)
    save_interval: int = changed("save_interval", 40)
    # the reward and the answers
    reward: str = option(
        "",
        "FILE.py:FUNCTION, called as function(messages, text, **columns): a number, or a dict of "
        "parts whose sum is the reward; empty: the embedded one",
    )
    group_size: int = option(8, "answers to each prompt", minimum=2, maximum=1_000_000)
    refill: int = option(
        0, "times that a prompt whose answers all earn the same is replaced by another", minimum=0
    )
    # the update
    advantage_std: bool = option(
        False, "divide a group's advantages by their standard deviation (the first GRPO)"
    )
    updates_per_rollout: int = option(
        1, "optimizer steps that the same answers serve", minimum=1, maximum=1_000
    )
    ratio: str = option(
        "token",
        "probability ratio that is clipped: of each token, or of the sequence (GSPO, which wants "
        "ranges of about 3e-4)",
        choices=(TOKEN, SEQUENCE),
    )
    clip_low: float = option(0.2, "lowest ratio is 1 - clip_low", above=0.0, maximum=1.0)
    clip_high: float = option(0.28, "highest ratio is 1 + clip_high", above=0.0)
    kl_coef: float = option(
        0.0, "weight of the KL divergence from the starting weights; 0 = off", minimum=0.0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data and not self.reward:
            raise ValueError(
                "answers to prompts of your own need a reward: give --reward FILE.py:FUNCTION"
            )
        defaults = {name: getattr(GrpoConfig, name) for name in OF_SEVERAL_UPDATES}
        if self.updates_per_rollout == 1:
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"--{name} has no effect with one update per rollout, whose ratio is 1: "
                        "leave it out, or raise --updates_per_rollout"
                    )
        if self.train_on != "all":
            raise ValueError("--train_on has no effect: the sampled answers are learned")
        if self.compile:
            raise ValueError(
                "compile wants batches of one shape, and answers fill as many rows as they need: "
                "leave it out"
            )
        if self.spike_sigmas:
            raise ValueError(
                "spike_sigmas is for a loss that falls, and a policy's does not: leave it out"
            )


class RolloutLoader:
    """Batches of answers, sampled when they are asked for.

    With several updates per rollout the same answers come again: their samples are those of the
    first of these steps. `groups` then belongs to the state of the run.
    """

    def __init__(self, task: Grpo, config: TrainConfig):
        self.task, self.config = task, config
        self.rollout, self.update, self.groups = -1, 0, dict[int, Group]()

    def state(self) -> dict:
        """Return the answers that further updates need, as plain JSON values."""
        if self.update + 1 >= self.task.config.updates_per_rollout:
            return {}
        groups = {str(sample): group.state() for sample, group in self.groups.items()}
        return {"rollout": self.rollout, "groups": groups}

    def restore(self, state: dict) -> None:
        """Take what `state` returned."""
        self.rollout = state.get("rollout", -1)
        self.groups = {
            int(sample): Group.of(own, self.task.prompts.asked(self.config.seed, own["number"]))
            for sample, own in state.get("groups", {}).items()
        }

    def batch(self, first_sample: int) -> Batch:
        """Return the batch of batch_size prompts from `first_sample` on; see pack_groups."""
        task, config = self.task, self.config
        per_step = config.batch_size * config.grad_accum
        step, offset = divmod(first_sample, per_step)
        rollout, self.update = divmod(step, task.config.updates_per_rollout)
        if rollout != self.rollout or task.config.updates_per_rollout == 1:
            self.rollout, self.groups = rollout, {}
        first = rollout * per_step + offset
        samples = range(first, first + config.batch_size)
        missing = [sample for sample in samples if sample not in self.groups]
        if missing:
            self.groups |= zip(missing, task.roll(missing, config), strict=True)
        groups = [self.groups[sample] for sample in samples]
        task.told.add(groups, is_new=bool(missing))
        keeps = bool(task.config.kl_coef)
        rolled = pack_groups(groups, task.row_tokens, task.shares_rows, keeps)
        self._add_log_probs(rolled)
        numbers_K = task.told.numbers(groups, config.grad_accum)
        assert task.model is not None
        dtype = torch.promote_types(task.model.embed.weight.dtype, torch.float32)
        return (*rolled.batch(dtype), torch.tensor(numbers_K, dtype=torch.float32))

    def _add_log_probs(self, rolled: Rolled) -> None:
        """Give answers the log-probabilities that their later updates are compared with."""
        task = self.task
        if task.config.updates_per_rollout > 1 and rolled.lacks("old"):
            assert task.model is not None
            rolled.store("old", task.log_probs(task.model, rolled.packed))
        if task.config.kl_coef and rolled.lacks("reference"):
            assert task.reference is not None
            rolled.store("reference", task.log_probs(task.reference, rolled.packed))


class Told:
    """What is logged and said of rollouts: means of a step, and what nobody earned.

    names: of the numbers, in order. A part of the reward that is met later is appended, and a step
    without it keeps its last mean.
    """

    BASIC = ("reward", "ended", "with_signal", "answer_tokens", "entropy")

    def __init__(self) -> None:
        self.part_means: dict[str, float] = {}
        self.tried, self.earned = Counter[str](), Counter[str]()

    @property
    def names(self) -> list[str]:
        return [name + PER_STEP for name in (*self.BASIC, *self.part_means)]

    def add(self, groups: Sequence[Group], is_new: bool) -> None:
        """Note what the parts of some groups earned."""
        by_part: dict[str, list[float]] = {}
        for group in groups:
            for earned in group.earned:
                for name, value in earned.parts.items():
                    by_part.setdefault(name, []).append(value)
        for name, values in by_part.items():
            self.part_means[name] = sum(values) / len(values)
            if is_new:
                self.tried[name] += len(values)
                self.earned[name] += sum(value > 0 for value in values)

    def numbers(self, groups: Sequence[Group], grad_accum: int) -> list[float]:
        """Return the means of a micro-batch in the order of `names`, as its share of a step's."""
        answers = [answer for group in groups for answer in group.answers]
        log_probs = [value for answer in answers for value in answer.log_probs]
        means = [
            sum(earned.total for group in groups for earned in group.earned) / len(answers),
            sum(answer.ended for answer in answers) / len(answers),
            sum(group.has_signal for group in groups) / len(groups),
            len(log_probs) / len(answers),
            -sum(log_probs) / len(log_probs),
        ]
        return [value / grad_accum for value in (*means, *self.part_means.values())]

    def lines(self) -> list[str]:
        """Return a line for each part that nobody earned since the last call."""
        lines = [
            f"{name}: 0 of {tried:,} answers earned it, no gradient"
            for name, tried in self.tried.items()
            if not self.earned[name]
        ]
        self.tried, self.earned = Counter(), Counter()
        return lines


class Grpo(FineTuning):
    """Sample groups of answers, and make likelier what earns more than its group's mean."""

    kind, command = "grpo", "python -m scripts.grpo"
    fetch_ahead = False
    balances = False
    is_likelihood = False
    takes_ranks = False

    def __init__(self, config: GrpoConfig, source: Checkpoint | None):
        super().__init__(config, source)
        assert source is not None, "FineTuning refuses to start without weights"
        self.config: GrpoConfig = config
        self.reward = load_reward(config.reward) if config.reward else toy_reward()
        self.prompts = self._prompts()
        self.fingerprint = self.prompts.fingerprint
        for asked in self.prompts.of_files():
            self.reward.check_columns(asked.prompt)
        self.reward.check(self.prompts.asked(config.seed, 0).prompt)
        self.stop_ids, self.banned_ids = self._special_ids(source)
        rows = config.group_size * min(self.context, self.longest + config.max_new_tokens)
        self.rows_per_sample = math.ceil(rows / self.context)
        self.clip = Clip(config.clip_low, config.clip_high, config.ratio == SEQUENCE)
        self.exam = self._exam()
        self.model: LLM | None = None
        self.reference: LLM | None = None
        self.told = Told()
        self._sampler: Sampler | None = None
        # The newest loader, and the settings that the plan gave it.
        self._loader: RolloutLoader | None = None
        self._run: TrainConfig = config
        # Settled by `planned`, where "auto" has become a dtype.
        self.dtype = DTYPES.get(config.dtype, torch.float32)
        self._restored: dict = {}
        self.steps = self.idle_steps = 0

    # -------------------------------------------------------------------------- the data
    @property
    def longest(self) -> int:
        """Tokens of a prompt that leave room for an answer."""
        return self.context - self.config.max_new_tokens

    def _prompts(self) -> Prompts:
        config = self.config
        if self.longest < 1:
            raise ValueError(
                f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in a context "
                f"of {self.context} tokens: lower it"
            )
        if config.is_toy:
            return ToyPrompts(self.tokenizer, self.longest, config.toy_examples)
        files = ExampleFiles(config.data, "prompts", config.column_names())
        return FilePrompts(files, self.tokenizer, self.longest, config.too_long, config.raw)

    def _special_ids(self, source: Checkpoint) -> tuple[list[int], list[int]]:
        """Return (the ids that end an answer, those that are never drawn)."""
        size = self.adapted(source.model_config, source).vocabulary_size
        stops = list(self.tokenizer.stop_ids)
        padding = range(self.tokenizer.vocabulary_size, size)
        banned = {*self.tokenizer.banned_ids, *padding}
        if self.tokenizer.end_of_text_id is not None:
            banned.add(self.tokenizer.end_of_text_id)
        return stops, sorted(id_ for id_ in banned if id_ < size and id_ not in stops)

    def _exam(self) -> Exam | None:
        """Return the embedded score, and say which number makes best.pt."""
        config = self.config
        if not config.score_prompts:
            return None
        if config.is_toy and not config.reward:
            self.best_score = "requests pass@1"
            return Exam(self.tokenizer, config.score_prompts, config.max_new_tokens)
        if self.prompts.held_out:
            self.best_score = "reward"
        return None

    def loader(self, model_config: ModelConfig, config: TrainConfig) -> RolloutLoader:
        """Return the stream of rollouts. Raise ValueError for a model that trains with dropout."""
        if model_config.dropout:
            raise ValueError(
                "dropout would make log-probabilities of training others than those of sampling: "
                "give --dropout 0"
            )
        loader = RolloutLoader(self, config)
        loader.restore(self._restored)
        self._loader, self._run = loader, config
        return loader

    def samples_per_epoch(self, model_config: ModelConfig) -> int:
        return len(self.prompts) * self.config.updates_per_rollout

    def count(self, batch: Batch) -> int:
        return int(batch[-2])

    # -------------------------------------------------------------------------- rollouts
    def planned(self, config: TrainConfig, dtype: torch.dtype) -> None:
        super().planned(config, dtype)
        self.dtype, self.model, self._sampler = dtype, None, None

    def started(self, model: LLM, ranks: Ranks = ONE_PROCESS) -> None:
        super().started(model, ranks)
        self.model = model
        if not self.config.kl_coef or self.reference is not None:
            return
        try:
            reference = self.starting_model(model, self.dtype)
        except ValueError as error:
            raise ValueError(f"{error}, and --kl_coef compares with it: put it back") from None
        self.reference = reference.eval().requires_grad_(False)

    def sampler(self) -> Sampler:
        """Return what samples with the weights of now, in the dtype that they are trained in.

        Ask again after each update: adapters are merged here.
        """
        assert self.model is not None, "fit starts a task before it asks for batches"
        plain = self.plain(self.model)
        if self._sampler is None or self._sampler.model is not plain:
            self._sampler = Sampler(
                plain,
                stop_ids=self.stop_ids,
                banned_ids=self.banned_ids,
                max_new_tokens=self.config.max_new_tokens,
                dtype=self.dtype,
                # A score has many prompts, and should not leave a step more rows than it has.
                most_rows=min(MOST_ROWS, self._run.batch_size * self.config.group_size),
            )
        return self._sampler

    def roll(self, samples: Sequence[int], config: TrainConfig) -> list[Group]:
        """Return a group of answers with rewards for each sample.

        With `refill`, a group without signal is replaced by one of another prompt, so many times.
        """
        groups = self._roll(samples, config)
        for again in range(1, self.config.refill + 1):
            places = [i for i, group in enumerate(groups) if not group.has_signal]
            if not places:
                break
            others = self._roll([refilled(samples[i], again) for i in places], config)
            for i, other in zip(places, others, strict=True):
                # The last try stays, so that a batch is never empty.
                groups[i] = other
        return groups

    def _roll(self, numbers: Sequence[int], config: TrainConfig) -> list[Group]:
        asked = [self.prompts.asked(config.seed, number) for number in numbers]
        sampler = self.sampler()
        size = self.config.group_size
        answers = sampler.sample([one.ids for one in asked], size, config.seed, numbers)
        groups = []
        for number, one, own in zip(numbers, asked, answers, strict=True):
            earned = [
                self.reward(one.prompt, self.text(answer.ids), answer.ended) for answer in own
            ]
            advantages = advantages_of([each.total for each in earned], self.config.advantage_std)
            groups.append(Group(number, one, own, earned, advantages))
        return groups

    def text(self, ids: list[int]) -> str:
        """Return an answer's text, without its stop id."""
        return self.tokenizer.decode([id_ for id_ in ids if id_ not in self.stop_ids])

    # -------------------------------------------------------------------------- the loss
    def forward(self, model: LLM, packed: Batch) -> Output:
        """Return the pass over packed answers, whose softmax leaves out what is never drawn."""
        ids_BT, targets_BT, starts_BT, rows_M = packed[:4]
        with without_ids(model, torch.tensor(self.banned_ids, device=ids_BT.device)):
            return model(ids_BT, targets_BT, starts_BT=starts_BT, rows_M=rows_M, per_token=True)

    @torch.no_grad()
    def log_probs(self, model: LLM, packed: Batch) -> Tensor:
        """Return the log-probabilities [M] of packed answers, on the CPU."""
        device = model.embed.weight.device
        with autocast(device, self.dtype):
            out = self.forward(model, to_device(packed, device))
        assert out.log_probs is not None
        return out.log_probs.cpu()

    def loss(self, model: LLM, batch: Batch) -> Output:
        *packed, advantages_S, sampled_M, old_M, reference_M, num_tokens, numbers_K = batch
        segments_M = packed[4]
        out = self.forward(model, tuple(packed))
        log_probs_M = out.log_probs
        assert log_probs_M is not None
        share = 1 / (len(log_probs_M) * self._run.grad_accum)
        old = old_M if self.config.updates_per_rollout > 1 else None
        total, clipped = policy_loss(log_probs_M, advantages_S, segments_M, old, self.clip)
        metrics = dict(zip(self.told.names, numbers_K, strict=False))
        # Under the weights that sampled.
        same_M = log_probs_M.detach() if old is None else old
        gap_M = (same_M - sampled_M).abs()
        metrics["sampler_gap" + PER_STEP] = gap_M.sum() * share
        if old is not None:
            metrics["clipped" + PER_STEP] = clipped.detach() * share
        if self.config.kl_coef:
            terms_M = kl_terms(log_probs_M, reference_M)
            total = total + self.config.kl_coef * terms_M.sum()
            metrics["kl" + PER_STEP] = terms_M.detach().sum() * share
        return out._replace(cross_entropy_sum=total, num_targets=num_tokens, metrics=metrics)

    def is_idle(self, batches: Sequence[Batch]) -> bool:
        """Return whether no group of a step has a signal; say so, and what nobody earned."""
        self.steps += 1
        is_idle = not self.config.kl_coef and not any(bool(batch[5].any()) for batch in batches)
        if is_idle:
            self.idle_steps += 1
            tqdm.write(
                "note     all answers to each prompt earned the same: no update, "
                f"{self.idle_steps:,} such step{'s' * (self.idle_steps != 1)} so far"
            )
        if self.steps % self.config.log_interval == 0:
            for line in self.told.lines():
                tqdm.write(f"note     {line}")
        return is_idle

    # -------------------------------------------------------------------------- the run
    def needed_bytes(self, needed: dict[str, int], model_config: ModelConfig) -> dict[str, int]:
        """Add what the answers of a micro-batch hold while they are sampled, and a reference."""
        needed = super().needed_bytes(needed, model_config)
        own = self.config
        rows = min(MOST_ROWS, own.batch_size * own.group_size)
        token_bytes = kv_cache_bytes_per_token(model_config, 4)
        needed = needed | {"answers": rows * model_config.context_length * token_bytes}
        if own.kl_coef:
            needed = needed | {"reference": 4 * total_parameters(model_config)}
        return needed

    def state(self) -> dict:
        """Return counts, and the answers that serve further updates."""
        state = {
            "steps": self.steps,
            "idle_steps": self.idle_steps,
            "part_means": self.told.part_means,
            "reward": self.reward.digest,
        }
        return state | ({} if self._loader is None else self._loader.state())

    def restore(self, state: dict) -> None:
        self._restored = state
        self.steps, self.idle_steps = state.get("steps", 0), state.get("idle_steps", 0)
        # Without what a trial before the first step has seen.
        self.told = Told()
        self.told.part_means = dict(state.get("part_means", {}))
        if state and state["reward"] != self.reward.digest:
            tqdm.write(f"note     {self.config.reward} is another file than when the run was saved")

    def score(self, model: LLM) -> dict[str, float]:
        numbers = self.base_loss(model)
        if self.exam is not None:
            return numbers | self.numbers_of(self.exam.score(self.plain(model)))
        if not self.best_score:
            return numbers
        return numbers | self.numbers_of(self._held_out_score())

    def _held_out_score(self) -> Score:
        """Return what one answer to each held-out prompt earns, drawn with the same numbers."""
        asked = self.prompts.held_out[: self.config.score_prompts]
        sampler = self.sampler()
        answers = [group[0] for group in sampler.sample([one.ids for one in asked], 1, SCORE_SEED)]
        earned = [
            self.reward(one.prompt, self.text(answer.ids), answer.ended)
            for one, answer in zip(asked, answers, strict=True)
        ]
        score = Score()
        score.means["reward"] = sum(each.total for each in earned) / len(earned)
        for name in dict.fromkeys(name for each in earned for name in each.parts):
            values = [each.parts[name] for each in earned if name in each.parts]
            score.means[f"reward: {name}"] = sum(values) / len(values)
        score.count("ended", [float(answer.ended) for answer in answers])
        score.means["length"] = sum(len(answer.ids) for answer in answers) / len(answers)
        return score

    def describe(self, model_config: ModelConfig, config: TrainConfig) -> list[str]:
        first, *more = self.prompts.lines
        own, prompts = self.config, config.batch_size * config.grad_accum
        updates = own.updates_per_rollout
        lines = [
            f"prompts  {first}; {len(self.prompts.held_out):,} held out",
            *(f"note     {line}" for line in more),
            f"steps    {config.max_steps:,} steps of {prompts:,} prompts x {own.group_size} answers"
            + (f", each for {updates} updates" if updates > 1 else ""),
            f"reward   {self.reward.where}; {self.reward.rule}",
        ]
        return lines + super().describe(model_config, config)
