"""Training and decoding speed of one configuration, on real shards, through the same code that
users run.

    python -m benchmarks.end_to_end --name small_cpu --data_dir data --d_model 128 \\
        --transformer_blocks 4 --num_experts 8 --context_length 256 --max_steps 60
    python -m benchmarks.end_to_end --name default_gpu --data_dir data --compile \\
        --dtype bfloat16 --batch_size 16 --grad_accum 1 --max_steps 60 --warmup_steps 10

Takes every flag of train.py; --data_dir defaults to the environment variable GPTOSS_DATA. Nothing
is saved but benchmarks/results/end_to_end_NAME.json: tokens/s of the training steps (median; the
first ones, which warm up, left out), MFU where the device's peak is known, peak memory, the losses,
and tokens/s of prefill and greedy decoding at batch 1.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time

import torch

import train
from benchmarks.common import save_results, summary
from config_model import (
    ModelConfig,
    TrainConfig,
    active_parameters,
    flops_per_token,
    total_parameters,
)
from model import LLM
from runtime.base import cli
from runtime.base.device import device_name, peak_flops, peak_memory_bytes, synchronize
from runtime.inference.decoder import Decoder, generate
from runtime.kernels.choose import choose_kernels
from runtime.training.plan import TrainPlan, check_memory, describe, initial_state, make_plan
from runtime.training.setup import set_up
from runtime.training.task import GivenTask

WARM_UP_STEPS = 5


def measure_training(plan: TrainPlan) -> tuple[torch.nn.Module, dict]:
    """Run the plan's steps, logging each; returns the model and its figures."""
    model, optimizer, _ = set_up(plan, train.forward_backward)
    state = initial_state(plan)
    batches, loss_fn = plan.task.validation(plan.model_config, plan.config), plan.task.loss
    before = train.evaluate(model, batches, loss_fn, plan.dtype)
    records: list[dict] = []
    # The plan's task without its validation, which is measured apart.
    task = GivenTask(plan.task.loader(plan.model_config, plan.config), loss_fn)
    train.fit(
        model,
        task,
        plan.config,
        train.Hooks(on_log=records.append),
        optimizer=optimizer,
        state=state,
        dtype=plan.dtype,
    )
    speeds = [r["tokens_per_sec"] for r in records[WARM_UP_STEPS:]]
    peak = peak_flops(plan.device, plan.dtype)
    return model, {
        "tokens_per_sec": summary(speeds),
        "mfu": peak and statistics.median(speeds) * 3 * flops_per_token(plan.model_config) / peak,
        "peak_memory_bytes": peak_memory_bytes(plan.device),
        "losses": [round(r["loss"], 4) for r in records],
        "validation_loss": {
            "before": before,
            "after": train.evaluate(model, batches, loss_fn, plan.dtype),
        },
        "skipped_steps": state.skipped_steps,
    }


def measure_decoding(
    model: torch.nn.Module, plan: TrainPlan, prompt_tokens: int, new_tokens: int, repeats: int
) -> dict:
    """Tokens/s of a prefill of `prompt_tokens` and of greedy decoding after it, batch 1, real text
    as the prompt.

    As predict.py does it: by runtime/inference/decoder.py, weights in the arithmetic's dtype
    (`model` is converted and stays so).
    """
    with torch.device("meta"):
        plain = LLM(plan.model_config)
    plain.load_state_dict(model.to(plan.dtype).state_dict(), assign=True)  # the same tensors
    choose_kernels(plain, plan.device, plan.dtype)
    decoder, prompt = Decoder(plain), plan.task.val.read(0, prompt_tokens).tolist()
    texts = decoder.texts(1, prompt_tokens + new_tokens)
    prefill, decode = [], []
    for _ in range(repeats + 1):
        texts[0].cache.reset()
        synchronize(plan.device)
        started, first = time.perf_counter(), None
        for _step in generate(decoder, texts, [prompt], new_tokens, temperature=0):
            first = first or time.perf_counter()
        prefill.append(prompt_tokens / (first - started))
        decode.append((new_tokens - 1) / (time.perf_counter() - first))
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prefill_tokens_per_sec": summary(prefill[1:]),
        "decode_tokens_per_sec": summary(decode[1:]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/end_to_end_NAME.json"
    )
    parser.add_argument(
        "--prompt_tokens",
        type=int,
        default=64,
        help="tokens of the prompt that decoding starts from (default: 64)",
    )
    parser.add_argument(
        "--new_tokens", type=int, default=128, help="tokens to decode (default: 128)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="decoding runs, after one to warm up (default: 5)"
    )
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    args = parser.parse_args(argv)
    if "GPTOSS_DATA" in os.environ and not hasattr(args, "data_dir"):
        args.data_dir = os.environ["GPTOSS_DATA"]
    with tempfile.TemporaryDirectory() as empty:
        args.ckpt_dir, args.log_interval = os.path.join(empty, "checkpoints"), 1
        plan = make_plan(cli.settings_from(args, ModelConfig, TrainConfig), train.pretraining)
        if plan.config.profile or plan.config.micro_batch == "auto":
            raise ValueError(
                "this benchmark takes neither --profile nor --micro_batch auto: leave them out"
            )
        if plan.config.max_steps <= WARM_UP_STEPS:
            raise ValueError(
                f"max_steps {plan.config.max_steps} must be more than the {WARM_UP_STEPS} steps "
                "that warm up"
            )
        if args.prompt_tokens + args.new_tokens > plan.model_config.context_length:
            raise ValueError(
                f"prompt_tokens {args.prompt_tokens} + new_tokens {args.new_tokens} exceed the "
                f"context of {plan.model_config.context_length}: lower them"
            )
        needed = check_memory(plan)
        print("\n".join(describe(plan, needed)), flush=True)
        model, training = measure_training(plan)
        decoding = measure_decoding(model, plan, args.prompt_tokens, args.new_tokens, args.repeats)
    results = {
        "device": device_name(plan.device),
        "threads": torch.get_num_threads(),
        "model": dataclasses.asdict(plan.model_config),
        "train": {
            k: v for k, v in dataclasses.asdict(plan.config).items() if not k.endswith("_dir")
        },
        "parameters": total_parameters(plan.model_config),
        "active_parameters": active_parameters(plan.model_config),
        "estimated_memory_bytes": sum(needed.values()),
        "training": training,
        "decoding": decoding,
    }
    save_results(f"end_to_end_{args.name}", results)
    print(
        f"training {training['tokens_per_sec']['median']:.0f} tokens/s"
        + (f", MFU {100 * training['mfu']:.1f} %" if training["mfu"] else "")
        + f"; prefill {decoding['prefill_tokens_per_sec']['median']:.0f}, "
        f"decode {decoding['decode_tokens_per_sec']['median']:.1f} tokens/s; "
        f"validation loss {training['validation_loss']['before']:.3f} -> "
        f"{training['validation_loss']['after']:.3f}"
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
