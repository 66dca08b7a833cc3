"""The tables of measured speed in README.md, written from benchmarks/results/.

python -m benchmarks.tables
"""

from __future__ import annotations

import json

from benchmarks.common import REPO, RESULTS, replace_between
from runtime.base import cli
from runtime.base.text import human_bytes

TRAINING = {  # stored result: what was trained
    "train_cpu_4x512": "4 x 512 tokens, 8,192 words",
    "train_cpu_1x2048": "1 x 2,048 tokens, 8,192 words",
    "train_cpu_200k": "4 x 512 tokens, 200,019 words",
}
PROGRAMS = {
    "end_to_end_nano_cpu": "`nano`, 3.87 M parameters, bpe:4096",
    "end_to_end_small_o200k_cpu": "d_model 128, 4 blocks, 8 experts, context 256, o200k_base: 54.8 M parameters, 51 M of them embedding and head",
}
DECODING = {  # stored result: the model
    "decode_cpu_56m": "55 M, 8,192 words",
    "decode_cpu_330m": "328 M, 50,304 words",
}
DECODERS = {
    "ours": "gptoss (native)",
    "ours_int8": "gptoss `--quantize int8`",
    "ours_torch": "gptoss without native code",
    "ours_compiled": "gptoss `--compile`",
    "plain": "gptoss, plain `model.generate`",
    "hf_eager": "Hugging Face, eager experts",
    "hf_grouped": "Hugging Face, grouped_mm",
    "hf_batched": "Hugging Face, batched_mm",
    "hf_compiled": "Hugging Face, static cache, compiled",
}
DECODING_CONTEXT, BATCHES, PROMPTS = 128, (8, 32), (64, 256, 1024)
EXPORTED = ("qwen3_moe", "mixtral", "gpt_oss")  # trained models, by family: exports_FAMILY.json
EXPORT_SIZES = "exports_300m"
EXPORT_ROUTES = {
    "hf": "Hugging Face folder",
    "hf bfloat16": "Hugging Face folder, bfloat16",
    "gguf f32": "GGUF, F32",
    "gguf q8_0": "GGUF, Q8_0",
    "onnx": "ONNX",
    "import": "Hugging Face folder -> checkpoint",
}
AGAINST_LLAMA_CPP = {
    "llama_cpp_nano": "`nano`, trained",
    "llama_cpp_56m": "55 M, 8,192 words",
    "llama_cpp_330m": "328 M, 50,304 words",
}
NAMES = {
    "ours": "gptoss (eager)",
    "ours_compiled": "gptoss `--compile`",
    "loop": "loop over experts",
    "hf_eager": "Hugging Face, eager experts",
    "hf_grouped": "Hugging Face, grouped_mm",
    "dense": "gptoss (eager), dense of equal FLOPs",
}


def stored(name: str) -> dict:
    """The result called `name`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine(result: dict) -> str:
    """What a result was measured on, for a caption; its commit is in the file."""
    e = result["environment"]
    hardware = (
        e["hardware"]["gpus"][0]
        if e["hardware"]["gpus"]
        else f"{e['hardware']['cpu']}, {result['device']}"
    )
    return (
        f"{hardware}, torch {e['versions']['torch']}, transformers {e['versions']['transformers']}"
    )


def training_table() -> str:
    """Training steps of all sides; ratios are of medians taken in turns in one process."""
    lines = [
        "| step | who | tokens/s | x loop | x Hugging Face | of matmul speed | memory above states |",
        "|---|---|---|---|---|---|---|",
    ]
    results = {name: stored(name) for name in TRAINING}
    for name, what in TRAINING.items():
        result = results[name]
        for variant, v in result["variants"].items():
            ratios = " | ".join(
                f"{v['ratio_to'][other]:.2f}" if other in v["ratio_to"] else ""
                for other in ("loop", "hf_grouped")
            )
            memory = (
                human_bytes(v["peak_above_states_bytes"]) if "peak_above_states_bytes" in v else ""
            )
            busy = " (machine was busy)" * v["disturbed"]
            lines.append(
                f"| {what} | {NAMES[variant]}{busy} | {v['tokens_per_sec']['median']:,.0f} | {ratios} | {100 * v['mfu']:.0f} % | {memory} |"
            )
            what = ""
    machines = dict.fromkeys(machine(result) for result in results.values())
    files = ", ".join(f"`{name}.json`" for name in TRAINING)
    return "\n".join(
        [
            *lines,
            "",
            f"{'; '.join(machines)}. Commands and commits: {files} in `benchmarks/results/`.",
        ]
    )


def allocator_line() -> str:
    """What the settings of runtime/base/process.py give by themselves."""
    row = stored("train_cpu_4x512")["allocator_row"]
    return (
        f"Keeping freed memory, threads and their spin count alone: {row['default']['tokens_per_sec']['median']:,.0f} -> {row['tuned']['tokens_per_sec']['median']:,.0f} tokens/s, "
        f"{row['ratio']:.2f} times PyTorch's defaults ({row['processes_each']} processes each, in turns)."
    )


def sinks_line() -> str:
    """Attention with sinks, by PyTorch's kernels and by all scores."""
    result = stored("attention_sinks_cpu")
    plain, ours = (
        result["cases"]["sinks"]["variants"][name]["default"] for name in ("manual", "rescaled")
    )
    return (
        f"Attention with gpt-oss's sinks, forward and backward, by PyTorch's flash kernel with its result rescaled: {plain['seconds']['median'] / ours['seconds']['median']:.1f} times as fast as "
        f"with all scores, in {human_bytes(ours['peak_above_inputs_bytes'])} instead of {human_bytes(plain['peak_above_inputs_bytes'])} ({result['context_length']:,} tokens, "
        f"{result['num_heads']} heads of {result['head_dim']}; {machine(result)}; `attention_sinks_cpu.json`)."
    )


