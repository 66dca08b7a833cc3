"""A small dense model on one megabyte of text: our step against a plain GPT in PyTorch.

    python -m benchmarks.plain_gpt --name nano_gpt --num_threads 2
    python -m benchmarks.plain_gpt --name nano_gpt_compiled --compiled

The text is that of runtime/data/toy_stories.py, a token a character. Both sides have the same
width, depth, heads, context, batch, tokens, optimizer, clipping and threads. `PlainGPT` is what one
writes for it: learned positions, LayerNorm, fused QKV, F.scaled_dot_product_attention, a GELU MLP,
all logits at once, torch's fused AdamW. Ours is a model of one expert in `train.fit`, with RMSNorm,
RoPE, its statistics and its checks for skipped steps. They take turns in one process; a sample
during which other processes used more than 0.15 core is measured again. Both losses must fall
alike. Saved: benchmarks/results/plain_gpt_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()  # what it sets is read when torch loads

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Samples, alternate_undisturbed, save_results, summary
from benchmarks.train import Ours, Setting
from config_model import ModelConfig, TrainConfig, total_parameters
from runtime.base import cli
from runtime.base.device import choose_device, device_name, synchronize
from runtime.data import toy_stories
from runtime.data.loader import WindowLoader

WARM_UP_STEPS = 10
# A part of the first loss that both sides must have lost, and how far ours may be above the plain
# side's then, or below: it learns faster, and was 16 % below when many samples were measured again.
FALL, ABOVE, BELOW = 0.15, 0.15, 0.3


class Characters:
    """Toy stories of so many characters in the place of a split's shards, a token a character."""

    end_of_text_id, folder = 0, "toy stories"

    def __init__(self, characters: int):
        stories, length = [], 0
        while length < characters:
            stories.append(toy_stories.story(len(stories)))
            length += len(stories[-1]) + 1
        text = "\n".join(stories)[:characters]
        self.alphabet = sorted(set(text))
        id_of = {character: i for i, character in enumerate(self.alphabet)}
        self.vocabulary_size, self.num_tokens = len(self.alphabet), len(text)
        self._ids = np.array([id_of[character] for character in text], dtype=np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        """As TokenShards.read."""
        return self._ids[start : start + count]


# ------------------------------------------------------------------------------- what one writes
class PlainBlock(nn.Module):
    """Causal attention and a GELU MLP, each after a LayerNorm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, self.H = config.d_model, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, C, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        qkv = self.qkv(self.norm1(x_BTC)).split(C, dim=2)
        q, k, v = (x.view(B, T, self.H, C // self.H).transpose(1, 2) for x in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.down(F.gelu(self.up(self.norm2(x_BTC))))


class PlainGPT(nn.Module):
    """A GPT with learned positions and a tied head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        V, T, C = config.vocabulary_size, config.context_length, config.d_model
        self.embed, self.positions = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.transformer_blocks))
        self.norm = nn.LayerNorm(C, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("out.weight", "down.weight"))
                depth = 2 * config.transformer_blocks if is_residual else 1
                nn.init.normal_(parameter, std=config.init_std * depth**-0.5)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTC = self.embed(ids_BT) + self.positions(positions_T)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits = F.linear(self.norm(x_BTC), self.embed.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets_BT.view(-1))


class Plain:
    """PlainGPT in the plain loop that one writes for it."""

    def __init__(self, setting: Setting, compiled: bool):
        config, train = setting.model_config, setting.config
        torch.manual_seed(train.seed)
        with setting.device:
            self.module = PlainGPT(config)
        self.model = torch.compile(self.module) if compiled else self.module
        parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2]},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.setting, self.samples_seen = setting, 0
        self.ids = torch.from_numpy(setting.tokens.read(0, setting.tokens.num_tokens))
        self.windows = WindowLoader(
            setting.tokens, config.context_length, train.batch_size, train.seed
        )

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the step's inputs and targets, the windows that our loader takes."""
        T = self.setting.model_config.context_length
        last = len(self.ids) - T - 1
        samples = range(self.samples_seen, self.samples_seen + self.setting.config.batch_size)
        starts = [min(self.windows.window(sample) * T, last) for sample in samples]
        inputs = torch.stack([self.ids[start : start + T] for start in starts])
        targets = torch.stack([self.ids[start + 1 : start + T + 1] for start in starts])
        return inputs.to(self.setting.device), targets.to(self.setting.device)

    def run(self, steps: int) -> float:
        """Train for `steps` steps more; return their mean cross-entropy."""
        total = torch.zeros((), device=self.setting.device)
        for _ in range(steps):
            loss = self.model(*self.batch())
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), self.setting.config.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            self.samples_seen += self.setting.config.batch_size
        return (total / steps).item()


# ----------------------------------------------------------------------------------- the comparison
def make_setting(args: argparse.Namespace) -> Setting:
    """Return the sizes and settings that both sides share."""
    device, tokens = choose_device(args.device), Characters(args.characters)
    model_config = ModelConfig(
        d_model=args.d_model,
        transformer_blocks=args.blocks,
        context_length=args.context_length,
        vocabulary_size=tokens.vocabulary_size,
        num_heads=args.heads,
        num_kv_heads=args.heads,
        out_proj_bias=False,
        use_attention_bias=False,
        num_experts=1,
        top_k=1,
        d_ff=4 * args.d_model,
        expert_activation="gelu",
        expert_bias=False,
        tie_embeddings=True,
        head_bias=False,
    )
    config = TrainConfig(
        batch_size=args.batch_size,
        grad_accum=1,
        lr=1e-3,
        schedule="constant",
        warmup_steps=0,
        beta2=0.99,
        dtype="float32",
        seed=args.seed,
    )
    return Setting(model_config, config, device, torch.float32, tokens)


