"""Write the tables in README.md and docs/: measured figures, from benchmarks/results/, and recipes.

Each table goes into the page that holds its marker, <!-- NAME -->.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import judged, recipes, settings, tuned
from benchmarks.common import REPO, RESULTS, replace_between
from runtime.base import cli
from runtime.base.text import human_bytes

# Stored result: what was trained.
# Whose steps are shown in parts.
WITH_PARTS = {
    "train_cpu_4x512": "4 x 512 tokens, vocabulary 8,192",
    "train_cpu_nano": "8 x 512 tokens, `nano` with Muon",
}
TRAINING = {
    "train_cpu_4x512": "4 x 512 tokens, vocabulary 8,192",
    "train_cpu_1x2048": "1 x 2,048 tokens, vocabulary 8,192",
    "train_cpu_200k": "4 x 512 tokens, vocabulary 200,019",
    "train_cpu_nano": WITH_PARTS["train_cpu_nano"],
}
PROGRAMS = {
    "end_to_end_nano_cpu": "`nano`, 3.88 M parameters, bpe:4096",
    "end_to_end_small_o200k_cpu": "54.8 M parameters, 51 M in embedding and head, o200k_base",
}
# Stored result: the model.
DECODING = {
    "decode_cpu_56m": "55 M, vocabulary 8,192",
    "decode_cpu_330m": "328 M, vocabulary 50,304",
}
DECODERS = {
    "ours": "gptoss (C kernel)",
    "ours_int8": "gptoss `--quantize int8`",
    "ours_int4": "gptoss `--quantize int4`",
    "ours_torch": "gptoss without the C kernel",
    "ours_compiled": "gptoss `--compile`",
    "plain": "gptoss, plain `generate`",
    "hf_eager": "Hugging Face, eager experts",
    "hf_grouped": "Hugging Face, grouped_mm",
    "hf_batched": "Hugging Face, batched_mm",
    "hf_compiled": "Hugging Face, static cache, compiled",
}
DECODING_CONTEXT, BATCHES, PROMPTS = 128, (8, 32), (64, 256, 1024)
# Trained models, by family: exports_FAMILY.json.
EXPORTED = ("qwen3_moe", "mixtral", "gpt_oss")
EXPORT_SIZES = "exports_300m"
SERVING, SOAK = "serving_56m", "soak_public"
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
    "llama_cpp_56m": "55 M, vocabulary 8,192",
    "llama_cpp_330m": "328 M, vocabulary 50,304",
}
NAMES = {
    "ours": "gptoss (eager)",
    "ours_compiled": "gptoss `--compile`",
    "ours_without_c": "gptoss (eager) without C",
    "loop": "loop over experts",
    "hf_eager": "Hugging Face, eager experts",
    "hf_grouped": "Hugging Face, grouped_mm",
    "dense": "gptoss (eager), dense of equal FLOPs",
}


def stored(name: str) -> dict:
    """Return the result called `name`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine(result: dict) -> str:
    """Return what a result was measured on, for a caption; its commit is in the file."""
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
    """Return the training steps of all sides; ratios are of medians measured in alternation."""
    lines = [
        "| step | who | tokens/s | x loop | x Hugging Face | x without C | matmul speed "
        "| memory above states |",
        "|---" * 8 + "|",
    ]
    results = {name: stored(name) for name in TRAINING}
    for name, what in TRAINING.items():
        result = results[name]
        for variant, v in result["variants"].items():
            ratios = " | ".join(
                f"{v['ratio_to'][other]:.2f}" if other in v["ratio_to"] else ""
                for other in ("loop", "hf_grouped", "ours_without_c")
            )
            memory = (
                human_bytes(v["peak_above_states_bytes"]) if "peak_above_states_bytes" in v else ""
            )
            busy = " (machine was busy)" * v["disturbed"]
            lines.append(
                f"| {what} | {NAMES[variant]}{busy} | {v['tokens_per_sec']['median']:,.0f} "
                f"| {ratios} | {100 * v['mfu']:.0f} % | {memory} |"
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


def parts_table() -> str:
    """Return the milliseconds of a step's parts with and without the kernels in C."""
    lines: list[str] = []
    for name, what in WITH_PARTS.items():
        parts = stored(name)["time_by_part"]
        sides = [parts[variant] for variant in ("ours_without_c", "ours")]
        shown = [part for part in sides[0]["shares"] if part != "data"]
        if not lines:
            lines += [f"| ms a step | who | {' | '.join(shown)} | all |"]
            lines += ["|---" * (3 + len(shown)) + "|"]
        for side, who in zip(sides, ("without C", "with C"), strict=True):
            ms = 1000 * side["seconds_per_step_under_profiler"]
            cells = " | ".join(f"{ms * side['shares'][part]:,.0f}" for part in shown)
            lines.append(f"| {what} | {who} | {cells} | {ms:,.0f} |")
            what = ""
    return "\n".join(lines)


def plain_line() -> str:
    """Return how a small dense model's step compares with a plain PyTorch GPT's."""
    result = stored("plain_gpt_nano_gpt")
    ours, plain = (result["variants"][name] for name in ("ours", "plain"))
    ms = [1000 * side["seconds_per_step"]["median"] for side in (ours, plain)]
    return (
        f"A dense model of {result['parameters'] / 1e6:.1f} M parameters, a token a character, "
        f"takes {ms[0]:.0f} ms a step of {result['batch_size']} x "
        f"{result['model']['context_length']} tokens. A plain GPT of the same shape, in PyTorch, "
        f"takes {ms[1]:.0f}: ours has {ours['x_plain']:.2f} of its speed. After as many steps the "
        f"loss is {ours['losses']['last']:.2f}, and the plain GPT's "
        f"{plain['losses']['last']:.2f} (`plain_gpt_nano_gpt.json`)."
    )


def allocator_line() -> str:
    """Return what the settings of the process give by themselves."""
    row = stored("train_cpu_4x512")["allocator_row"]
    before, after = (row[k]["tokens_per_sec"]["median"] for k in ("default", "tuned"))
    return (
        f"A training step makes {after:,.0f} tokens/s with these settings, and {before:,.0f} with "
        f"PyTorch's defaults: {row['ratio']:.2f} times as many "
        f"({row['processes_each']} processes each, in alternation)."
    )


def sinks_line() -> str:
    """Return how attention with sinks compares: PyTorch's kernel, and all scores."""
    result = stored("attention_sinks_cpu")
    plain, ours = (
        result["cases"]["sinks"]["variants"][name]["default"] for name in ("manual", "rescaled")
    )
    faster = plain["seconds"]["median"] / ours["seconds"]["median"]
    return (
        "Where C does not, attention with gpt-oss's sinks uses PyTorch's flash kernel and rescales "
        "its output. "
        f"Forward and backward are {faster:.1f} times as fast as with all scores, "
        f"in {human_bytes(ours['peak_above_inputs_bytes'])} "
        f"instead of {human_bytes(plain['peak_above_inputs_bytes'])} "
        f"({result['context_length']:,} tokens, {result['num_heads']} heads "
        f"of {result['head_dim']}; {machine(result)}; `attention_sinks_cpu.json`)."
    )


def experts_line() -> str:
    """Return the speed of the experts alone."""
    variants = stored("experts_cpu_256")["variants"]
    in_c, python, grouped = (
        variants[k]["ratio"]["median"] for k in ("in_c", "feed_forward", "grouped_mm")
    )
    return (
        f"The experts alone, in C, are {in_c:.2f} times as fast as one product after another. "
        f"Without a compiler, one expert on each core is {python:.2f} times as fast, and "
        f"PyTorch's grouped_mm {grouped:.2f} times (`experts_cpu_256.json`)."
    )


def prepare_line() -> str:
    """Return the speed of preparing text."""
    ratio = stored("prepare")["sides"]["prepare_data"]["speed_against_tiktoken"]
    return (
        f"`prepare_data.py` is {ratio:.2f} times as fast as tiktoken's own batch encoding on the "
        "same cores (`prepare.json`)."
    )


def speed_table() -> str:
    """Return training and decoding speed of the commands that users run."""
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


def _decoding(result: dict) -> tuple[dict, dict]:
    """Return ({batch size: sides}, {prompt length: sides}) of a result of benchmarks.decode."""
    decode = {
        cell["batch_size"]: cell["sides"]
        for cell in result["decode"]
        if cell["context"] == DECODING_CONTEXT
    }
    return decode, {cell["tokens"]: cell["sides"] for cell in result["prefill"]}


def _decoding_caption(about: str) -> str:
    """Return the lines below a table of DECODING's results."""
    machines = "; ".join(dict.fromkeys(machine(stored(name)) for name in DECODING))
    files = ", ".join(f"`{name}.json`" for name in DECODING)
    return f"{about} {machines}. Commands and commits: {files} in `benchmarks/results/`."


def decoding_table() -> str:
    """Return decoding speed of all sides; ratios are to the best of Hugging Face's modes."""
    batches = " | ".join(f"{b} texts" for b in BATCHES)
    lines = [
        f"| model | who | tokens/s, one text | x Hugging Face | memory speed | {batches} |",
        "|---" * (5 + len(BATCHES)) + "|",
    ]
    for name, what in DECODING.items():
        decode, _ = _decoding(stored(name))
        for side, one in decode[1].items():
            # It failed, and the file says why.
            if "tokens_per_sec" not in one:
                continue
            ratio = f"{one['ratio_to_hf']:.2f}" if "ratio_to_hf" in one else ""
            cells = " | ".join(_speed(decode.get(b, {}).get(side, {})) for b in BATCHES)
            lines.append(
                f"| {what} | {DECODERS[side]}{_busy(decode, side)} | {_speed(one)} | {ratio} "
                f"| {100 * one['share_of_bandwidth']:.0f} % | {cells} |"
            )
            what = ""
    about = f"Tokens/s, greedy, float32, {DECODING_CONTEXT} tokens of context; x: of the best mode."
    return "\n".join([*lines, "", _decoding_caption(about)])


def prompts_table() -> str:
    """Return the speed of reading a prompt; ratios are to the best of Hugging Face's modes."""
    lengths = " | ".join(f"prompt of {length:,}" for length in PROMPTS)
    lines = [f"| model | who | {lengths} |", "|---" * (2 + len(PROMPTS)) + "|"]
    for name, what in DECODING.items():
        _, prefill = _decoding(stored(name))
        for side in prefill[PROMPTS[0]]:
            speeds = [prefill.get(n, {}).get(side, {}) for n in PROMPTS]
            if not any("tokens_per_sec" in speed for speed in speeds):
                continue
            cells = " | ".join(_speed(speed, with_ratio=True) for speed in speeds)
            lines.append(f"| {what} | {DECODERS[side]}{_busy(prefill, side)} | {cells} |")
            what = ""
    return "\n".join([*lines, "", _decoding_caption("Prompt tokens/s, float32.")])


def _busy(cells: dict, side: str) -> str:
    """Return a remark if the machine was busy in one of a side's cells."""
    disturbed = any(sides.get(side, {}).get("disturbed", False) for sides in cells.values())
    return " (machine was busy)" * disturbed


def launch_line() -> str:
    """Return the time from the command line to the first token, and the cost of 8 bits."""
    result = stored("decode_nano_cpu")
    launch, quality = result["launch"], result["perplexity"]
    return (
        "The process `python predict.py --prompt x --max_new_tokens 1` with a trained `nano` "
        f"model takes {launch['predict_s']['median']:.2f} s from start to end. "
        f"A separate process with `import torch` alone took "
        f"{launch['import_torch_s']['median']:.2f} s. "
        "`--quantize int8` changes that model's perplexity from "
        f"{quality['perplexity']['float32']:.3f} to {quality['perplexity']['int8']:.3f} "
        f"({100 * (quality['ratio'] - 1):+.2f} %; {quality['tokens']:,} tokens of TinyStories "
        f"validation), `--quantize int4` by {100 * (quality['ratio_int4'] - 1):+.2f} %."
    )


def _speed(side: dict, with_ratio: bool = False) -> str:
    """Return a side's tokens/s for a cell of a table; empty if it was not measured."""
    if "tokens_per_sec" not in side:
        return ""
    return f"{side['tokens_per_sec']['median']:,.0f}" + (
        f" ({side['ratio_to_hf']:.2f} x)" if with_ratio and "ratio_to_hf" in side else ""
    )


def speed_summary() -> str:
    """Return the few ratios of the front page, each with the file it comes from."""
    name = "train_cpu_1x2048"
    ratio = stored(name)["variants"]["ours"]["ratio_to"]["loop"]
    rows = [("training, 2,048 tokens of context", "a loop over experts", ratio, name)]
    ratio = stored("train_cpu_4x512")["variants"]["ours"]["ratio_to"]["hf_grouped"]
    rows.append(("training, 512 tokens", "Hugging Face", ratio, "train_cpu_4x512"))
    ratio = _decoding(stored("decode_cpu_330m"))[0][1]["ours"]["ratio_to_hf"]
    rows.append(
        ("decoding, 328 M parameters", "Hugging Face's best mode", ratio, "decode_cpu_330m")
    )
    ratio = stored("llama_cpp_330m")["decode"]["ours"]["ratio_to_llama_cpp"]
    rows.append(("decoding, 328 M parameters", "llama.cpp", ratio, "llama_cpp_330m"))
    result = stored(SERVING)["none"]
    ratio = result["scaling"]["ratios"]["32 clients over 1"]
    rows.append(("serving 32 clients, 55 M parameters", "serving one", ratio, SERVING))
    ratio = result["llama.cpp"]["ratio"]
    rows.append(("serving 8 clients, 55 M parameters", "llama.cpp's server", ratio, SERVING))
    return "\n".join(
        [
            "| float32, 2 CPU threads | compared with | ratio | file |",
            "|---|---|---|---|",
            *(f"| {what} | {who} | {x:.2f} | `{file}.json` |" for what, who, x, file in rows),
        ]
    )


# Guarantees of the front page: the number in reliability.json (its first row), and a short name.
FRONT_PAGE = {
    1: "killed at any moment, restarted: the same weights, bit for bit",
    3: "a crash or power failure leaves no broken checkpoint",
    6: "damaged files are noticed, with file and reason",
    21: "a flag that cannot be honoured is rejected before any work",
    77: "32 requests at a time: each answer has the same bits as alone",
}


def reliability_summary() -> str:
    """Return the few guarantees of the front page."""
    held: dict[int, dict] = {}
    for row in stored("reliability")["promises"]:
        held.setdefault(row["number"], row)
    return "\n".join(
        [
            "| guarantee | held |",
            "|---|---|",
            *(
                f"| {what} | {held[number]['held']:,} of {held[number]['tried']:,} |"
                for number, what in FRONT_PAGE.items()
            ),
        ]
    )


def reliability_table() -> str:
    """Return each guarantee, how often it held, and what the original implementation did."""
    lines = ["| guarantee | held | the original implementation |", "|---|---|---|"]
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
            f"Mutants: {mutants['caught']} of {mutants['made']} caught (`mutants.json`). "
            "The table is from `reliability.json`. Both are in `benchmarks/results/`.",
        ]
    )


