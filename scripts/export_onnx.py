"""Write a checkpoint as an ONNX model with a KV cache, for onnxruntime on any machine.

One graph reads prompts and continues them. Its inputs are `input_ids` [batch, tokens] int64 and,
for each block N, `past_key_values.N.key` and `.value` [batch, kv_heads, past, head_dim]: what
earlier calls gave (past = 0: nothing yet). Its outputs are `logits` [batch, tokens, vocabulary]
float32 and `present.N.key` and `.value` [batch, kv_heads, past + tokens, head_dim], the next call's
past. Batch, tokens and past may be anything in each call; all rows of a batch have the same length
(it takes no padding mask). The names are those that Optimum and onnxruntime-genai use. Where a
block has a window, pass all keys on all the same: positions are counted from their number.

Next to OUT.onnx: OUT.tokenizer.json, for the `tokenizers` package, and OUT.onnx.data with the
weights where they are more than one ONNX file can hold (2 GB). The model's metadata hold our
config, the tokenizer's name, the id that is prepended to a text (or nothing), end-of-text's id, and
a JSON list of all ids that end a completion. With --tokenizer none there is no tokenizer.json, and
the metadata name no ids.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config_model import ModelConfig
from model import LLM
from model_parts import Experts, activate
from runtime.base.cli import run_main
from runtime.base.files import fsync_folder
from runtime.checkpoint.read import build_model
from runtime.checks.known import counts
from runtime.data.hf_tokenizer import write_tokenizer
from runtime.data.tokenizer import COMPACT, NoTokenizer
from runtime.interop.export import (
    DTYPES,
    Source,
    check_ids,
    check_logits,
    check_output,
    export_parser,
    flush,
    largest_difference,
    logits_of,
    open_source,
    work_folder,
)

OPSET = 20  # the first with an exact GELU
GROUPED_LINEAR = "gptoss::GroupedLinear"
MOST_BYTES_IN_ONE_FILE = 1_900_000_000  # protobuf ends at 2 GiB
SINGLE_TOKENS = 4  # fed one by one in the check
BESIDES_BYTES = 1 << 26  # room for the tokenizer and the graph


# ------------------------------------------------------------------------------------------ tracing
class GivenPast:
    """A KV cache over tensors that were handed in, for tracing.

    Nothing is written in place, and `length` may be symbolic.
    """

    per_row = False

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        self.keys, self.values, self.length = list(keys), list(values), keys[0].shape[2]
        self.is_ring = [False] * len(keys)

    def query_positions(self, T: int, device) -> Tensor:
        return torch.arange(self.length, self.length + T, device=device)

    def check_fits(self, B: int, T: int) -> None:
        """They always do: the result is a new tensor."""

    def update(self, block: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[block] = torch.cat((self.keys[block], k_BGTD), dim=2)
        self.values[block] = torch.cat((self.values[block], v_BGTD), dim=2)
        return self.keys[block], self.values[block]

    def key_positions(self, block: int, T: int) -> Tensor:
        return torch.arange(self.length + T, device=self.keys[block].device)

    def advance(self, T: int) -> None:
        """The next call gets its length from what it is given."""


def dispatch(
    x_NC: Tensor, weights_NK: Tensor, experts_NK: Tensor, counts_E: Tensor, experts: Experts
) -> Tensor:
    """Do LocalDispatcher's work in operations that ONNX has, and GroupedLinear.

    `unrolled` replaces the latter. Every expert multiplies its own rows only, which is faster than
    all experts on all rows, for prompts (2.5 times at 8 experts) and single tokens alike, and than
    gathering the chosen experts' matrices. Traced as one operation, because torch.export needs
    minutes for some hundred pieces of unknown length.
    """

    def grouped_linear(x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None) -> Tensor:
        return torch.onnx.ops.symbolic(
            GROUPED_LINEAR,
            (x_RI, w_EOI, counts_E, b_EO),
            dtype=x_RI.dtype,
            shape=(x_RI.shape[0], w_EOI.shape[1]),
            version=1,
        )

    N, K = experts_NK.shape
    order_R = experts_NK.flatten().argsort()
    h_RF = activate(
        grouped_linear(x_NC[order_R // K], experts.w_in, experts.b_in), experts.activation
    )
    y_NKC = grouped_linear(h_RF, experts.w_out, experts.b_out)[order_R.argsort()].view(N, K, -1)
    return (y_NKC * weights_NK[:, :, None]).sum(dim=1)


class WithPast(nn.Module):
    """(ids [B, T], keys, values) -> (logits [B, T, V] float32, all keys, all values)."""

    def __init__(self, model: LLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, keys: list[Tensor], values: list[Tensor]):
        past = GivenPast(keys, values)
        return self.model(input_ids, cache=past).logits.float(), past.keys, past.values


def past_names(config: ModelConfig, prefix: str) -> list[str]:
    """Names of a call's keys, then of its values, by block."""
    return [
        f"{prefix}.{block}.{kind}"
        for kind in ("key", "value")
        for block in range(config.transformer_blocks)
    ]