def speed_table() -> str:
    """Training and decoding through the users' own programs."""
    lines = [
        "| tokens/s | training | prefill, 64 tokens | greedy decoding, batch 1 |",
        "|---|---|---|---|",
    ]
    for name, what in PROGRAMS.items():
        result = stored(name)
        speeds = (
            result["training"]["tokens_per_sec"],
            result["decoding"]["prefill_tokens_per_sec"],
            result["decoding"]["decode_tokens_per_sec"],
        )
        lines.append(
            f"| {what} | {' | '.join(format(speed['median'], ',.0f') for speed in speeds)} |"
        )
    return "\n".join(lines)


def decoding_table() -> str:
    """Generation of all sides; ratios are of medians taken in turns in one process, to the best of Hugging Face's modes."""
    lines = [
        "| model | who | tokens/s, one text | x Hugging Face | of memory speed | "
        + " | ".join(f"{b} texts" for b in BATCHES)
        + " | "
        + " | ".join(f"prompt of {length:,}" for length in PROMPTS)
        + " |",
        "|---" * (5 + len(BATCHES) + len(PROMPTS)) + "|",
    ]
    results = {name: stored(name) for name in DECODING}
    for name, what in DECODING.items():
        result = results[name]
        decode = {
            cell["batch_size"]: cell["sides"]
            for cell in result["decode"]
            if cell["context"] == DECODING_CONTEXT
        }
        prefill = {cell["tokens"]: cell["sides"] for cell in result["prefill"]}
        for side in result["sides"]:
            one = decode[1].get(side, {})
            if "tokens_per_sec" not in one:  # it failed, and the file says why
                continue
            ratio = f"{one['ratio_to_hf']:.2f}" if "ratio_to_hf" in one else ""
            busy = " (machine was busy)" * any(
                cell.get(side, {}).get("disturbed", False)
                for cell in (*decode.values(), *prefill.values())
            )
            batches = [_speed(decode.get(b, {}).get(side, {})) for b in BATCHES]
            prompts = [
                _speed(prefill.get(length, {}).get(side, {}), with_ratio=True) for length in PROMPTS
            ]
            lines.append(
                f"| {what} | {DECODERS[side]}{busy} | {_speed(one)} | {ratio} | {100 * one['share_of_bandwidth']:.0f} % | {' | '.join(batches + prompts)} |"
            )
            what = ""
    machines = dict.fromkeys(machine(result) for result in results.values())
    files = ", ".join(f"`{name}.json`" for name in DECODING)
    return "\n".join(
        [
            *lines,
            "",
            f"Tokens/s, greedy, float32, {DECODING_CONTEXT} tokens of context; x: of Hugging Face's best mode there. {'; '.join(machines)}. "
            f"Commands and commits: {files} in `benchmarks/results/`.",
        ]
    )


def launch_line() -> str:
    """From the command line to the first token, and what 8 bits cost."""
    result = stored("decode_nano_cpu")
    launch, quality = result["launch"], result["perplexity"]
    return (
        f"The process `python predict.py --prompt x --max_new_tokens 1` with the trained `nano` model takes {launch['predict_s']['median']:.2f} s from its start to its end, `import torch` alone "
        f"{launch['import_torch_s']['median']:.2f} s. `--quantize int8` changes that model's perplexity from {quality['perplexity']['float32']:.3f} to {quality['perplexity']['int8']:.3f} "
        f"({100 * (quality['ratio'] - 1):+.2f} %; {quality['tokens']:,} tokens of TinyStories validation)."
    )


def _speed(side: dict, with_ratio: bool = False) -> str:
    """A side's tokens/s, for a cell of a table; empty where it was not measured."""
    if "tokens_per_sec" not in side:
        return ""
    return f"{side['tokens_per_sec']['median']:,.0f}" + (
        f" ({side['ratio_to_hf']:.2f} x)" if with_ratio and "ratio_to_hf" in side else ""
    )


