"""scripts/export_hf.py's folders in vLLM itself: the same prompt ids, greedy text and logits.

vLLM needs other versions of packages than this repo. So it has an environment of its own (make
test-vllm), and runs there in a process for each folder. Skipped without that environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import prepare_data
import train
from runtime.checkpoint.read import load_model
from runtime.checks.rounding import logits_bound, size_of
from runtime.interop.export import logits_of
from scripts.export_hf import main
from tests.builders_inference import predictor_of

PYTHON = os.environ.get("GPTOSS_VLLM", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own (make test-vllm)"),
]
FAMILIES = {
    "qwen3_moe": ["--preset", "nano"],
    "mixtral": ["--preset", "nano", "--no-qk_norm"],
    # Half of the blocks see a window that the longest prompt exceeds.
    "gpt_oss": ["--preset", "gpt-oss-nano", "--sliding_window", "32"],
}
PROMPTS = [
    "Once upon a time",
    "The",
    "",
    "One day a girl went to the river with her dog. She had a red ball and a small boat. "
    "The dog ran after the ball, and the boat went down the river.",
]
NEW_TOKENS = 40
# Of CPU builds: one process, little memory, no graphs. Written to the last argument.
IN_VLLM = """
import json, os, sys
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
from vllm import LLM, SamplingParams
folder, prompts, count, out = sys.argv[1], *map(json.loads, sys.argv[2:4]), sys.argv[4]
llm = LLM(folder, dtype="float32", enforce_eager=True)
answers = [
    {
        "prompt": answer.prompt_token_ids,
        "ids": list(answer.outputs[0].token_ids),
        "logprobs": [at[i].logprob for i, at in
                     zip(answer.outputs[0].token_ids, answer.outputs[0].logprobs)],
    }
    for answer in llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=count, logprobs=1)
    )
]
with open(out, "w") as file:
    json.dump(answers, file)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    flags = ["--dataset", "toy", "--num_stories", "2000", "--tokenizer", "bpe:600"]
    assert prepare_data.main([*flags, "--out_dir", str(folder)]) == 0
    return folder


def trained(data: Path, folder: Path, flags: list[str]) -> Path:
    """Return a checkpoint of a short training: random weights have no text to agree on."""
    sizes = ["--transformer_blocks", "2", "--context_length", "128", "--batch_size", "4"]
    pace = ["--max_steps", "100", "--warmup_steps", "10", "--val_interval", "100"]
    places = ["--data_dir", data, "--ckpt_dir", folder, "--graph_dir", folder / "graphs"]
    assert (
        train.main(
            [*flags, *sizes, *pace, *map(str, places), "--val_steps", "2", "--device", "cpu"]
        )
        == 0
    )
    return folder / "latest.pt"


def in_vllm(folder: Path, out: Path) -> list[dict]:
    """Return what vLLM makes of the prompts: ids of the prompt, new ids and their logprobs."""
    command = [PYTHON, "-c", IN_VLLM, folder, json.dumps(PROMPTS), str(NEW_TOKENS), out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(out.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_greedy_text_and_logits(family, data, tmp_path, capsys):
    """The prompt alone is given: the folder's tokenizer puts the start token before it."""
    ckpt = trained(data, tmp_path / "ckpt", FAMILIES[family])
    assert main(["--ckpt", str(ckpt), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    answers = in_vllm(tmp_path / "out", tmp_path / "answers.json")
    predictor, settings = predictor_of(
        str(ckpt), temperature=0.0, max_new_tokens=NEW_TOKENS, dtype="float32"
    )
    end, (model, _) = predictor.tokenizer.end_of_text_id, load_model(str(ckpt))
    same = total = 0
    largest = 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        list(predictor.stream(prompt, settings))
        assert answer["prompt"] == predictor.prompt_ids(prompt)
        ours, theirs = predictor.last.ids, [i for i in answer["ids"] if i != end]
        same += sum(a == b for a, b in zip(ours, theirs, strict=False))
        total += len(ours)
        assert len(ours) == len(theirs)
        ids_BT = torch.tensor([answer["prompt"] + answer["ids"]])
        logits_TV = logits_of(model, ids_BT)[0, len(answer["prompt"]) - 1 : -1]
        of_ids = logits_TV.log_softmax(-1).gather(1, ids_BT[:, len(answer["prompt"]) :].T)[:, 0]
        difference = (of_ids - torch.tensor(answer["logprobs"])).abs().max().item()
        # A logprob is a logit and the logarithm of a sum of exponentials: each may be off.
        allowed = 2 * logits_bound(model.config, ids_BT.shape[1]) * size_of(logits_TV)
        assert difference <= allowed, (prompt, difference, allowed)
        largest = max(largest, difference)
    with capsys.disabled():
        print(
            f"\nvLLM, {family}: {same} of {total} greedy tokens as predict.py's, "
            f"largest difference of a logprob {largest:.1e}"
        )
    assert same == total and total > 3 * NEW_TOKENS // 2