def to_onnx(model: LLM):
    """Return the graph of a model in eval mode, as an onnx_ir.Model that shares its weights.

    The model is left as it was.
    """
    config, dtype = model.config, model.embed.weight.dtype
    L, Dim = config.transformer_blocks, torch.export.Dim
    # Any sizes but 0 and 1, which torch.export takes for constants; the graph is then right for
    # these as well.
    past = [
        torch.zeros(2, config.num_kv_heads, 4, config.attention_head_dim, dtype=dtype)
        for _ in range(2 * L)
    ]
    batch, tokens, length = Dim("batch"), Dim("tokens"), Dim("past")
    before = [block.moe.dispatcher for block in model.layers]
    # It warns that torchvision is not there.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        # It would end the tracing, as tokens are unknown. Beyond a learned table ONNX's own shapes
        # do not fit.
        model.check_length = lambda tokens: None
        for block in model.layers:
            block.moe.dispatcher = dispatch
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                WithPast(model),
                (torch.zeros(2, 3, dtype=torch.int64), past[:L], past[L:]),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=["input_ids", *past_names(config, "past_key_values")],
                output_names=["logits", *past_names(config, "present")],
                dynamic_shapes={
                    "input_ids": {0: batch, 1: tokens},
                    "keys": [{0: batch, 2: length}] * L,
                    "values": [{0: batch, 2: length}] * L,
                },
            )
    finally:
        del model.check_length
        for block, dispatcher in zip(model.layers, before, strict=True):
            block.moe.dispatcher = dispatcher
    return unrolled(program.model)


def unrolled(graph_model):
    """Return the graph with each GroupedLinear as a Split, a Gemm for each expert, and a Concat."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = graph_model.graph

    # torch.onnx stores equal weights once: blocks whose biases are all 0 share them.
    @functools.cache
    def parts(stacked: ir.Value) -> list[ir.Value]:
        """Initializers of each expert's own part: views, so that no memory is needed for them."""
        values = [
            ir.Value(name=f"{stacked.name}.{e}", const_value=ir.tensor(part))
            for e, part in enumerate(stacked.const_value.numpy())
        ]
        for value in values:
            value.shape, value.type = (
                value.const_value.shape,
                ir.TensorType(value.const_value.dtype),
            )
            graph.register_initializer(value)
        return values

    for node in [node for node in graph if node.op_type == GROUPED_LINEAR.split("::")[1]]:
        x_RI, w_EOI, counts_E, b_EO = (*node.inputs, None)[:4]
        w_OI = parts(w_EOI)
        split = ir.node("Split", [x_RI, counts_E], {"axis": 0}, num_outputs=len(w_OI))
        gemms = [
            ir.node("Gemm", inputs, {"transB": 1})
            for inputs in zip(
                split.outputs, w_OI, *([] if b_EO is None else [parts(b_EO)]), strict=True
            )
        ]
        concat = ir.node("Concat", [gemm.outputs[0] for gemm in gemms], {"axis": 0})
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [split, *gemms, concat], node.outputs, concat.outputs
        )
    RemoveUnusedNodesPass()(graph_model)  # and the stacked weights
    del graph_model.opset_imports[GROUPED_LINEAR.split("::")[0]]
    return graph_model