def reliability_table() -> str:
    """What was promised, how often it was tried and held, and what the same test found in the reference implementation."""
    lines = ["| promise | held | the reference |", "|---|---|---|"]
    for row in stored("reliability")["promises"]:
        detail = "".join(
            f"; {value:,} {name}" if isinstance(value, int) else f"; {name} {value}"
            for name, value in row["detail"].items()
        )
        lines.append(
            f"| {row['text']} | {row['held']:,} of {row['tried']:,}{detail} | {row['reference']} |"
        )
    mutants = stored("mutants")
    return "\n".join(
        [
            *lines,
            "",
            f"Mutants: {mutants['caught']} of {mutants['made']} caught (`mutants.json`; the table: `reliability.json`, in `benchmarks/results/`).",
        ]
    )


def exports_table() -> str:
    """What those who read the files make of them."""
    lines = [
        "| architecture | read by | largest logit difference | greedy tokens as predict.py's |",
        "|---|---|---|---|",
    ]
    results = {family: stored(f"exports_{family}") for family in EXPORTED}
    for family, result in results.items():
        title = f"`{family}`, {result['parameters'] / 1e6:.2f} M parameters, {result['checkpoint_step']:,} steps"
        for reader, r in result["readers"].items():
            same, total = (
                sum(r["same_greedy_tokens"].values()),
                sum(result["greedy_tokens"].values()),
            )
            lines.append(
                f"| {title} | {reader} {r['version']} | {r['largest_logit_difference']:.1e} of {r['largest_logit']:.3g} | {same} of {total} |"
            )
            title = ""
    first = results[EXPORTED[0]]
    bitwise = [
        family
        for family, result in results.items()
        if result["export_import_export"] and all(result["export_import_export"].values())
    ]
    reader = next(iter(first["readers"].values()))
    return "\n".join(
        [
            *lines,
            "",
            f"Logits in float32 on {reader['stories']} stories of the validation text, {reader['tokens']:,} tokens; {len(first['greedy_tokens'])} prompts. Exported, imported and exported again, "
            f"weights, config and tokenizer files are the same bytes: {', '.join(bitwise)}. Commands and commits: `exports_*.json` in `benchmarks/results/`.",
        ]
    )


def export_sizes_table() -> str:
    """Time, size and memory of a larger model's exports."""
    result = stored(EXPORT_SIZES)
    lines = [
        f"| {result['parameters'] / 1e6:.0f} M parameters | seconds, check included | file | peak memory, mapped files included |",
        "|---|---|---|---|",
    ]
    for route, r in result["routes"].items():
        lines.append(
            f"| {EXPORT_ROUTES[route]} | {r['seconds']:.0f} | {human_bytes(r['bytes'])} | {human_bytes(r['peak_rss_bytes'])} |"
        )
    return "\n".join(
        [*lines, "", f"{result['environment']['hardware']['cpu']}, 2 cores; `{EXPORT_SIZES}.json`."]
    )


def llama_cpp_table() -> str:
    """Speed against llama.cpp with the same weights; ratios are of medians taken in turns in one process."""
    lines = [
        "| tokens/s (x llama.cpp) | decoding, float32 | decoding, 8 bits | prompt of 256, float32 | prompt of 256, 8 bits |",
        "|---|---|---|---|---|",
    ]
    results = {name: stored(name) for name in AGAINST_LLAMA_CPP}
    for name, what in AGAINST_LLAMA_CPP.items():
        cells = [
            results[name][kind][side]
            for kind in ("decode", "prefill")
            for side in ("ours", "ours_int8")
        ]
        lines.append(
            f"| {what} | "
            + " | ".join(
                f"{c['tokens_per_sec']['median']:,.0f} ({c['ratio_to_llama_cpp']:.2f} x)"
                for c in cells
            )
            + " |"
        )
    one = next(iter(results.values()))
    version = one["sides"]["llama_f32"]["llama_cpp_python"]
    return "\n".join(
        [
            *lines,
            "",
            f"One text, greedy, {one['threads']} threads on both sides, {one['environment']['hardware']['cpu']}, llama-cpp-python {version}; `llama_cpp_*.json`.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    cli.parser(__doc__).parse_args(argv)
    replace_between(
        REPO / "README.md",
        {
            "training speed": training_table(),
            "allocator": allocator_line(),
            "sinks": sinks_line(),
            "speed": speed_table(),
            "decoding": decoding_table(),
            "launch": launch_line(),
            "reliability": reliability_table(),
            "exports": exports_table(),
            "export sizes": export_sizes_table(),
            "llama.cpp": llama_cpp_table(),
        },
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
