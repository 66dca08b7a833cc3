"""Four changes of the model as a researcher would make them, and what every fast path and export
says of each.

python -m tests.changed_models NAME FOLDER what is said, as JSON, in a copy with the change python
-m tests.changed_models NAME FOLDER onnx the export to ONNX alone: it takes longest

FOLDER holds a published model.

tests/checks/test_changed_models.py makes the copies, applies CHANGES and reads the answers.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

# (file, text that occurs once, text in its place)
Edit = tuple[str, str, str]
SOFTMAX = "        probabilities_NE = logits_NE.softmax(dim=-1)\n"
SIGMOID = "logits_NE.sigmoid() / logits_NE.sigmoid().sum(dim=-1, keepdim=True)"
FIELD_BEFORE = "    capacity_factor: float = option(\n        0.0,"
DISPATCH = "        y_NC = self.dispatcher(x_NC, weights_NK, experts_NK, counts_E, self.experts)\n"
MOE = "class MoE(nn.Module):\n"
SHARED_EXPERT = '''class SharedExpert(nn.Module):
    """A feed-forward network that every token passes through (DeepSeekMoE)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.shared_d_ff, bias=False)
        self.down = nn.Linear(config.shared_d_ff, config.d_model, bias=False)

    def forward(self, x_NC: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x_NC)))