def in_float16(graph_model) -> None:
    """Store float32 matrices that float16 holds exactly in float16, each followed by a Cast.

    onnxruntime does the Cast once, when it loads.
    """
    import onnx_ir as ir

    graph = graph_model.graph
    for value in list(graph.initializers.values()):
        numbers = value.const_value.numpy()
        if (
            numbers.dtype == np.float32
            and numbers.ndim >= 2
            and np.array_equal(half := numbers.astype(np.float16), numbers)
        ):
            stored = ir.Value(
                name=f"{value.name}.float16",
                shape=value.shape,
                type=ir.TensorType(ir.DataType.FLOAT16),
                const_value=ir.tensor(half),
            )
            graph.register_initializer(stored)
            cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
            graph.insert_before(graph[0], cast)
            value.replace_all_uses_with(cast.outputs[0])
            del graph.initializers[value.name]


# ------------------------------------------------------------------------------------------- output
def metadata(source: Source) -> dict[str, str]:
    """What a user of the file may need to know, as strings."""
    tokenizer = source.tokenizer
    is_unknown = isinstance(tokenizer, NoTokenizer)
    return {
        "config": json.dumps(dataclasses.asdict(source.model.config)),
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": "" if is_unknown else tokenizer.fingerprint,
        "start_id": "" if tokenizer.start_id is None else str(tokenizer.start_id),
        "end_of_text_id": "" if is_unknown else str(tokenizer.end_of_text_id),
        "stop_ids": json.dumps(list(tokenizer.all_stop_ids)),
        "steps": str(source.checkpoint.step),
    }


def companions(out: Path) -> list[Path]:
    """The files of an export, in the order in which they get their names: the model last."""
    return [out.with_suffix(".tokenizer.json"), out.with_name(out.name + ".data"), out]