def build(setting: Setting, compiled: bool) -> dict[str, Ours | Plain]:
    """Return the sides by name, ours first."""
    sides: dict[str, Ours | Plain] = {
        "ours": Ours(setting, setting.model_config),
        "plain": Plain(setting, compiled=False),
    }
    if compiled:
        sides["ours_compiled"] = Ours(setting, setting.model_config, compiled=True)
        sides["plain_compiled"] = Plain(setting, compiled=True)
    return sides


def check_losses(first: dict[str, float], last: dict[str, float]) -> None:
    """Raise ValueError unless all sides' losses have fallen, and about as far."""
    if stuck := [name for name in last if last[name] > (1 - FALL) * first[name]]:
        raise ValueError(f"the loss of {stuck[0]} does not fall: {first[stuck[0]]}, {last}")
    ours = [loss for name, loss in last.items() if name.startswith("ours")]
    plain = [loss for name, loss in last.items() if name.startswith("plain")]
    if max(ours) > (1 + ABOVE) * min(plain) or min(ours) < (1 - BELOW) * max(plain):
        raise ValueError(f"the sides do not learn alike, their last losses are {last}")


def measure(
    sides: dict[str, Ours | Plain], setting: Setting, repeats: int, steps: int
) -> tuple[dict[str, Samples], dict[str, dict[str, float]]]:
    """Return seconds a step of each side, taken in turns, and its first and last losses (nats)."""
    first = {name: side.run(1) for name, side in sides.items()}
    for side in sides.values():
        side.run(WARM_UP_STEPS - 1)

    def sample(side: Ours | Plain) -> Callable[[], float]:
        def seconds() -> float:
            synchronize(setting.device)
            started = time.perf_counter()
            side.run(steps)
            synchronize(setting.device)
            return (time.perf_counter() - started) / steps

        return seconds

    samples = alternate_undisturbed({name: sample(side) for name, side in sides.items()}, repeats)
    # Discarded samples taught one side more than another.
    most = max(seen(side) for side in sides.values())
    last = {}
    for name, side in sides.items():
        if missing := (most - seen(side)) // setting.config.batch_size:
            side.run(missing)
        last[name] = side.run(steps)
    return samples, {name: {"first": first[name], "last": last[name]} for name in sides}


def seen(side: Ours | Plain) -> int:
    """Return the sequences that a side has trained on."""
    return side.state.samples_seen if isinstance(side, Ours) else side.samples_seen


def flags() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/plain_gpt_NAME.json"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)"
    )
    for name, default, what in (
        ("num_threads", 0, "CPU threads; 0 = PyTorch's choice"),
        ("characters", 1_000_000, "characters of text"),
        ("context_length", 64, "tokens of a sequence"),
        ("batch_size", 12, "sequences a step"),
        ("d_model", 128, "width of the residual stream (features)"),
        ("blocks", 4, "blocks"),
        ("heads", 4, "attention heads"),
        ("repeats", 9, "samples of each side"),
        ("steps", 20, "steps in a sample"),
        ("seed", 42, "seed of initial weights and data order"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: {default})"
        )
    parser.add_argument("--compiled", action="store_true", help="also both sides compiled")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    if min(args.repeats, args.steps) < 1:
        raise ValueError(
            f"repeats and steps must be at least 1, not {args.repeats} and {args.steps}"
        )
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    # As train.py does, for both sides.
    process.keep_freed_memory()
    setting = make_setting(args)
    sides = build(setting, args.compiled)
    samples, losses = measure(sides, setting, args.repeats, args.steps)
    check_losses(
        {name: loss["first"] for name, loss in losses.items()},
        {name: loss["last"] for name, loss in losses.items()},
    )
    variants = {}
    for name, sample in samples.items():
        plain = samples["plain_compiled" if name.endswith("_compiled") else "plain"]
        variants[name] = {
            "seconds_per_step": summary(sample.values),
            "x_plain": statistics.median(plain.values) / statistics.median(sample.values),
            "losses": losses[name],
            "discarded": sample.discarded,
            "disturbed": sample.disturbed,
        }
        print(
            f"{name:14} {1000 * variants[name]['seconds_per_step']['median']:8.2f} ms a step  "
            f"{variants[name]['x_plain']:5.2f} x plain  loss {losses[name]['first']:.3f} -> "
            f"{losses[name]['last']:.3f}{'  (disturbed)' if sample.disturbed else ''}"
        )
    save_results(
        f"plain_gpt_{args.name}",
        {
            "device": device_name(setting.device),
            "threads": torch.get_num_threads(),
            "model": dataclasses.asdict(setting.model_config),
            "parameters": total_parameters(setting.model_config),
            "plain_parameters": sum(p.numel() for p in sides["plain"].module.parameters()),
            "characters": setting.tokens.num_tokens,
            "batch_size": args.batch_size,
            "repeats": args.repeats,
            "steps": args.steps,
            "variants": variants,
        },
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