def exports_table() -> str:
    """Return how three readers of the exported files compare with the model."""
    lines = [
        "| architecture | read by | largest logit difference | greedy tokens as predict.py's |",
        "|---|---|---|---|",
    ]
    results = {family: stored(f"exports_{family}") for family in EXPORTED}
    for family, result in results.items():
        title = (
            f"`{family}`, {result['parameters'] / 1e6:.2f} M parameters, "
            f"{result['checkpoint_step']:,} steps"
        )
        for reader, r in result["readers"].items():
            same, total = (
                sum(r["same_greedy_tokens"].values()),
                sum(result["greedy_tokens"].values()),
            )
            lines.append(
                f"| {title} | {reader} {r['version']} | {r['largest_logit_difference']:.1e} "
                f"of {r['largest_logit']:.3g} | {same} of {total} |"
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
            f"Logits in float32 on {reader['stories']} validation stories, {reader['tokens']:,} "
            f"tokens; {len(first['greedy_tokens'])} prompts. A model exported, imported and "
            "exported again gives the same bytes of weights, config and tokenizer: "
            f"{', '.join(bitwise)}. "
            "Commands and commits: `exports_*.json` in `benchmarks/results/`.",
        ]
    )


def export_sizes_table() -> str:
    """Return time, size and memory of a larger model's exports."""
    result = stored(EXPORT_SIZES)
    lines = [
        f"| {result['parameters'] / 1e6:.0f} M parameters | seconds, with check | file "
        "| peak memory, with mapped files |",
        "|---|---|---|---|",
    ]
    for route, r in result["routes"].items():
        lines.append(
            f"| {EXPORT_ROUTES[route]} | {r['seconds']:.0f} | {human_bytes(r['bytes'])} "
            f"| {human_bytes(r['peak_rss_bytes'])} |"
        )
    return "\n".join(
        [*lines, "", f"{result['environment']['hardware']['cpu']}, 2 cores; `{EXPORT_SIZES}.json`."]
    )