@contextlib.contextmanager
def staged_files(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Give a temporary folder for the files of `companions`, under their final names.

    The model names its data, so the names must be final. If the block ends well the files are moved
    into place: what an earlier export left goes first and the model comes last, so no model is ever
    next to another's weights.
    """
    with work_folder(out, needed_bytes) as folder:
        yield folder
        flush(folder)
        for path in reversed(companions(out)):
            path.unlink(missing_ok=True)
        for path in companions(out):
            if (folder / path.name).exists():
                os.replace(folder / path.name, path)
        fsync_folder(out.parent)


def write_files(folder: Path, name: str, graph_model, source: Source) -> int:
    """Write the model and what belongs to it; bytes of all files."""
    import onnx_ir as ir

    config, tokenizer = source.model.config, source.tokenizer
    if tokenizer.name.endswith(COMPACT):
        print(
            f"no tokenizer.json: no BPE spells as {tokenizer.name} does; runtime.data.tokenizer "
            "makes its ids"
        )
    elif not isinstance(tokenizer, NoTokenizer):
        # write_tokenizer also writes files that only transformers reads.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            write_tokenizer(tokenizer, Path(aside), config.context_length)
            os.replace(Path(aside) / "tokenizer.json", folder / companions(Path(name))[0].name)
    graph_model.metadata_props.update(metadata(source))
    weights = sum(value.const_value.nbytes for value in graph_model.graph.initializers.values())
    ir.save(
        graph_model,
        folder / name,
        external_data=f"{name}.data" if weights > MOST_BYTES_IN_ONE_FILE else None,
    )
    return sum(path.stat().st_size for path in folder.iterdir())


# -------------------------------------------------------------------------------------------- check
def open_session(path: Path):
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(
    session, config: ModelConfig, ids_BT: Tensor, past: list[np.ndarray] | None = None
) -> tuple[Tensor, list[np.ndarray]]:
    """(logits [B, T, V], the past of the next call) after a call's `past`, or after nothing."""
    names = past_names(config, "past_key_values")
    if past is None:
        past = [
            np.zeros((len(ids_BT), config.num_kv_heads, 0, config.attention_head_dim), np.float32)
        ] * len(names)
    logits, *past = session.run(
        None, {"input_ids": ids_BT.numpy(), **dict(zip(names, past, strict=True))}
    )
    return torch.from_numpy(logits), past


def checked_parts(ids_1T: Tensor) -> tuple[Tensor, int]:
    """Return (ids [2, T]: a text and its reverse; how many tokens at the end come one by one)."""
    return torch.cat((ids_1T, ids_1T.flip(1))), min(SINGLE_TOKENS, ids_1T.shape[1] - 1)


def expected_logits(model: LLM, ids_1T: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `check` compares with.

    Logits [1, T, V] of the text, and [2, 1 + single tokens, V] at the end of the two texts.
    """
    ids_2T, singles = checked_parts(ids_1T)
    return logits_of(model, ids_1T), logits_of(model, ids_2T)[:, -1 - singles :].clone()


def check(
    path: Path, config: ModelConfig, ids_1T: Tensor, whole: Tensor, end: Tensor, dtype: str
) -> None:
    """Compare what was written with `expected_logits`: in one call, and through the cache.

    Raise ExportError if it is off.
    """
    session = open_session(path)
    check_logits(f"onnxruntime, {dtype}, one call", whole, run(session, config, ids_1T)[0], config)
    ids_2T, singles = checked_parts(ids_1T)
    logits, past = run(session, config, ids_2T[:, : ids_2T.shape[1] - singles])
    pieces = [logits[:, -1:]]
    for i in range(-singles, 0):
        logits, past = run(session, config, ids_2T[:, ids_2T.shape[1] + i :][:, :1], past)
        pieces.append(logits)
    check_logits(
        f"onnxruntime, {dtype}, token by token after a prompt",
        end,
        torch.cat(pieces, dim=1),
        config,
    )


def round_to_float16(model: LLM) -> None:
    """Round in place the weights that `in_float16` stores so; they stay float32 tensors.

    Raise ValueError for one that float16 cannot hold.
    """
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float16).float()
        if not p.isfinite().all():
            raise ValueError(f"{name} has values beyond float16's 65504: leave --dtype float32")


def main(argv: list[str] | None = None) -> int:
    p = export_parser(
        __doc__.splitlines()[0],
        "model to write, NAME.onnx; NAME.tokenizer.json is written next to it, and NAME.onnx.data "
        "with the weights if they are more than one file can hold (2 GB)",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16"),
        help="how the weights are stored (default: float32; float16: half the file; computed with "
        "a float32 cache either way)",
    )
    args = p.parse_args(argv)
    started = time.perf_counter()
    if Path(args.out).suffix != ".onnx":
        raise ValueError(f"--out must be a file NAME.onnx, not {args.out!r}")
    for path in companions(Path(args.out)):
        check_output(path, args.force, source=args.ckpt)
    for library in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(library)
        except ImportError:
            raise ValueError(
                f"exporting to ONNX needs {library}: pip install onnx onnxscript onnxruntime"
            ) from None
    out, source = Path(args.out), open_source(args)
    config = source.checkpoint.model_config
    model = build_model(source.checkpoint)  # all of it: source.model may hold a block at a time
    ids_1T = check_ids(source.tokenizer, config)
    with staged_files(
        out, counts(config).total * DTYPES[args.dtype].itemsize + BESIDES_BYTES
    ) as folder:
        if args.dtype == "float16":
            exact = logits_of(model, ids_1T)
            round_to_float16(model)
        expected = expected_logits(model, ids_1T)
        if args.dtype == "float16":
            moved = largest_difference(exact, expected[0])
            print(f"check: rounding the weights to float16 moves the logits by up to {moved:.1e}")
        graph_model = to_onnx(model)
        if args.dtype == "float16":
            in_float16(graph_model)
        num_bytes = write_files(folder, out.name, graph_model, source)
        check(folder / out.name, config, ids_1T, *expected, args.dtype)
    seconds = time.perf_counter() - started
    print(
        f"{out}: {counts(config).total:,} parameters in {args.dtype}, {num_bytes / 1e6:,.1f} MB, "
        f"{seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