'''
DISPATCHER = "        self.dispatcher = LocalDispatcher()\n"
NORM2 = "        self.norm2 = RMSNorm(config.d_model, eps=config.rms_norm_eps)\n"
ADD_ATTENTION = (
    "        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), rope, cache, starts_BT)\n"
)

CHANGES: dict[str, list[Edit]] = {
    "sigmoid in place": [("model_parts.py", SOFTMAX, f"        probabilities_NE = {SIGMOID}\n")],
    "sigmoid by a field": [
        (
            "config_model.py",
            FIELD_BEFORE,
            '    router_scores: str = option("softmax", "scores", choices=("softmax", "sigmoid"))\n'
            + FIELD_BEFORE,
        ),
        (
            "model_parts.py",
            SOFTMAX,
            f"        probabilities_NE = {SIGMOID}\n"
            f'        if self.scores == "softmax":\n    {SOFTMAX}',
        ),
        (
            "model_parts.py",
            "        self.num_experts, self.top_k = config.num_experts, config.top_k\n",
            "        self.num_experts, self.top_k = config.num_experts, config.top_k\n"
            "        self.scores = config.router_scores\n",
        ),
    ],
    "shared expert": [
        (
            "config_model.py",
            FIELD_BEFORE,
            '    shared_d_ff: int = option(0, "hidden features of a shared expert", minimum=0)\n'
            + FIELD_BEFORE,
        ),
        ("model_parts.py", MOE, SHARED_EXPERT + MOE),
        (
            "model_parts.py",
            DISPATCHER,
            DISPATCHER
            + "        self.shared = SharedExpert(config) if config.shared_d_ff else None\n",
        ),
        (
            "model_parts.py",
            DISPATCH,
            DISPATCH
            + "        if self.shared is not None:\n            y_NC = y_NC + self.shared(x_NC)\n",
        ),
    ],
    "extra norm": [
        (
            "model_parts.py",
            NORM2,
            NORM2 + "        self.norm3 = RMSNorm(config.d_model, eps=config.rms_norm_eps)\n",
        ),
        (
            "model_parts.py",
            ADD_ATTENTION,
            "        y_BTC = self.attention(self.norm1(x_BTC), rope, cache, starts_BT)\n"
            "        x_BTC = x_BTC + self.norm3(y_BTC)\n",
        ),
    ],
}
FIELDS = {"sigmoid by a field": {"router_scores": "sigmoid"}, "shared expert": {"shared_d_ff": 16}}
IDS = list(range(40, 60))


def said_by(function, *arguments) -> list:
    """[how it ended, its last line]: 0 or the error's name; what a user would see."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = function(*arguments)
        except (
            ValueError,
            AssertionError,
            KeyError,
            RuntimeError,
            AttributeError,
            TypeError,
        ) as error:
            return [type(error).__name__, str(error)]
    return [code, out.getvalue().strip()]


def onnx_answers(fields: dict) -> list:
    """What the export to ONNX says of a model with these fields."""
    from config_model import TrainConfig
    from runtime.checkpoint.write import save_checkpoint
    from runtime.data.tokenizers import load_tokenizer
    from scripts import export_onnx
    from tests.builders import random_model, tiny_config

    model = random_model(tiny_config(vocabulary_size=260, context_length=64, **fields))
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(
            Path(folder) / "checkpoints",
            1,
            model,
            None,
            train_config=TrainConfig(),
            tokenizer_state=load_tokenizer("byte").to_state(),
        )
        return said_by(export_onnx.main, ["--ckpt", str(path), "--out", f"{folder}/m.onnx"])


def import_answers(published: str) -> list:
    """What the import of a published model says."""
    from scripts import import_hf

    with tempfile.TemporaryDirectory() as folder:
        return said_by(import_hf.main, ["--model", published, "--out", f"{folder}/m.pt"])


def answers(fields: dict, exports: bool = True) -> dict:
    """What a model with these fields brings about: lines of decoders, reports and exports."""
    import torch

    import predict
    import test as size_report
    from config_model import TrainConfig
    from model import generate
    from runtime.checkpoint.write import save_checkpoint
    from runtime.checks import known
    from runtime.data.tokenizers import load_tokenizer
    from runtime.inference.decoder import Decoder
    from runtime.inference.decoder import generate as fast_generate
    from runtime.kernels.choose import choose_kernels
    from scripts import draw_architecture, export_gguf, export_hf
    from tests.builders import random_model, tiny_config

    torch.set_num_threads(1)
    config = tiny_config(vocabulary_size=260, context_length=64, **fields)
    model = random_model(config).eval()
    said: dict = {}
    # The changed code itself; a decoder takes away the kernels that compute something else.
    plain = [int(i) for i in generate(model, torch.tensor([IDS]), 30, temperature=0)]
    choose_kernels(model, torch.device("cpu"), torch.float32)
    for native in (True, False):
        decoder = Decoder(model, native=native)
        texts = decoder.texts(1, 64)
        drawn = [
            token
            for pairs in fast_generate(decoder, texts, [IDS], 30, temperature=0)
            for _, token in pairs
        ]
        said["c_kernel" if native else "step"] = {
            "why_not_native": decoder.why_not_native,
            "why_not_step": decoder.why_not_step,
            "note": decoder.note,
            "is_native": decoder.native is not None,
            "same_text": drawn == plain,
        }
    said["initial"], said["counts"] = known.initial_note(config), known.counts(config).note
    said["total_is_real"] = known.counts(config).total == sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = str(
            save_checkpoint(
                Path(folder) / "checkpoints",
                1,
                model,
                None,
                train_config=TrainConfig(),
                tokenizer_state=load_tokenizer("byte").to_state(),
            )
        )
        said["predict"] = said_by(
            predict.main,
            ["--ckpt", path, "--prompt", "abc", "--temperature", "0", "--max_new_tokens", "8"],
        )
        said["test.py"] = said_by(size_report.main, ["--ckpt", path])
        said["export_gguf"] = said_by(
            export_gguf.main, ["--ckpt", path, "--out", f"{folder}/m.gguf"]
        )
        said["export_hf"] = said_by(export_hf.main, ["--ckpt", path, "--out", f"{folder}/hf"])
        if exports:
            flags = [flag for name, value in fields.items() for flag in (f"--{name}", str(value))]
            said["draw"] = said_by(
                draw_architecture.main, ["--preset", "nano", "--out", f"{folder}/a.png", *flags]
            )
            said["custom_code"] = said_by(
                export_hf.main, ["--ckpt", path, "--out", f"{folder}/custom", "--custom_code"]
            )
    return said


def main(name: str, published: str, *rest: str) -> None:
    from tests.shared_checks import fields_not_varied

    if rest:
        print(json.dumps(onnx_answers(FIELDS.get(name, {}))))
        return
    said = answers(FIELDS.get(name, {}))
    said["import_hf"] = import_answers(published)
    if name in FIELDS:
        said["at its default"] = answers({}, exports=False)
    print(json.dumps(said | {"not varied": fields_not_varied()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