def llama_cpp_table() -> str:
    """Return speed next to llama.cpp; ratios are of medians measured in alternation."""
    kinds = {"ours": "float32", "ours_int8": "8 bits", "ours_int4": "4 bits"}
    lines = [
        f"| tokens/s (x llama.cpp) | | {' | '.join(kinds.values())} |",
        "|---|---|---|---|---|",
    ]
    results = {name: stored(name) for name in AGAINST_LLAMA_CPP}
    for name, model in AGAINST_LLAMA_CPP.items():
        result = results[name]
        rows = {"one text": result["decode"]}
        for count, found in result["batched"].items():
            rows[f"{count} texts at a time"] = found["sides"]
        rows[f"a prompt of {result['prefill_tokens']}"] = result["prefill"]
        for what, sides in rows.items():
            cells = " | ".join(
                f"{sides[side]['tokens_per_sec']['median']:,.0f} "
                f"({sides[side]['ratio_to_llama_cpp']:.2f} x)"
                for side in kinds
            )
            lines.append(f"| {model} | {what} | {cells} |")
            model = ""
    one = next(iter(results.values()))
    version = one["sides"]["llama_f32"]["llama_cpp_python"]
    return "\n".join(
        [
            *lines,
            "",
            f"Greedy, {one['threads']} threads on both sides, "
            f"{one['environment']['hardware']['cpu']}, llama-cpp-python {version}; "
            "against its files F32, Q8_0 and Q4_0; `llama_cpp_*.json`.",
        ]
    )


def serving_table() -> str:
    """Return tokens/s of the server by clients, next to generation without a server."""
    result = stored(SERVING)
    clients = [1, 8, 32]
    lines = [
        f"| tokens/s, 55 M parameters | {' | '.join(_clients(n) for n in clients)} |",
        "|---" * (1 + len(clients)) + "|",
    ]
    for quantize, what in (("none", "float32"), ("int8", "`--quantize int8`")):
        scaling = result[quantize]["scaling"]
        medians = {name: one["median"] for name, one in scaling["tokens_per_sec"].items()}
        for side, name in (("the server", "{} clients"), ("`generate`, no server", "generate {}")):
            cells = [f"{medians[name.format(n)]:,.0f}" for n in clients]
            lines.append(f"| {side}, {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_serving_facts(result)])


def _clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"


def _passes(count: float) -> str:
    return f"{count:.0f} pass{'' if count == 1 else 'es'}"


def _missed_targets(result: dict) -> list[str]:
    """Return what of serving_56m.json misses a target, each with its value and the target."""
    targets, found = result["targets"], []
    for quantize, what in (("none", "float32"), ("int8", "8 bits")):
        scaling, llama = result[quantize]["scaling"], result[quantize]["llama.cpp"]
        ratios = scaling["ratios"] | {"8 clients over llama.cpp": llama["ratio"]}
        for name, ratio in ratios.items():
            _, _, base = name.partition(" over ")
            key = {
                "generate": "over generate, each number of clients",
                "predict": "1 client over predict",
            }.get(base, name)
            if ratio < targets[key]:
                name = name.replace("1 clients", "1 client")
                found.append(f"{what}, {name}: {ratio:.3f} ({targets[key]:g})")
        if scaling["idle"]["cpu_seconds"] > targets["idle CPU seconds"]:
            found.append(f"{what}, idle CPU seconds: {scaling['idle']['cpu_seconds']:g} (0)")
    passes = result["passes"]
    for key, value in (
        ("passes to the first token of a short prompt", passes["to_first_token"]["median"]),
        ("p99 of passes between tokens", passes["between_tokens_p99"]),
    ):
        if value > targets[key]:
            found.append(f"{key}: {value:g} ({targets[key]})")
    return found


def _serving_facts(result: dict) -> list[str]:
    """Return what else serving_56m.json holds, and the soak, as a list."""
    first, passes, idle = (
        result["first_token"],
        result["passes"],
        result["none"]["scaling"]["idle"],
    )
    facts = []
    for quantize, what in (("none", "float32"), ("int8", "8 bits")):
        scaling, llama = result[quantize]["scaling"], result[quantize]["llama.cpp"]
        ratios = scaling["ratios"]
        facts.append(
            f"- {what}: 8 clients get {ratios['8 clients over 1']:.2f} and 32 clients "
            f"{ratios['32 clients over 1']:.2f} times the tokens/s of one, which is "
            f"{ratios['8 clients over generate']:.2f} and "
            f"{ratios['32 clients over generate']:.2f} of `generate`. One client gets "
            f"{ratios['1 clients over predict']:.2f} of `predict.py`, and {llama['clients']} get "
            f"{llama['ratio']:.2f} times what llama.cpp's server gives them (same weights, greedy)."
        )
    threads = {name: one["median"] for name, one in result["threads_compared"].items()}
    one, two = (threads[f"8 clients, {n} threads"] for n in (1, 2))
    alone, late = (first[name]["median"] for name in ("alone_ms", "while_a_long_one_comes_ms"))
    soak = stored(SOAK)
    return [
        *facts,
        f"- Two threads of the kernel give 8 clients {two / one:.2f} times the tokens/s of one "
        "thread, so the server uses all cores unless `--num_threads` says otherwise.",
        f"- A short prompt has its first token after {alone:.0f} ms, and after {late:.0f} ms while "
        f"a prompt of {passes['context'] - 1:,} tokens comes in: it waits for "
        f"{_passes(passes['to_first_token']['median'])} of the model. 99 % of the tokens need no "
        f"more than {_passes(passes['between_tokens_p99'])} after the one before.",
        f"- An idle server used {idle['cpu_seconds']:g} s of CPU time in "
        f"{idle['wall_seconds']:g} s.",
        f"- In {soak['seconds'] / 60:.0f} minutes {soak['clients']} clients sent "
        f"{soak['requests']:,} requests of all kinds. {soak['same_as_alone']:,} answers were "
        f"compared with those had alone, and {soak['num_wrong']} differed. The memory grew by "
        f"{soak['growth_mib']:.1f} MiB.",
        f"- Targets that were missed, with the target: "
        f"{'; '.join(_missed_targets(result)) or 'none'}.",
        "",
        "The sides take turns. A ratio is the median of the ratios of each round, so it does not "
        "follow from the table's medians.",
        f"Medians in alternation, {result['threads']} threads, prompts of "
        f"{result['sizes']['prompt_tokens']} and answers of {result['sizes']['new_tokens']} "
        f"tokens, not streamed, clients on the same cores, "
        f"{result['environment']['hardware']['cpu']}: `serving_56m.json`, `soak_public.json`.",
    ]


def ranks_table() -> str:
    """Return what two ranks waste on the cores of one process, and on what."""
    result = stored("ranks_cpu")
    parts = ("gather weights", "sum gradients", "exchange rows")
    lines = [
        f"| tokens of a rank | two ranks | x one process | {', s | '.join(parts)}, s |",
        "|---" * 6 + "|",
    ]
    for tokens, sides in result["by_tokens"].items():
        what = f"{int(tokens):,}"
        for name, one in sides.items():
            if name == "one process":
                continue
            busy = " (machine was busy)" * one["disturbed"]
            spent = " | ".join(f"{one['parts'][p]:.2f}" if p in one["parts"] else "" for p in parts)
            lines.append(
                f"| {what} | {name}{busy} | {one['ratio_to']['one process']:.2f} | {spent} |"
            )
            what = ""
        seconds = sides["one process"]["seconds"]["median"]
        lines.append(f"| | one process: {seconds:.2f} s a step | | | | |")
    e = result["environment"]
    hardware = f"{e['hardware']['cpu']}, {e['hardware']['cores']} cores"
    return "\n".join(
        [
            *lines,
            "",
            f"{result['parameters'] / 1e6:.0f} M parameters, float32, AdamW, a step of two "
            f"micro-batches; {hardware}, torch {e['versions']['torch']}; `ranks_cpu.json`.",
        ]
    )


TABLES: dict[str, Callable[[], str]] = {
    "speed summary": speed_summary,
    "reliability summary": reliability_summary,
    "training speed": training_table,
    "step parts": parts_table,
    "plain": plain_line,
    "experts": experts_line,
    "prepare": prepare_line,
    "allocator": allocator_line,
    "sinks": sinks_line,
    "speed": speed_table,
    "decoding": decoding_table,
    "prompts": prompts_table,
    "launch": launch_line,
    "reliability": reliability_table,
    "exports": exports_table,
    "export sizes": export_sizes_table,
    "llama.cpp": llama_cpp_table,
    "ranks overhead": ranks_table,
    "serving speed": serving_table,
    **recipes.TABLES,
    **settings.TABLES,
    **tuned.TABLES,
    **judged.TABLES,
}


def pages() -> list[Path]:
    """Return the documents that may hold a table."""
    return [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def write_tables(contents: dict[str, str], documents: Sequence[Path]) -> None:
    """Write each table into the document with its marker.

    Raise ValueError, and write nothing, unless exactly one document holds each marker.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in documents}
    owners = {
        name: [path for path, text in texts.items() if f"<!-- {name} -->" in text]
        for name in contents
    }
    for name, found in owners.items():
        if len(found) != 1:
            places = ", ".join(path.name for path in found) or "no document"
            raise ValueError(f"<!-- {name} --> must be in one document, but {places} has it")
    for path in documents:
        if mine := {name: contents[name] for name, found in owners.items() if found == [path]}:
            replace_between(path, mine)


def main(argv: list[str] | None = None) -> int:
    cli.parser(__doc__).parse_args(argv)
    write_tables({name: table() for name, table in TABLES.items()}, pages())
    return 0


if __name__ == "__main__":
    cli.run_main(main)
