"""Faults put back into copies of the code, one at a time, each of which the tests must notice.

    python -m tests.mutants                  all of them: ten minutes of one core, fewer of two,
                                             into benchmarks/results/mutants.json
    python -m tests.mutants --only T2 M6.2   those of some faults (of the reference implementation, as the tests' docstrings number them), or single ones
    python -m tests.mutants -j 1             one at a time; else as many as there are cores, up to 4

A mutant is a few changed characters and the tests that should fail for it. Before, all of these tests must pass on the unchanged
copy, or a mutant would prove nothing. Exit code 1 if one survives.
Some need what their tests need: a C compiler, Chromium. Without it they survive, and say why.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from benchmarks.common import REPO, SHARED, save_results
from runtime.base import cli

HANG_SECONDS = 600  # a mutant takes about three
# Unless more are asked for: each has a copy of the tree and a process with the libraries.
MOST_JOBS = 4
CAUGHT = (
    1,
    2,
)  # pytest's exit codes: tests failed; a module could not be collected, or a Ctrl-C came through

# The faults of the reference implementation that were confirmed by running it: each must be mutated here, or be said not to apply. And those confirmed in part.
CONFIRMED = [
    "M1",
    "M2",
    "M2c",
    "M3",
    "M3b",
    "M4",
    "M4b",
    "M4c",
    "M4d",
    "M5",
    "M5b",
    "M5d",
    "M5f",
    "M6",
    "M7",
    "M8",
    "M9",
    "T1",
    "T2",
    "T3",
    "T4",
    "T6",
    "T7",
    "T8",
    "T9",
    "T10",
    "T11",
    "T12",
    "T13",
    "T14",
    "T16",
    "T17",
    "T18",
    "T19",
    "T21",
    "T22",
    "D1",
    "D3",
    "D5",
    "D6",
    "D7",
    "D8",
    "D9",
    "D10",
    "D13",
    "D15",
    "D16",
    "P1",
    "P2",
    "P3",
    "P4",
    "P5",
    "P7",
    "P8",
    "P9",
    "P10",
    "P12",
    "P13",
    "P14",
    "P15",
    "P16",
    "S1",
    "S2",
]
IN_PART = ["T5", "T15", "D2", "D4"]
OWN = "own"  # the fault of a mutant of code that the reference has nothing like

NOT_APPLICABLE: dict[str, str] = {}  # fault -> why nothing here can have it


@dataclass(frozen=True)
class Mutant:
    fault: str  # CONFIRMED, IN_PART or OWN
    what: str  # what is put back, in a line
    file: str
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # node ids for pytest; without [...] all cases of a test


def mutant(fault: str, what: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(fault, what, file, old, new, tuple(f"tests/{test}" for test in tests))


MUTANTS = [
    # ------------------------------------------------------------------------------------------------------------- the model
    mutant(
        "M1",
        "no causal mask in a cached prefill",
        "model_parts.py",
        "            return mask, False",
        "            return mask if cache is None else None, False",
        "test_model_parts.py::test_cached_logits_equal_uncached",
        "test_model_parts.py::test_no_gradient_flows_from_later_tokens",
    ),
    mutant(
        "M1",
        "no causal mask where the learned table is added",
        "model_parts.py",
        "return torch.where(mask, bias_BHTS, -math.inf), False",
        "return bias_BHTS, False",
        "test_model_parts.py::test_no_gradient_flows_from_later_tokens",
    ),
    mutant(
        "M1",
        "no causal mask in the second chunk of a prefill",
        "model_parts.py",
        "            if T == 1:  #",
        "            if T == 1 or start:  #",
        "test_model_parts.py::test_cached_logits_equal_uncached",
    ),
    mutant(
        "M1",
        "the mask shows one token too many",
        "model_parts.py",
        "visible_TS = distance_TS >= 0",
        "visible_TS = distance_TS >= -1",
        "test_model_parts.py::test_mask_rule",
    ),
    mutant(
        "M2",
        "the modern presets have the T x T table",
        "config_model.py",
        "use_attention_bias=False, rms_norm_eps=1e-6",
        "use_attention_bias=True, rms_norm_eps=1e-6",
        "test_config_model.py::test_modern_keeps_the_default_sizes_and_exports_as_qwen3_moe",
    ),
    mutant(
        "M2",
        "nobody says that 44 % of the parameters are the table",
        "test.py",
        "if table > 0.1 * total:",
        "if table > total:",
        "test_test.py::test_the_default_is_the_published_model_and_its_table_is_named",
    ),
    mutant(
        "M2c",
        "one token beyond the context is an error also without the table",
        "model.py",
        "if self.config.use_attention_bias and tokens > self.config.context_length:",
        "if tokens > self.config.context_length:",
        "test_model_parts.py::test_longer_context_than_trained",
    ),
    mutant(
        "M3",
        "the experts' weights stay float32 under autocast",
        "model_parts.py",
        "        w_EOI, b_EO = w_EOI.to(x_RI.dtype), None if b_EO is None else b_EO.to(x_RI.dtype)\n",
        "",
        "test_model_parts.py::test_router_is_float32_under_autocast",
    ),
    mutant(
        "M3",
        "the router runs in autocast's dtype",
        "model_parts.py",
        "with torch.autocast(x_NC.device.type, enabled=False):",
        "with torch.autocast(x_NC.device.type, enabled=torch.is_autocast_enabled(x_NC.device.type)):",
        "test_model_parts.py::test_router_is_float32_under_autocast",
    ),
    mutant(
        "M3b",
        "the rotary tables are rounded to the model's dtype",
        "model.py",
        "dtype = torch.promote_types(x_BTC.dtype, torch.float32)",
        "dtype = x_BTC.dtype",
        "test_mutants.py::test_positions_stay_exact_in_a_bfloat16_model",
    ),
    mutant(
        "M3b",
        "what the cache holds is not brought to the queries' dtype",
        "model_parts.py",
        "results.append(everything.to(k_BGTD.dtype))",
        "results.append(everything)",
        "test_model_parts.py::test_cache_keeps_the_dtype_asked_for",
    ),
    mutant(
        "M4",
        "a cache of another batch size is used",
        "model_parts.py",
        "if self.batch_size != B:",
        "if False:",
        "test_model_parts.py::test_cache_is_the_callers_and_its_limits_are_told",
    ),
    mutant(
        "M4b",
        "the cache is born in inference mode",
        "model_parts.py",
        "with torch.inference_mode(False):",
        "with torch.inference_mode(torch.is_inference_mode_enabled()):",
        "test_model_parts.py::test_cache_made_in_inference_mode_works_outside_it",
    ),
    mutant(
        "M4c",
        "generate leaves the model in eval mode",
        "model.py",
        "        model.train(was_training)",
        "        pass",
        "test_model.py::test_generation_leaves_the_model_as_it_was_and_wastes_no_forward_pass",
    ),
    mutant(
        "M4d",
        "a new text is answered with an earlier one's keys",
        "runtime/inference/decoder.py",
        "itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)",
        "pairs",
        "inference/test_decoder.py::test_what_the_cache_holds_is_not_read_again",
    ),
    mutant(
        "M4d",
        "a cache that is reset remembers",
        "model_parts.py",
        '"""Forget everything; the memory stays."""\n        self.length = 0',
        '"""Forget everything; the memory stays."""',
        "test_model.py::test_a_full_context_slides_or_stops",
    ),
    mutant(
        "M5",
        "the capacity forgets top_k",
        "model_parts.py",
        "math.ceil(capacity_factor * N * K / E - 1e-9)",
        "math.ceil(capacity_factor * N / E - 1e-9)",
        "test_model_parts.py::test_capacity_keeps_everything_at_balance_and_drops_by_weight",
    ),
    mutant(
        "M5b",
        "late rows of the batch are dropped first",
        "model_parts.py",
        "by_weight = weights_NK.detach().flatten().argsort(descending=True, stable=True)",
        "by_weight = torch.arange(N * K)",
        "test_model_parts.py::test_capacity_keeps_everything_at_balance_and_drops_by_weight",
    ),
    mutant(
        "M5d",
        "tokens are dropped unless one says otherwise, so rows of a batch influence each other",
        "config_model.py",
        "capacity_factor: float = option(0.0,",
        "capacity_factor: float = option(1.25,",
        "test_model_parts.py::test_rows_of_a_batch_do_not_meet",
    ),
    mutant(
        "M5f",
        "tokens are dropped at inference too",
        "model_parts.py",
        "if self.capacity_factor and self.training:",
        "if self.capacity_factor:",
        "test_model_parts.py::test_capacity_does_not_apply_at_inference",
    ),
    mutant(
        "M6",
        "the balance loss counts a token once per chosen expert",
        "model_parts.py",
        "share_E = counts_E.to(probabilities_NE.dtype) / counts_E.sum()",
        "share_E = counts_E.to(probabilities_NE.dtype) / len(probabilities_NE)",
        "test_model_parts.py::test_balance_loss_is_one_at_balance_and_top_k_does_not_matter",
    ),
    mutant(
        "M6",
        "the balance loss is in the validation loss",
        "train.py",
        "sums.append(torch.stack((out.cross_entropy_sum, out.num_targets",
        "sums.append(torch.stack((out.cross_entropy_sum + out.aux_loss * out.num_targets, out.num_targets",
        "test_train.py::test_validation_is_the_loss_and_draws_nothing",
    ),
    mutant(
        "M6",
        "the balance loss is in the reported training loss",
        "train.py",
        "losses = losses + torch.stack((out.cross_entropy_sum,",
        "losses = losses + torch.stack((out.cross_entropy_sum + valid_targets * out.aux_loss,",
        "test_mutants.py::test_the_logged_loss_is_the_cross_entropy_alone",
    ),
    mutant(
        "M7",
        "a block branches on what the router did, which breaks the graph",
        "model_parts.py",
        "probabilities_NE.shape[1], experts_NK.numel()",
        "probabilities_NE.shape[1], experts_NK.numel() if (experts_NK >= 0).all() else 0",
        "test_model.py::test_compiled_in_one_graph_whatever_the_experts_loads_are",
    ),
    mutant(
        "M8",
        "top_k above the number of experts is accepted",
        "config_model.py",
        "if self.top_k > self.num_experts:",
        "if False:",
        "test_config_model.py::test_bad_model_numbers_are_refused",
    ),
    mutant(
        "M8",
        "top_k 0 is accepted",
        "config_model.py",
        'option(2, "experts that each token is sent to", minimum=1',
        'option(2, "experts that each token is sent to", minimum=0',
        "test_config_model.py::test_bad_model_numbers_are_refused",
    ),
    mutant(
        "M8",
        "a negative capacity factor is accepted",
        "config_model.py",
        'lowest gates dropped first; 0 = dropless", minimum=0.0',
        'lowest gates dropped first; 0 = dropless", minimum=-9.0',
        "test_config_model.py::test_bad_model_numbers_are_refused",
    ),
    mutant(
        "M8",
        "text passes for a number",
        "config_model.py",
        "if type(value) is not kind:",
        "if False:",
        "test_config_model.py::test_bad_model_numbers_are_refused",
    ),
    mutant(
        "M9",
        "ids out of range reach the embedding",
        "model.py",
        "(ids_BT.min() < 0 or ids_BT.max() >= self.config.vocabulary_size):",
        "False:",
        "test_model.py::test_bad_ids_are_told",
    ),
    mutant(
        "M9",
        "the id behind the last passes",
        "model.py",
        "ids_BT.max() >= self.config.vocabulary_size",
        "ids_BT.max() > self.config.vocabulary_size",
        "test_model.py::test_bad_ids_are_told",
    ),
    mutant(
        "M9",
        "an empty input passes",
        "model.py",
        "if B == 0 or T == 0:",
        "if B == 0:",
        "test_model.py::test_bad_ids_are_told",
    ),
    # ------------------------------------------------------------------------------------------- training, resume, checkpoints
    mutant(
        "T1",
        "compiled blocks have a prefix in the checkpoint",
        "model.py",
        "        for block in self.layers:\n            block.compile(fullgraph=True, dynamic=False)",
        "        for i, block in enumerate(self.layers):\n            self.layers[i] = torch.compile(block, fullgraph=True, dynamic=False)",
        "test_mutants.py::test_compiling_in_place_renames_nothing",
    ),
    mutant(
        "T2",
        "a resume starts the data at 0",
        "train.py",
        "range(state.samples_seen, state.samples_seen + len(steps) * samples_per_step, samples_per_step)",
        "range(0, len(steps) * samples_per_step, samples_per_step)",
        "test_train.py::test_resuming_after_every_step_equals_the_straight_run[5]",
    ),
    mutant(
        "T2",
        "dropout's random numbers are wherever the process is",
        "train.py",
        "torch.manual_seed((config.seed * 1_000_003 + step) % 2 ** 63)",
        "pass",
        "test_train.py::test_resuming_after_every_step_equals_the_straight_run[5]",
    ),
    mutant(
        "T2",
        "the optimizer begins anew",
        "runtime/checkpoint/format.py",
        "        load_state_by_name(model, optimizer, checkpoint.optimizer)\n",
        "",
        "test_train.py::test_resuming_after_every_step_equals_the_straight_run[5]",
    ),
    mutant(
        "T2",
        "the loss scaler begins anew",
        "train.py",
        "    if state.scaler:\n",
        "    if False:\n",
        "test_train.py::test_float16_keeps_its_scaler_over_a_resume",
    ),
    mutant(
        "T2",
        "the run's settings are not taken up",
        "train.py",
        "TrainConfig(**source.train_config | free | folder",
        "TrainConfig(**free | folder | {'max_steps': 11, 'warmup_steps': 3}",
        "test_train.py::test_resuming_after_every_step_equals_the_straight_run[5]",
    ),
    mutant(
        "T3",
        "a file is written in place",
        "runtime/base/files.py",
        "temporary = path.with_name(path.name + TEMPORARY_SUFFIX)",
        "temporary = path",
        "base/test_files.py::test_an_error_while_writing_keeps_the_old_file_and_leaves_no_other",
        "base/test_files.py::test_the_old_file_is_whole_under_its_name_until_the_new_one_is",
    ),
    mutant(
        "T3",
        "a file is renamed before it is on the disk",
        "runtime/base/files.py",
        "            os.fsync(file.fileno())\n",
        "",
        "base/test_files.py::test_content_is_flushed_before_the_rename_and_the_folder_after_it",
    ),
    mutant(
        "T3",
        "the rename is not flushed",
        "runtime/base/files.py",
        "\n    fsync_folder(path.parent)\n",
        "\n",
        "base/test_files.py::test_content_is_flushed_before_the_rename_and_the_folder_after_it",
    ),
    mutant(
        "T3",
        "the old latest.pt goes before the new one is there",
        "runtime/base/files.py",
        "        os.replace(temporary, link)\n",
        "        link.unlink(missing_ok=True)\n        os.replace(temporary, link)\n",
        "base/test_files.py::test_a_link_that_cannot_be_renamed_leaves_the_old_one_and_nothing_over",
    ),
    mutant(
        "T3",
        "only latest.pt is tried",
        "runtime/checkpoint/format.py",
        "for path in [*(path for _, path in reversed(step_files(folder))), folder / LATEST, folder / BEST]:",
        "for path in [folder / LATEST]:",
        "checkpoint/test_checkpoint.py::test_find_latest_falls_back_and_says_what_it_skipped",
    ),
    mutant(
        "T4",
        "the weights' digests are not compared",
        "runtime/checkpoint/format.py",
        '_digests(model, "model", digests)',
        '_digests(model, "model")',
        "checkpoint/test_checkpoint.py::test_one_flip_in_a_tensor_names_that_tensor",
        "checkpoint/test_checkpoint.py::test_changes_that_keep_the_old_digests",
    ),
    mutant(
        "T4",
        "the optimizer's digests are not compared",
        "runtime/checkpoint/format.py",
        '_digests(state or {}, "optimizer", digests)',
        '_digests(state or {}, "optimizer")',
        "checkpoint/test_checkpoint.py::test_damage_to_the_optimizer_costs_a_resume_but_not_a_prediction",
    ),
    mutant(
        "T4",
        "the header's digest is not compared",
        "runtime/checkpoint/format.py",
        'if _plain(_dict(contents, "digests")).get("header") != _header_digest(header):',
        "if not _dict(contents, 'digests'):",
        "checkpoint/test_checkpoint.py::test_changes_that_keep_the_old_digests",
    ),
    mutant(
        "T5",
        "a checkpoint is unpickled",
        "runtime/checkpoint/format.py",
        "torch.load(path, weights_only=True,",
        "torch.load(path, weights_only=False,",
        "test_source.py::test_nothing_runs_what_a_file_says_and_no_error_is_swallowed",
        "checkpoint/test_checkpoint.py::test_every_torch_load_in_the_repo_is_weights_only",
    ),
    mutant(
        "T5",
        "the names in a pickle are not looked at",
        "runtime/checkpoint/format.py",
        ' or opcode.name == "GLOBAL" and argument not in PICKLE_GLOBALS:',
        ":",
        "checkpoint/test_checkpoint.py::test_hostile_pickles_do_nothing",
    ),
    mutant(
        "T6",
        "NaN weights are saved and loaded",
        "runtime/checkpoint/format.py",
        "if bad := [name for name, (_, finite) in results.items() if not finite]:",
        "if bad := []:",
        "checkpoint/test_checkpoint.py::test_weights_or_moments_that_are_not_finite_are_not_saved",
        "checkpoint/test_checkpoint.py::test_malformed_checkpoints",
    ),
    mutant(
        "T6",
        "step -9 is loaded",
        "runtime/checkpoint/format.py",
        'if not 0 <= header["step"] < 1 << 63:',
        "if False:",
        "checkpoint/test_checkpoint.py::test_malformed_checkpoints",
    ),
    mutant(
        "T6",
        "types are not checked",
        "runtime/checkpoint/format.py",
        "if type(header[key]) not in kinds:",
        "if False:",
        "checkpoint/test_checkpoint.py::test_malformed_checkpoints",
    ),
    mutant(
        "T7",
        "a resume takes other settings without a word",
        "train.py",
        "if name not in FREE_ON_RESUME and value != saved.get(name):",
        "if False:",
        "test_train.py::test_resuming_with_other_settings_is_refused",
    ),
    mutant(
        "T7",
        "a resume may change top_k",
        "train.py",
        'FREE_ON_RESUME = {"data_dir",',
        'FREE_ON_RESUME = {"top_k", "data_dir",',
        "test_train.py::test_resuming_with_other_settings_is_refused[flags5---top_k 1 differs]",
    ),
    mutant(
        "T7",
        "tensors of other shapes are taken",
        "runtime/training/optimizer.py",
        "if given[name].shape != shape or given[name].dtype != dtype:",
        "if given[name].dtype != dtype:",
        "checkpoint/test_checkpoint.py::test_malformed_checkpoints",
        "training/test_optimizer.py::test_state_that_does_not_fit_is_named_and_changes_nothing",
    ),
    mutant(
        "T7",
        "a resume takes another text",
        "train.py",
        'if source.data_fingerprint != train.manifest["pair"]:',
        "if False:",
        "test_train.py::test_resume_with_other_text_is_refused",
    ),
    mutant(
        "T8",
        "a step with NaN is taken",
        "train.py",
        "optimizer.found_inf = bad.float()",
        "optimizer.found_inf = torch.zeros_like(norm)",
        "test_train.py::test_a_step_that_is_not_finite_changes_nothing",
    ),
    mutant(
        "T8",
        "only the loss is looked at, not the gradient",
        "train.py",
        "bad = ~torch.isfinite(norm + cross_entropy)",
        "bad = ~torch.isfinite(cross_entropy)",
        "test_train.py::test_a_step_that_is_not_finite_changes_nothing",
    ),
    mutant(
        "T8",
        "the balance of experts moves in a step that is skipped",
        "train.py",
        "model.balance_experts(torch.where(bad, 1.0, router[:, :-2]))",
        "model.balance_experts(router[:, :-2])",
        "test_mutants.py::test_a_skipped_step_moves_no_selection_bias",
    ),
    mutant(
        "T8",
        "metrics hold NaN, which is not JSON",
        "runtime/training/metrics.py",
        "            if not math.isfinite(value):\n",
        "            if False:\n",
        "training/test_metrics.py::test_non_finite_numbers_become_null_and_are_marked",
    ),
    mutant(
        "T8",
        "a run that never recovers goes on to the end, with exit code 0",
        "train.py",
        "if state.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW and (",
        "if False and (",
        "test_train.py::test_a_run_that_never_recovers_ends",
    ),
    mutant(
        "T9",
        "SIGTERM ends a run at once, unsaved",
        "train.py",
        '("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")',
        '("SIGINT", "SIGUSR1", "SIGHUP")',
        "test_mutants.py::test_every_polite_signal_is_a_wish_to_stop",
    ),
    mutant(
        "T9",
        "a run that is asked to stop saves nothing",
        "train.py",
        "or last or stopping:",
        "or last:",
        "test_train.py::test_resuming_after_every_step_equals_the_straight_run[5]",
    ),
    mutant(
        "T9",
        "the exit code does not say that it was stopped",
        "train.py",
        "return 128 + stop.signal",
        "return 0",
        "test_train.py::test_resuming_after_every_step_equals_the_straight_run[5]",
    ),
    mutant(
        "T10",
        "fewer steps than taken rewrite history",
        "train.py",
        "if config.max_steps < source.step:",
        "if False:",
        "test_train.py::test_fewer_steps_than_taken_are_refused_and_as_many_are_done",
    ),
    mutant(
        "T11",
        "--d_ff, --dropout and --aux_loss_coef are ignored",
        "runtime/base/cli.py",
        "for k, v in self.values.items() if k in names}",
        "for k, v in self.values.items() if k in names and k not in ('d_ff', 'dropout', 'aux_loss_coef')}",
        "base/test_cli.py::test_every_field_is_a_flag_that_reaches_the_config",
    ),
    mutant(
        "T11",
        "a settings file beats the flags",
        "runtime/base/cli.py",
        "Settings(values | file | flags,",
        "Settings(values | flags | file,",
        "base/test_cli.py::test_a_flag_beats_the_file_beats_the_preset_beats_the_default",
    ),
    mutant(
        "T11",
        "--dropout does not reach the experts",
        "model_parts.py",
        "config.expert_activation, config.dropout",
        "config.expert_activation, 0.0",
        "test_model_parts.py::test_expert_dropout_is_on_in_training_only",
    ),
    mutant(
        "T11",
        "--weight_decay does not reach the optimizer",
        "runtime/training/optimizer.py",
        "return AdamW(parameter_groups(model, config.weight_decay),",
        "return AdamW(parameter_groups(model, 0.1),",
        "training/test_optimizer.py::test_config_reaches_adamw_and_cpu_is_fused",
    ),
    mutant(
        "T11",
        "--grad_clip is ignored",
        "train.py",
        "parameters, losses[0], config.grad_clip,",
        "parameters, losses[0], 1.0,",
        "test_train.py::test_clipping_is_by_the_norm_of_the_whole_gradient",
    ),
    mutant(
        "T12",
        "half precision on a CPU is float32",
        "runtime/base/device.py",
        "    if dtype in (torch.bfloat16, torch.float16):\n        return torch.autocast",
        '    if dtype in (torch.bfloat16, torch.float16) and device.type == "cuda":\n        return torch.autocast',
        "base/test_device.py::test_autocast_changes_what_a_product_is_computed_in",
    ),
    mutant(
        "T13",
        "the sums of a log window are lost in a resume",
        "train.py",
        "torch.tensor(state.window[name], dtype=torch.float64) if name in state.window else zero for",
        "zero for",
        "test_train.py::test_sums_of_a_log_window_survive_a_resume_to_the_last_bit",
        "test_train.py::test_resuming_after_every_step_equals_the_straight_run[5]",
    ),
    mutant(
        "T13",
        "a window's sums go on into the next",
        "train.py",
        "            tensor.zero_()\n",
        "            pass\n",
        "test_train.py::test_a_window_s_numbers_are_means_over_its_steps",
    ),
    mutant(
        "T14",
        "tokens are counted from the resume on",
        "train.py",
        "return RunState(**source.run)",
        "return RunState(**source.run | {'tokens_seen': 0})",
        "test_train.py::test_resuming_after_every_step_equals_the_straight_run[5]",
    ),
    mutant(
        "T15",
        "a fresh run appends to another run's metrics",
        "runtime/training/metrics.py",
        "is another run's: moved to {self._move_aside('metrics')}\"",
        "is another run's\"",
        "training/test_metrics.py::test_a_fresh_run_never_appends_to_another_runs_metrics",
    ),
    mutant(
        "T15",
        "a resumed run's metrics have steps twice",
        "runtime/training/metrics.py",
        'elif record["step"] > last_step:',
        "elif False:",
        "training/test_metrics.py::test_resume_drops_what_will_be_made_again",
    ),
    mutant(
        "T16",
        "a torn last line of the metrics stops a resume",
        "runtime/training/metrics.py",
        "                    torn = True\n",
        "                    raise ValueError(problem)\n",
        "training/test_metrics.py::test_resume_drops_a_torn_last_line_and_says_so",
    ),
    mutant(
        "T17",
        "each validation draws its windows at random",
        "runtime/data/shards.py",
        "self.windows = [i * total // num_windows for i in range(num_windows)]",
        "self.windows = np.random.default_rng().integers(total, size=num_windows).tolist()",
        "data/test_shards.py::test_validation_windows_are_fixed_whole_batches_spread_over_the_set",
    ),
    mutant(
        "T17",
        "validation runs with dropout",
        "train.py",
        "    model.eval()\n    sums = []",
        "    sums = []",
        "test_train.py::test_validation_is_the_loss_and_draws_nothing",
    ),
    mutant(
        "T18",
        "the speed includes validation and saving",
        "train.py",
        "            started = time.perf_counter()\n            micro_batches,",
        "            started = vars(totals).setdefault('began', time.perf_counter()) + state.train_seconds\n            micro_batches,",
        "test_mutants.py::test_speed_excludes_validation_and_saving",
    ),
    mutant(
        "T19",
        "grad_accum 0 is accepted",
        "config_model.py",
        '"micro-batches per optimizer step", minimum=1',
        '"micro-batches per optimizer step", minimum=0',
        "test_config_model.py::test_bad_training_numbers_are_refused",
    ),
    mutant(
        "T19",
        "grad_clip -1, gradient ascent, is accepted",
        "config_model.py",
        '0 = no clipping", minimum=0.0',
        '0 = no clipping", minimum=-9.0',
        "test_config_model.py::test_bad_training_numbers_are_refused",
    ),
    mutant(
        "T19",
        "val_steps 0 is accepted",
        "config_model.py",
        'the same windows every time", minimum=1',
        'the same windows every time", minimum=0',
        "test_config_model.py::test_bad_training_numbers_are_refused",
    ),
    mutant(
        "T19",
        "log_interval 0 is accepted",
        "config_model.py",
        '"steps between log lines", minimum=1',
        '"steps between log lines", minimum=0',
        "test_config_model.py::test_bad_training_numbers_are_refused",
    ),
    mutant(
        "T19",
        "infinite and NaN settings are accepted",
        "config_model.py",
        "if kind is float and not math.isfinite(value):",
        "if False:",
        "test_config_model.py::test_bad_training_numbers_are_refused",
        "test_config_model.py::test_bad_model_numbers_are_refused",
    ),
    mutant(
        "T21",
        "a console that lacks a character ends the program",
        "runtime/base/cli.py",
        'stream.reconfigure(errors="replace")',
        "pass",
        "base/test_cli.py::test_any_console_can_show_any_text",
    ),
    mutant(
        "T22",
        "auto never takes MPS",
        "runtime/base/device.py",
        '"cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"',
        '"cuda" if torch.cuda.is_available() else "cpu"',
        "base/test_device.py::test_auto_takes_cuda_then_mps_then_the_cpu",
    ),
    mutant(
        "T22",
        "every checkpoint is kept",
        "runtime/checkpoint/format.py",
        "files[:-keep_last] if keep_last else []",
        "[]",
        "checkpoint/test_checkpoint.py::test_keep_last_prunes_and_never_what_latest_or_best_name",
    ),
    mutant(
        "T22",
        "the last validation is the best",
        "train.py",
        "(state.best_val_loss is None or val_loss < state.best_val_loss)",
        "True",
        "test_train.py::test_a_validation_that_is_not_finite_is_not_the_best",
    ),
    # --------------------------------------------------------------------------------------------------------------- the data
    mutant(
        "D1",
        "any JSON is a manifest",
        "runtime/data/shards.py",
        'if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:',
        "if not isinstance(manifest, dict):",
        "data/test_shards.py::test_a_manifest_that_is_none_is_refused",
    ),
    mutant(
        "D1",
        "99 shards of 5 tokens are accepted",
        "runtime/data/shards.py",
        'if m.get("num_shards") != len(shards) or m.get("total_tokens") != sum(shard["tokens"] for shard in shards):',
        "if False:",
        "data/test_shards.py::test_an_invented_manifest_is_refused",
    ),
    mutant(
        "D1",
        "a manifest's digest is not compared",
        "runtime/data/shards.py",
        'if manifest.get("seal") != _seal(manifest):',
        "if False:",
        "data/test_shards.py::test_no_flipped_bit_in_a_manifest_goes_unnoticed",
    ),
    mutant(
        "D2",
        "a shard may be shorter than it should",
        "runtime/data/shards.py",
        "if identity[0] != (expected :=",
        "if identity[0] > (expected :=",
        "data/test_shards.py::test_missing_and_empty_shards_are_refused",
    ),
    mutant(
        "D3",
        "numbers of another type or shape are tokens",
        "runtime/data/shards.py",
        'if file.read(HEADER_BYTES) != npy_header(self._shards[i]["tokens"]):',
        "if not file.read(HEADER_BYTES):",
        "data/test_shards.py::test_other_dtypes_and_shapes_are_refused",
    ),
    mutant(
        "D4",
        "a shard may be longer than it should",
        "runtime/data/shards.py",
        "if identity[0] != (expected :=",
        "if identity[0] < (expected :=",
        "data/test_shards.py::test_truncated_shards_are_refused",
    ),
    mutant(
        "D5",
        "the shards' digests are not compared",
        "runtime/data/shards.py",
        'if sha256_of_file(self._path(i)) != self._shards[i]["sha256"]:',
        "if False:",
        "data/test_shards.py::test_no_flipped_bit_in_a_shard_goes_unnoticed",
    ),
    mutant(
        "D5",
        "training does not ask for them",
        "runtime/data/shards.py",
        "def open_data(data_dir: str | Path, verify: bool = True)",
        "def open_data(data_dir: str | Path, verify: bool = False)",
        "test_mutants.py::test_training_reads_no_damaged_shard",
    ),
    mutant(
        "D6",
        "the tokens behind the last whole window are lost",
        "runtime/data/shards.py",
        "return math.ceil((shards.num_tokens - 1) / context_length)",
        "return (shards.num_tokens - 1) // context_length",
        "data/test_shards.py::test_an_epoch_uses_every_token_as_a_target",
    ),
    mutant(
        "D6",
        "the very last token is never a target",
        "runtime/data/shards.py",
        "last = shards.num_tokens - context_length - 1\n",
        "last = max(0, shards.num_tokens - context_length - 2)\n",
        "data/test_shards.py::test_an_epoch_uses_every_token_as_a_target",
    ),
    mutant(
        "D7",
        "shards are sorted by name",
        "runtime/data/shards.py",
        'self._shards: list[dict] = self.manifest["shards"]',
        'self._shards: list[dict] = sorted(self.manifest["shards"], key=lambda shard: shard["file"])',
        "data/test_shards.py::test_ten_thousand_shards_keep_their_order_and_few_files_open",
    ),
    mutant(
        "D8",
        "an id beyond the vocabulary is read",
        "runtime/data/shards.py",
        "if (largest := int(ids.max())) >= self.vocabulary_size:",
        "if (largest := int(ids.max())) > self.vocabulary_size:",
        "data/test_shards.py::test_ids_beyond_the_vocabulary_are_refused",
    ),
    mutant(
        "D9",
        "every shard in the folder is read",
        "runtime/data/shards.py",
        "        self.manifest = read_manifest(self.folder)\n",
        "        self.manifest = read_manifest(self.folder)\n"
        '        found = [{"file": p.name, "tokens": (p.stat().st_size - HEADER_BYTES) // 4, "sha256": sha256_of_file(p)} for p in sorted(self.folder.glob("shard_*.npy"))]\n'
        '        self.manifest = self.manifest | {"shards": found, "total_tokens": sum(shard["tokens"] for shard in found)}\n',
        "data/test_shards.py::test_files_that_the_manifest_does_not_list_are_not_read",
    ),
    mutant(
        "D9",
        "a new set is put among the old one's files",
        "runtime/data/shards.py",
        "            for name in _files_of_set(old):  # the manifest last: it says what is ours, should this be interrupted too\n"
        "                (old / name).unlink(missing_ok=True)\n            old.rmdir()\n        os.rename(ready / split, old)\n",
        "            for new in list((ready / split).iterdir()):\n                os.replace(new, old / new.name)\n            (ready / split).rmdir()\n"
        "        else:\n            os.rename(ready / split, old)\n",
        "test_prepare_data.py::test_rerun_leaves_nothing_of_the_earlier_set",
    ),
    mutant(
        "D10",
        "half a token is a shard's size",
        "prepare_data.py",
        "if 1 <= number <= LARGEST_COUNT and number == number.to_integral_value():",
        "if 0 < number <= LARGEST_COUNT:",
        "test_prepare_data.py::test_mistakes_are_refused_before_anything_happens[--shard_size 0.5]",
    ),
    mutant(
        "D13",
        "validation stories stay in train",
        "prepare_data.py",
        'None if digest in in_train else "val"',
        '"val"',
        "test_prepare_data.py::test_validation_files_lose_what_train_has",
    ),
    mutant(
        "D13",
        "the split is drawn, so that copies of a story land on both sides",
        "prepare_data.py",
        'return lambda digest: "val" if int.from_bytes(digest[:8], "big") < threshold else "train"',
        'return lambda digest: "val" if __import__("random").random() < threshold / 2**64 else "train"',
        "test_prepare_data.py::test_equal_documents_go_to_one_side",
    ),
    mutant(
        "D13",
        "white space makes another story",
        "prepare_data.py",
        "hashlib.blake2b(text.strip().encode(",
        "hashlib.blake2b(text.encode(",
        "test_prepare_data.py::test_equal_documents_go_to_one_side",
    ),
    mutant(
        "D15",
        "train of one run and val of another are used together",
        "runtime/data/shards.py",
        'if train.manifest["pair"] != val.manifest["pair"]:',
        "if False:",
        "data/test_shards.py::test_halves_of_two_runs_are_refused",
    ),
    mutant(
        "D16",
        "the manifest does not say where the text is from",
        "prepare_data.py",
        '"source": plan.description, **counts[split],',
        '"source": {}, **counts[split],',
        "test_prepare_data.py::test_manifest_says_where_it_all_comes_from",
    ),
    mutant(
        "D16",
        "nor which numbers it holds",
        "runtime/data/shards.py",
        '"total_tokens": self.total_tokens, "dtype": DTYPE.name,',
        '"total_tokens": self.total_tokens,',
        "test_prepare_data.py::test_manifest_says_where_it_all_comes_from",
    ),
    # -------------------------------------------------------------------------------------------------- inference and security
    mutant(
        "P1",
        "ids that stand for nothing are drawn",
        "model.py",
        "if banned_ids is not None and len(banned_ids):",
        "if False:",
        "test_model.py::test_undecodable_ids_are_never_drawn",
        "test_model.py::test_greedy_banned_and_extreme_settings",
    ),
    mutant(
        "P1",
        "the tokenizer's holes are not banned",
        "predict.py",
        "[i for i in self.tokenizer.undecodable_ids if i < vocabulary] + list(",
        "list(",
        "test_mutants.py::test_holes_of_a_vocabulary_are_banned",
    ),
    mutant(
        "P1",
        "ids beyond the tokenizer are not banned",
        "predict.py",
        " + list(range(self.tokenizer.vocabulary_size, vocabulary))",
        "",
        "test_predict.py::test_ids_beyond_the_tokenizer_are_never_drawn",
    ),
    mutant(
        "P2",
        "temperature -1 inverts the distribution",
        "model.py",
        "if not (math.isfinite(temperature) and temperature >= 0):",
        "if not math.isfinite(temperature):",
        "test_model.py::test_settings_without_a_meaning_are_refused",
    ),
    mutant(
        "P2",
        "temperature 1e-300 is a division by 0",
        "model.py",
        "min(max(temperature, 1e-30), 1e30)",
        "min(temperature, 1e30)",
        "test_mutants.py::test_temperatures_beyond_float32_draw_as_they_should",
    ),
    mutant(
        "P2",
        "temperature 1e300 overflows",
        "model.py",
        "min(max(temperature, 1e-30), 1e30)",
        "max(temperature, 1e-30)",
        "test_mutants.py::test_temperatures_beyond_float32_draw_as_they_should",
    ),
    mutant(
        "P3",
        "top_k above the vocabulary is an error",
        "model.py",
        "    if 0 < top_k < V or top_p < 1:\n        logits_BV, ids_BV = logits_BV.topk(min(top_k or V, V), dim=-1)",
        "    if top_k or top_p < 1:\n        logits_BV, ids_BV = logits_BV.topk(top_k or V, dim=-1)",
        "test_model.py::test_samples_follow_the_distribution",
    ),
    mutant(
        "P3",
        "top_k -5 is off",
        "model.py",
        "    if top_k < 0:\n",
        "    if False:\n",
        "test_model.py::test_settings_without_a_meaning_are_refused",
    ),
    mutant(
        "P4",
        "a prompt beyond the context loses its newest part's beginning",
        "runtime/inference/decoder.py",
        "ids = [list(prompt[-context:]) for prompt in prompts]",
        "ids = [list(prompt) for prompt in prompts]",
        "test_predict.py::test_the_context_limit_is_a_policy_and_no_text_is_lost",
    ),
    mutant(
        "P4",
        "the last place of the context is not used",
        "model.py",
        "if cache.length + next_BT.shape[1] > context:",
        "if cache.length + next_BT.shape[1] >= context:",
        "test_model.py::test_a_full_context_slides_or_stops",
    ),
    mutant(
        "P5",
        "a GPU that is not here is PyTorch's traceback",
        "runtime/base/device.py",
        'if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():',
        "if False:",
        "base/test_device.py::test_devices_that_are_not_here_are_refused_in_a_line",
    ),
    mutant(
        "P5",
        "bfloat16 is refused on a CPU",
        "runtime/base/device.py",
        "    if name not in DTYPES:\n",
        '    if name not in DTYPES or name == "bfloat16" and device.type == "cpu":\n',
        "base/test_device.py::test_a_dtype_is_honoured_or_refused",
    ),
    mutant(
        "P7",
        "what zipfile, pickle and torch raise comes through",
        "runtime/checkpoint/format.py",
        "except Exception as error:  # zipfile",
        "except ZeroDivisionError as error:  # zipfile",
        "checkpoint/test_checkpoint.py::test_malformed_checkpoints",
        "checkpoint/test_checkpoint.py::test_150_bit_flips_and_50_truncations",
    ),
    mutant(
        "P7",
        "an empty file is not told from a damaged one",
        "runtime/checkpoint/format.py",
        r'if magic != b"PK\3\4":',
        "if False:",
        "checkpoint/test_checkpoint.py::test_files_that_are_no_checkpoint",
    ),
    mutant(
        "P8",
        "what is missing is taken to be empty",
        "runtime/checkpoint/format.py",
        "if not isinstance(value := contents.get(key), dict):",
        "if not isinstance(value := contents.get(key, {}), dict):",
        "checkpoint/test_checkpoint.py::test_malformed_checkpoints",
    ),
    mutant(
        "P8",
        "a key of the header may be missing",
        "runtime/checkpoint/format.py",
        "        if key not in header:\n",
        "        if key not in header and header.setdefault(key, {}):\n",
        "checkpoint/test_checkpoint.py::test_malformed_checkpoints",
    ),
    mutant(
        "P9",
        "another tokenizer overrules the checkpoint's",
        "runtime/checkpoint/format.py",
        "if name and named_tokenizer(name).fingerprint != tokenizer.fingerprint:",
        "if False:",
        "test_predict.py::test_the_checkpoints_own_tokenizer_cannot_be_overruled",
    ),
    mutant(
        "P9",
        "a larger vocabulary than the model's is used",
        "runtime/checkpoint/format.py",
        "    if tokenizer.vocabulary_size > vocabulary:\n",
        "    if False:\n",
        "test_predict.py::test_a_checkpoint_without_tokenizer_needs_its_name",
    ),
    mutant(
        "P10",
        ":quantum quits",
        "predict.py",
        'if command == ":q" and not arguments:',
        'if command.startswith(":q"):',
        "test_predict.py::test_every_command_answers_with_a_line_and_the_session_goes_on",
    ),
    mutant(
        "P10",
        "a command without a value is a prompt",
        "predict.py",
        '        if line.startswith(":"):\n',
        '        if line.startswith(":") and (" " in line or line in (":q", ":help")):\n',
        "test_predict.py::test_every_command_answers_with_a_line_and_the_session_goes_on",
    ),
    mutant(
        "P10",
        "an answer that fails ends the session",
        "predict.py",
        "except (ValueError, RuntimeError) as error:  # out of memory",
        "except ZeroDivisionError as error:  # out of memory",
        "test_predict.py::test_an_answer_that_fails_does_not_end_the_session",
    ),
    mutant(
        "P12",
        "the seed is ignored",
        "predict.py",
        "generator.seed() if seed < 0 else generator.manual_seed(seed)",
        "generator.seed()",
        "test_predict.py::test_a_seed_repeats_an_answer_and_no_seed_does_not",
    ),
    mutant(
        "P13",
        "Ctrl-C ends the session and not the answer",
        "predict.py",
        "            except KeyboardInterrupt:\n                continue\n            except (ValueError",
        "            except KeyboardInterrupt:\n                raise\n            except (ValueError",
        "test_predict.py::test_ctrl_c_stops_the_answer_and_not_the_session",
    ),
    mutant(
        "P14",
        "half-precision logits are drawn from in half precision",
        "model.py",
        "    logits_BV = logits_BV.float()\n    is_finite_B",
        "    is_finite_B",
        "test_mutants.py::test_half_precision_logits_are_drawn_from_in_float32",
    ),
    mutant(
        "P15",
        "rows past their end go on drawing",
        "model.py",
        "drawn_B = torch.where(stopped_B, history_BT[:, -1], drawn_B)",
        "pass",
        "test_model.py::test_stop_ids_end_rows_and_then_the_call",
    ),
    mutant(
        "P15",
        "a batch's rows go on behind end-of-text",
        "runtime/inference/decoder.py",
        "if token in stop_ids or num_drawn[row]",
        "if num_drawn[row]",
        "inference/test_decoder.py::test_ragged_prompts_give_what_each_gives_alone",
    ),
    mutant(
        "P16",
        "each token costs two forward passes",
        "model.py",
        "            logits_BV = model(next_BT, cache=cache, last_token_only=True).logits[:, -1]",
        "            model(next_BT)\n            logits_BV = model(next_BT, cache=cache, last_token_only=True).logits[:, -1]",
        "test_model.py::test_generation_leaves_the_model_as_it_was_and_wastes_no_forward_pass",
    ),
    mutant(
        "P16",
        "a prefill makes all T x V logits",
        "model.py",
        "logits_BV = model(next_BT, cache=cache, last_token_only=True)",
        "logits_BV = model(next_BT, cache=cache)",
        "test_mutants.py::test_a_prompt_s_logits_are_those_of_its_last_token",
    ),
    mutant(
        "S1",
        "a model writes control characters to the terminal",
        "predict.py",
        "text = visible(text) if terminal else text",
        "pass",
        "test_predict.py::test_control_characters_are_spelled_out_on_a_terminal_only",
    ),
    mutant(
        "S1",
        "many answers do",
        "predict.py",
        "(visible(text) if sys.stdout.isatty() else text), flush=True)",
        "text, flush=True)",
        "test_mutants.py::test_many_answers_move_no_terminal_either",
    ),
    mutant(
        "S1",
        "the second block of control characters passes",
        "runtime/base/text.py",
        'unicodedata.category(c) == "Cc" and',
        'c < " " and',
        "base/test_text.py::test_visible_spells_out_whatever_moves_a_terminal",
    ),
    mutant(
        "S1",
        "an error line does",
        "runtime/base/cli.py",
        "visible(' '.join(str(error).split()))",
        "' '.join(str(error).split())",
        "base/test_cli.py::test_error_lines_do_not_write_to_the_terminal",
    ),
    mutant(
        "S2",
        "a config may ask for more than its file holds",
        "runtime/checkpoint/format.py",
        "if file_bytes is not None and dtype.itemsize * total_parameters(config) > file_bytes:",
        "if False:",
        "checkpoint/test_checkpoint.py::test_config_bombs_are_refused_before_the_module_is_built",
    ),
    mutant(
        "S2",
        "a zip bomb is unpacked",
        "runtime/checkpoint/format.py",
        "if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):",
        "if False:",
        "checkpoint/test_checkpoint.py::test_zip_bombs_are_refused_before_anything_is_unpacked",
    ),
    mutant(
        "S2",
        "a tensor of stride 0 is as large as it says",
        "runtime/checkpoint/format.py",
        "not tensor.is_contiguous() or tensor.is_neg()",
        "tensor.is_neg()",
        "checkpoint/test_checkpoint.py::test_malformed_checkpoints",
    ),
    mutant(
        "S2",
        "a header may be nested without end",
        "runtime/checkpoint/format.py",
        "if left < 0 or depth > DEPTH_LIMIT:",
        "if left < 0:",
        "checkpoint/test_checkpoint.py::test_lists_that_contain_one_another_end_quickly",
    ),
    # --------------------------------------------------------------------------------------------------- own: generation
    mutant(
        OWN,
        "no place behind a full text for steps that it takes no part in",
        "runtime/inference/decoder.py",
        "KVCache(self.config, count, max_tokens + 1,",
        "KVCache(self.config, count, max_tokens,",
        "inference/test_decoder.py::test_texts_that_take_no_part_in_a_step_keep_what_they_hold",
    ),
    mutant(
        OWN,
        "a NaN stays behind the end of the texts",
        "runtime/inference/decoder.py",
        "            tensor.zero_()\n",
        "            pass\n",
        "test_mutants.py::test_what_a_bad_answer_left_behind_a_shorter_text_counts_for_nothing",
    ),
    mutant(
        OWN,
        "the last token of a text that is there is not asked again",
        "runtime/inference/decoder.py",
        "pairs = zip(ids[:-1], text.ids",
        "pairs = zip(ids, text.ids",
        "inference/test_decoder.py::test_what_the_cache_holds_is_not_read_again",
    ),
    mutant(
        OWN,
        "a long prompt's logits are its first piece's",
        "runtime/inference/decoder.py",
        "torch.cat(logits) if all_logits else logits[-1]",
        "torch.cat(logits) if all_logits else logits[0]",
        "inference/test_decoder.py::test_long_prompts_of_a_packed_model_are_read_in_pieces",
    ),
    mutant(
        OWN,
        "a pass that broke off leaves its ring as it is",
        "runtime/inference/decoder.py",
        "            if any(cache.is_ring):\n",
        "            if False:\n",
        "inference/test_decoder.py::test_a_pass_that_breaks_off_leaves_a_cache_that_is_right",
    ),
    mutant(
        OWN,
        "a captured step sees places of a ring that are not filled yet",
        "runtime/inference/decoder.py",
        "(distance_BS >= 0) & (key_positions_BS >= 0) &",
        "(distance_BS >= 0) &",
        "inference/test_decoder.py::test_a_decode_step_is_the_forward_pass_at_any_positions",
    ),
    mutant(
        OWN,
        "a captured step reads a ring off by one",
        "runtime/inference/decoder.py",
        "now_B1 - (now_B1 - place_S) % W if cache.is_ring[i]",
        "now_B1 - (now_B1 - place_S - 1) % W if cache.is_ring[i]",
        "inference/test_decoder.py::test_a_decode_step_is_the_forward_pass_at_any_positions",
    ),
    mutant(
        OWN,
        "a guess that was wrong stays in the cache",
        "runtime/inference/decoder.py",
        "texts[row].cache.rewind(len(ids[row]) - 1)",
        "texts[row].cache.rewind(len(ids[row]))",
        "inference/test_decoder.py::test_look_up_gives_the_same_text_in_fewer_passes",
    ),
    mutant(
        OWN,
        "guesses are from the first occurrence",
        "runtime/inference/decoder.py",
        "start = int(found[-1]) + n",
        "start = int(found[0]) + n",
        "inference/test_decoder.py::test_guesses_come_from_the_text",
    ),
    mutant(
        OWN,
        "a full context goes on from its older half",
        "runtime/inference/decoder.py",
        "ids[row] = ids[row][-max(1, context // 2):]",
        "ids[row] = ids[row][:max(1, context // 2)]",
        "inference/test_decoder.py::test_ragged_prompts_give_what_each_gives_alone",
    ),
    mutant(
        OWN,
        "end-of-text is penalised for repetition",
        "runtime/inference/decoder.py",
        "repetition_penalty, stops)\n",
        "repetition_penalty, banned)\n",
        "inference/test_decoder.py::test_ragged_prompts_give_what_each_gives_alone",
    ),
    mutant(
        OWN,
        "rows take over the generator of one that has ended",
        "runtime/inference/decoder.py",
        "[generators[row] for row in rows]",
        "generators[:len(rows)]",
        "inference/test_decoder.py::test_ragged_prompts_give_what_each_gives_alone",
    ),
    mutant(
        OWN,
        "the routers are listened to for ever",
        "runtime/inference/decoder.py",
        "            hook.remove()\n",
        "            pass\n",
        "inference/test_decoder.py::test_router_choices_are_the_routers",
    ),
    mutant(
        OWN,
        "all experts count alike where all are asked",
        "runtime/inference/decoder.py",
        ".scatter_(1, experts_BK, weights_BK)",
        ".scatter_(1, experts_BK, 1.0)",
        "inference/test_decoder.py::test_what_a_gpu_computes_without_asking_is_the_same",
    ),
    mutant(
        OWN,
        "the beginning of a stop text is shown",
        "runtime/base/text.py",
        "for n in range(1, len(stop)) if",
        "for n in range(1, len(stop) - 1) if",
        "base/test_text.py::test_text_is_cut_at_the_first_stop_however_it_comes",
    ),
    # ----------------------------------------------------------------------------------------------- own: the native decoder
    mutant(
        OWN,
        "C: a row sees the token after it",
        "runtime/inference/cpu_decode.c",
        "at < first || at > position ?",
        "at < first || at > position + 1 ?",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "C: the rows behind the first have its position",
        "runtime/inference/cpu_decode.c",
        "int position = p->positions[i] + r,",
        "int position = p->positions[i],",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "C: the selection bias is in the gates",
        "runtime/inference/cpu_decode.c",
        "kept += gate[k] = p_E[best] / total;",
        "kept += gate[k] = p_E[best] / total + (bias ? bias[best] : 0.0f);",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "C: a bias is scaled as the weights are",
        "runtime/inference/cpu_decode.c",
        "float value = sums[j] * scale + bias;",
        "float value = (sums[j] + bias) * scale;",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "C: NaN scores count for nothing",
        "runtime/inference/cpu_decode.c",
        "ints below = x < b;",
        "ints below = ~(x >= b);",
        "test_mutants.py::test_keys_that_are_not_numbers_are_not_hidden",
    ),
    mutant(
        OWN,
        "C: the last number of a dot product is left out",
        "runtime/inference/cpu_decode.c",
        "for (; i < count; i++)\n        sum += a[i] * b[i];",
        "for (; i < count - 1; i++)\n        sum += a[i] * b[i];",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "C: attention is added to what was there",
        "runtime/inference/cpu_decode.c",
        "        memset(out[r], 0, 4 * D);\n",
        "",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "C: the first expert is passed over",
        "runtime/inference/cpu_decode.c",
        "    p->starts[0] = 0;\n",
        "",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "C: SwiGLU's last few numbers are another function",
        "runtime/inference/cpu_decode.c",
        "h[f] = a / (1.0f + expf(-a)) * up[f];",
        "h[f] = a / (1.0f + expf(a)) * up[f];",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "gate and up change places on the way out",
        "runtime/interop/huggingface.py",
        "((f.gate, of_one[:F]), (f.up, of_one[F:]))",
        "((f.up, of_one[:F]), (f.gate, of_one[F:]))",
        "interop/test_huggingface.py::test_transformers_computes_the_same_from_an_export",
    ),
    mutant(
        OWN,
        "gpt-oss's rows are taken for up first",
        "runtime/interop/huggingface.py",
        "torch.cat((tensor[:, ::2], tensor[:, 1::2]), dim=1)",
        "torch.cat((tensor[:, 1::2], tensor[:, ::2]), dim=1)",
        "interop/test_huggingface.py::test_what_transformers_saved_computes_the_same_here",
    ),
    mutant(
        OWN,
        "4-bit numbers are read high half first",
        "runtime/interop/huggingface.py",
        "_E2M1[(packed & 15).long()], _E2M1[(packed >> 4).long()]",
        "_E2M1[(packed >> 4).long()], _E2M1[(packed & 15).long()]",
        "interop/test_huggingface.py::test_mxfp4_numbers",
    ),
    mutant(
        OWN,
        "llama.cpp's rotation of pairs is forgotten",
        "scripts/export_gguf.py",
        "        tensor = tensor.unflatten(0, (part.heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)\n",
        "        pass\n",
        "scripts/test_export_gguf.py::test_tensors_have_llama_cpps_names_and_shapes_and_our_values",
    ),
    mutant(
        OWN,
        "a NaN passes the check of an export",
        "runtime/interop/export.py",
        "if not difference <= allowed:",
        "if difference > allowed:",
        "interop/test_export.py::test_logits_that_are_off_are_an_error",
    ),
    mutant(
        OWN,
        "--force replaces any folder",
        "runtime/interop/export.py",
        "if is_folder and (others :=",
        "if False and (others :=",
        "interop/test_export.py::test_what_is_there_is_not_lost",
    ),
    mutant(
        OWN,
        "o200k_base's holes are closed up",
        "runtime/data/hf_tokenizer.py",
        "for i in tokenizer.undecodable_ids}",
        "for i in []}",
        "data/test_hf_tokenizer.py::test_o200k_in_the_library",
    ),
    mutant(
        OWN,
        "what pads rows of logits is garbage",
        "model.py",
        "        buffer[:, V:] = 0",
        "        pass",
        "test_model.py::test_what_pads_the_rows_of_logits_is_no_garbage",
    ),
    mutant(
        OWN,
        "C: a sink gives as well as takes",
        "runtime/inference/cpu_decode.c",
        "(b->sinks ? expf(b->sinks[h] - largest) : 0.0f)",
        "0.0f",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "C: the clamped gate is not steepened",
        "runtime/inference/cpu_decode.c",
        "at_least(a * STEEPNESS, -80.0f)",
        "at_least(a, -80.0f)",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "a sink's gradient has the wrong sign",
        "runtime/kernels/sink_attention.py",
        "grad_sinks = -(share_BHT",
        "grad_sinks = (share_BHT",
        "test_model_parts.py::test_a_sink_takes_its_share_of_the_softmax_and_gives_nothing",
    ),
    mutant(
        OWN,
        "the kernel's backward pass is told the log without the sink",
        "runtime/kernels/sink_attention.py",
        "y, new_log_BHT.view(log.shape),",
        "y, log,",
        "test_model_parts.py::test_a_sink_takes_its_share_of_the_softmax_and_gives_nothing",
    ),
    mutant(
        OWN,
        "decoding leaves the sinks out",
        "runtime/inference/decoder.py",
        "if a.sinks is not None:",
        "if False:",
        "inference/test_decoder.py::test_a_decode_step_is_the_forward_pass_at_any_positions",
    ),
    mutant(
        OWN,
        "yarn's ramp is always rounded",
        "model_parts.py",
        "if config.yarn_truncate:",
        "if True:",
        "test_model_parts.py::test_yarn_keeps_fast_pairs_and_stretches_slow_ones",
    ),
    mutant(
        OWN,
        "C: gates are taken in the order of experts, not of tokens",
        "runtime/inference/cpu_decode.c",
        "factors[j] = p->gate[r];",
        "factors[j] = p->gate[first + j];",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "a native pass gives its first token's logits",
        "runtime/inference/cpu_decode.py",
        "np.cumsum(lengths, dtype=np.int32) - 1",
        "np.cumsum(lengths, dtype=np.int32) - np.array(lengths, dtype=np.int32)",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "a native pass counts as one token",
        "runtime/inference/cpu_decode.py",
        "            cache.advance(T)\n",
        "            cache.advance(1)\n",
        "inference/test_cpu_decode.py::test_it_gives_the_plain_models_logits",
    ),
    mutant(
        OWN,
        "compiled code is taken from a folder that others can write to",
        "runtime/inference/cpu_decode.py",
        "for own in (folder, path):",
        "for own in (path,):",
        "inference/test_cpu_decode.py::test_code_is_taken_from_nobody_else[folder]",
    ),
    # ---------------------------------------------------------------------------------------------------------- own: 8 bits
    mutant(
        OWN,
        "int8 overflows at the largest weight",
        "runtime/inference/quantize.py",
        "clamp_(min=1e-30) / 127",
        "clamp_(min=1e-30) / 128",
        "inference/test_quantize.py::test_a_packed_weight_is_within_half_a_step",
    ),
    mutant(
        OWN,
        "one scale for a whole matrix",
        "runtime/inference/quantize.py",
        "w.abs().amax(dim=-1, keepdim=True)",
        "w.abs().amax(dim=(-2, -1), keepdim=True).expand(*w.shape[:-1], 1).clone()",
        "inference/test_quantize.py::test_a_packed_weight_is_within_half_a_step",
    ),
    mutant(
        OWN,
        "weights are cut, not rounded",
        "runtime/inference/quantize.py",
        ".round_().to(torch.int8)",
        ".trunc_().to(torch.int8)",
        "inference/test_quantize.py::test_a_packed_weight_is_within_half_a_step",
    ),
    mutant(
        OWN,
        "the router is packed too",
        "runtime/inference/quantize.py",
        "        a = block.attention\n",
        '        a = block.attention\n        yield block.moe.router, "weight"\n',
        "inference/test_quantize.py::test_a_packed_model_computes_with_the_rounded_weights",
    ),
    # ------------------------------------------------------------------------------------------------------ own: expert maps
    mutant(
        OWN,
        "the weakest expert comes first",
        "runtime/inference/expert_map.py",
        "gates_LTK.sort(dim=-1, descending=True,",
        "gates_LTK.sort(dim=-1, descending=False,",
        "inference/test_expert_map.py::test_the_pages_data_is_the_tensors",
    ),
    mutant(
        OWN,
        "the heat map shows shares of all, not of the fair share",
        "runtime/inference/expert_map.py",
        "load = count * E / assignments",
        "load = count / assignments",
        "inference/test_expert_map.py::test_the_heat_map_is_shares_over_the_fair_share",
    ),
    mutant(
        OWN,
        "what a model says is markup",
        "runtime/inference/expert_map.py",
        'return html.escape(visible(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))',
        'return visible(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")',
        "inference/test_expert_map.py::test_the_page_holds_every_token_and_hostile_text_stays_text",
    ),
    mutant(
        OWN,
        "what a model says ends the page's data",
        "runtime/inference/expert_map.py",
        r'text.replace("<", "\\u003c").',
        "text.",
        "inference/test_expert_map.py::test_the_page_holds_every_token_and_hostile_text_stays_text",
    ),
    mutant(
        OWN,
        "the first token of the answer is the prompt's",
        "runtime/inference/expert_map.py",
        "piece, t < num_prompt_tokens,",
        "piece, t <= num_prompt_tokens,",
        "inference/test_expert_map.py::test_the_page_holds_every_token_and_hostile_text_stays_text",
    ),
    mutant(
        OWN,
        "half of all gates are dim",
        "runtime/inference/expert_map.py",
        "if gate < 0.5 / K else",
        "if gate < 1 / K else",
        "inference/test_expert_map.py::test_an_expert_has_one_colour_of_its_own_and_weak_gates_are_dim",
    ),
    mutant(
        OWN,
        "wide characters shift the columns",
        "runtime/inference/expert_map.py",
        '2 if unicodedata.east_asian_width(c) in "WF" else 1',
        "1",
        "inference/test_expert_map.py::test_without_colour_nothing_in_the_terminal_map_can_move_a_terminal",
    ),
    mutant(
        OWN,
        "a long token is one column too long",
        "runtime/inference/expert_map.py",
        "while _columns(text) > LONGEST_TEXT - 1:",
        "while _columns(text) > LONGEST_TEXT:",
        "inference/test_expert_map.py::test_without_colour_nothing_in_the_terminal_map_can_move_a_terminal",
    ),
    # -------------------------------------------------------------------------------------------- own: spikes and rollbacks
    mutant(
        OWN,
        "a spike counts among the recent losses",
        "train.py",
        "self.numbers = torch.where(bad, self.numbers, torch.stack(",
        "self.numbers = torch.where(bad & False, self.numbers, torch.stack(",
        "test_train.py::test_spikes_are_told_from_noise",
    ),
    mutant(
        OWN,
        "the first steps are spikes",
        "train.py",
        "return (steps >= self.FEWEST_STEPS) & (loss >",
        "return (loss >",
        "test_train.py::test_spikes_are_told_from_noise",
    ),
    mutant(
        OWN,
        "a hair's breadth is a spike",
        "train.py",
        "torch.maximum(variance.sqrt(), self.LEAST_DEVIATION * mean)",
        "variance.sqrt()",
        "test_mutants.py::test_a_loss_that_stands_still_has_no_spikes",
    ),
    mutant(
        OWN,
        "a spike is seen and not skipped",
        "train.py",
        "bad = bad if is_spike is None else bad | is_spike",
        "pass",
        "test_train.py::test_a_spike_is_skipped_at_once",
    ),
    mutant(
        OWN,
        "a resume forgets the recent losses",
        "train.py",
        "state.recent_loss = recent.numbers.tolist()",
        "pass",
        "test_train.py::test_recent_losses_survive_a_resume",
    ),
    mutant(
        OWN,
        "a rollback meets the same data again",
        "train.py",
        "state.samples_seen, state.rollbacks = diverged.samples_seen, diverged.rollbacks + 1",
        "state.rollbacks = diverged.rollbacks + 1",
        "test_mutants.py::test_a_run_stopped_amid_bad_steps_goes_back_before_them",
    ),
    mutant(
        OWN,
        "a rollback is not counted",
        "train.py",
        "state.samples_seen, state.rollbacks = diverged.samples_seen, diverged.rollbacks + 1",
        "state.samples_seen = diverged.samples_seen",
        "test_mutants.py::test_a_run_stopped_amid_bad_steps_goes_back_before_them",
    ),
    mutant(
        OWN,
        "a rollback goes to a checkpoint of the bad stretch",
        "train.py",
        "if state.run_id == diverged.run_id and not state.skipped_in_a_row:",
        "if state.run_id == diverged.run_id:",
        "test_mutants.py::test_a_run_stopped_amid_bad_steps_goes_back_before_them",
    ),
    mutant(
        OWN,
        "a rollback takes another run's checkpoint",
        "train.py",
        "if state.run_id == diverged.run_id and not state.skipped_in_a_row:",
        "if not state.skipped_in_a_row:",
        "test_train.py::test_going_back_passes_over_damage_and_never_takes_another_run",
    ),
    mutant(
        OWN,
        "a damaged checkpoint ends a rollback",
        "train.py",
        "        except ValueError:   # damaged: an older one will do",
        "        except ZeroDivisionError:",
        "test_train.py::test_going_back_passes_over_damage_and_never_takes_another_run",
    ),
    mutant(
        OWN,
        "one rollback more than allowed",
        "train.py",
        "if diverged.rollbacks >= plan.config.max_rollbacks:",
        "if diverged.rollbacks > plan.config.max_rollbacks:",
        "test_train.py::test_going_back_has_a_limit_and_an_exit_code[0-0]",
    ),
    # --------------------------------------------------------------------------------------------- own: checkpoints' fallbacks
    mutant(
        OWN,
        "a resume goes back to the oldest checkpoint",
        "runtime/checkpoint/format.py",
        "for _, path in reversed(step_files(folder))), folder / LATEST",
        "for _, path in step_files(folder)), folder / LATEST",
        "checkpoint/test_checkpoint.py::test_find_latest_falls_back_and_says_what_it_skipped",
    ),
    mutant(
        OWN,
        "latest.pt hides a newer step file",
        "runtime/checkpoint/format.py",
        "for path in [*(path for _, path in reversed(step_files(folder))), folder / LATEST,",
        "for path in [folder / LATEST, *(path for _, path in reversed(step_files(folder))),",
        "checkpoint/test_checkpoint.py::test_a_kill_before_latest_was_renamed_loses_nothing",
    ),
    mutant(
        OWN,
        "what was skipped is not said",
        "runtime/checkpoint/format.py",
        "            skipped.append(str(error))\n",
        "",
        "checkpoint/test_checkpoint.py::test_find_latest_falls_back_and_says_what_it_skipped",
    ),
    mutant(
        OWN,
        "best.pt is not tried",
        "runtime/checkpoint/format.py",
        "folder / LATEST, folder / BEST]:",
        "folder / LATEST]:",
        "checkpoint/test_checkpoint.py::test_find_latest_falls_back_and_says_what_it_skipped",
    ),
    mutant(
        OWN,
        "a run resumed further back prunes what it has just written",
        "runtime/checkpoint/format.py",
        "key=lambda file: (file[0] <= step, file[0])",
        "key=lambda file: file[0]",
        "checkpoint/test_checkpoint.py::test_a_run_resumed_further_back_never_prunes_what_it_has_just_written",
    ),
    mutant(
        OWN,
        "what a kill left is never removed",
        "runtime/checkpoint/format.py",
        "        _remove_leftovers(folder)\n",
        "",
        "checkpoint/test_checkpoint.py::test_leftovers_of_a_kill_are_removed",
    ),
    mutant(
        OWN,
        "a pruned step file takes best.pt with it",
        "runtime/checkpoint/format.py",
        "if path.resolve() not in names:",
        "if True:",
        "checkpoint/test_checkpoint.py::test_keep_last_prunes_and_never_what_latest_or_best_name",
    ),
    mutant(
        OWN,
        "a step file is written with all of a shared storage",
        "runtime/checkpoint/format.py",
        "return tensor if fills else tensor.clone(memory_format=torch.contiguous_format)",
        "return tensor",
        "checkpoint/test_checkpoint.py::test_views_of_larger_storages_are_written_alone",
    ),
    # ---------------------------------------------------- own: the page of expert maps, in a browser
    mutant(
        OWN,
        "no room is kept for the text under the heat map",
        "runtime/inference/expert_map.py",
        "keepRoom(read.parentNode, hint, ",
        'keepRoom(read.parentNode, "", ',
        "inference/test_expert_map.py::test_the_page_holds_still_and_whole_in_any_fonts",
    ),
    mutant(
        OWN,
        "the legend of the heat map is never two lines",
        "runtime/inference/expert_map.py",
        ".scale{display:flex;flex-wrap:wrap;",
        ".scale{display:flex;white-space:nowrap;",
        "inference/test_expert_map.py::test_the_page_holds_still_and_whole_in_any_fonts",
    ),
    mutant(
        OWN,
        "a bold number makes its column wider",
        "runtime/inference/expert_map.py",
        ".detail tbody th{width:3.3rem;",
        ".detail tbody th{width:max(3.3rem,6ch);",
        "inference/test_expert_map.py::test_the_page_holds_still_and_whole_in_any_fonts",
    ),
    # ------------------------------------------------------------------- kernels of a GPU
    mutant(
        OWN,
        "None says that a tensor was saved",
        "runtime/kernels/sink_attention.py",
        "next(tensors) if is_tensor else value for is_tensor, value in ctx.rest",
        "next(tensors) if value is None else value for _, value in ctx.rest",
        "kernels/test_attention_choice.py::test_sinks_train_in_half_precision_on_a_gpu",
    ),
    mutant(
        OWN,
        "cuDNN's backward pass gets its log in another shape",
        "runtime/kernels/sink_attention.py",
        "new_log_BHT.view(log.shape)",
        "new_log_BHT",
        "kernels/test_attention_choice.py::test_sinks_through_each_kernel_of_a_gpu",
    ),
    mutant(
        OWN,
        "a window with sinks goes to cuDNN, which is given no mask",
        "runtime/kernels/sink_attention.py",
        "torch.is_grad_enabled(), sinks=True)",
        "torch.is_grad_enabled())",
        "kernels/test_attention_choice.py::test_sinks_take_the_kernel_of_the_table",
    ),
    mutant(
        OWN,
        "cuDNN trains with a mask at lengths where its gradient can be NaN",
        "runtime/kernels/attention_choice.py",
        "not (sinks or S % 128 == 64)",
        "not sinks",
        "kernels/test_attention_choice.py::test_the_kernel_for_each_case",
        "kernels/test_attention_choice.py::test_what_hopper_is_kept_from",
    ),
    mutant(
        OWN,
        "cuDNN generates, with a plan for each length",
        "runtime/kernels/attention_choice.py",
        "cudnn_is_first and needs_gradient and cudnn_takes_mask",
        "cudnn_is_first and cudnn_takes_mask",
        "kernels/test_attention_choice.py::test_no_prompt_waits_for_a_plan_of_cudnn",
    ),
    mutant(
        OWN,
        "the memory-efficient kernel gets grouped heads",
        "runtime/kernels/attention_choice.py",
        'Choice("efficient", cudnn_is_first, True)',
        'Choice("efficient", cudnn_is_first, False)',
        "kernels/test_attention_choice.py::test_sinks_take_the_kernel_of_the_table",
    ),
    mutant(
        OWN,
        "cuDNN where only deterministic kernels are allowed",
        "runtime/kernels/attention_choice.py",
        "and not card.deterministic",
        "",
        "kernels/test_attention_choice.py::test_the_kernel_for_each_case",
    ),
    mutant(
        OWN,
        "the rows of a mask are not aligned",
        "runtime/kernels/attention_choice.py",
        "    if S % _ALIGNMENT:",
        "    if False:",
        "kernels/test_attention_choice.py::test_sinks_through_each_kernel_of_a_gpu",
    ),
    mutant(
        OWN,
        "grouped heads under a mask lead to all scores where nobody chose",
        "model_parts.py",
        "if q_BHTD.is_cuda and self.H != self.G and mask is not None:",
        "if False:",
        "kernels/test_attention_choice.py::test_without_a_choice_grouped_heads_are_copied_under_a_mask",
    ),
    mutant(
        OWN,
        "a GPU's attention is left to PyTorch",
        "runtime/base/device.py",
        "functools.partial(gpu_attention, card=card) if card else None",
        "None",
        "base/test_device.py::test_kernels_are_chosen_for_the_card",
    ),
    mutant(
        OWN,
        "all spans are versions of one compiled function",
        "runtime/inference/decoder.py",
        "own = types.FunctionType(code, decode_step.__globals__)",
        "own = decode_step",
        "inference/test_decoder.py::test_every_span_of_the_cache_is_compiled",
    ),
    mutant(
        OWN,
        "a product with one row stays a call of its own",
        "runtime/inference/decoder.py",
        '"coordinate_descent_tuning": True',
        '"coordinate_descent_tuning": False',
        "inference/test_decoder.py::test_every_span_of_the_cache_is_compiled",
    ),
    mutant(
        OWN,
        "what was compiled does not live as long as its graph",
        "runtime/inference/decoder.py",
        "return graph, ids, positions, logits, function",
        "return graph, ids, positions, logits, None",
        "inference/test_decoder.py::test_a_graph_is_captured_once_for_each_span",
    ),
    mutant(
        OWN,
        "the head's gradient is rounded before it is added, on a GPU too",
        "model.py",
        "elif total_VC.is_cuda and torch.version.hip is None:",
        "elif False:",
        "test_model.py::test_a_gpu_adds_to_the_heads_gradient_inside_the_product",
    ),
    # -------------------------------------------------------------------------------------------- numbers on another machine
    mutant(
        OWN,
        "an export may be off by a hundred times what rounding explains",
        "runtime/interop/export.py",
        "return logits_bound(config, keys) * size_of(ours)",
        "return 100 * logits_bound(config, keys) * size_of(ours)",
        "interop/test_export.py::test_logits_that_are_off_are_an_error",
    ),
    mutant(
        OWN,
        "the bound on rounding knows one block",
        "runtime/checks/rounding.py",
        "blocks = c.transformer_blocks * (attention",
        "blocks = 1 * (attention",
        "checks/test_rounding.py::test_a_deeper_a_wider_and_a_longer_model_may_differ_by_more",
    ),
    mutant(
        OWN,
        "the bound on rounding is that of the worst case",
        "runtime/checks/rounding.py",
        "math.sqrt(sum(lengths))",
        "sum(lengths)",
        "checks/test_rounding.py::test_lengths_of_several_sums_add_up",
        "checks/test_rounding.py::test_sums_in_two_orders_are_within_the_bound_and_not_far_from_it",
    ),
    mutant(
        OWN,
        "NaN is close to anything",
        "tests/numeric.py",
        "return share_of(actual, expected, bound, size) <= 1",
        "return not share_of(actual, expected, bound, size) > 1",
        "checks/test_rounding.py::test_nothing_that_is_not_a_number_is_close",
    ),
    mutant(
        OWN,
        "flags of one's own come before -march=native",
        "runtime/inference/cpu_decode.py",
        "*FLAGS, native, *extra]",
        "*FLAGS, *extra, native]",
        "inference/test_cpu_decode.py::test_flags_of_ones_own_come_last_and_make_another_file",
    ),
    mutant(
        OWN,
        "the tests of other CPUs run with one thread",
        "tests/conftest.py",
        'int(os.environ.get("GPTOSS_TEST_THREADS", "1"))',
        "1",
        "test_cpus.py::test_the_settings_take_effect",
    ),
    mutant(
        OWN,
        "the tests of other CPUs leave MKL as it is",
        "tests/cpus.py",
        '"MKL_CBWR": "COMPATIBLE"',
        '"MKL_CBWR": "AUTO"',
        "test_cpus.py::test_the_settings_take_effect",
    ),
    mutant(
        OWN,
        "every field is taken to be known",
        "runtime/checks/known.py",
        "if getattr(model.config, name) != defaults[name]",
        "if False",
        "checks/test_known.py::test_what_is_not_known_is_named_once",
        "checks/test_changed_models.py::test_exports_refuse_with_the_name[export_gguf-the export to GGUF-sigmoid by a field]",
    ),
    mutant(
        OWN,
        "every module is taken to be known",
        "runtime/checks/known.py",
        "if name not in MODULES and not _is_inside(name, inside):",
        "if False:",
        "checks/test_changed_models.py::test_the_c_decoder_steps_aside_with_a_line[extra norm]",
    ),
    mutant(
        OWN,
        "decoders are believed",
        "runtime/inference/asked.py",
        '    if share <= limit:\n        return ""\n',
        '    return ""\n',
        "checks/test_changed_models.py::test_the_c_decoder_steps_aside_with_a_line[sigmoid in place]",
    ),
    mutant(
        OWN,
        "an export is compared with the model itself",
        "runtime/interop/export.py",
        "    found = logits(theirs, ids)[None]\n    explained",
        "    found = ours\n    explained",
        "checks/test_changed_models.py::test_exports_refuse_with_the_name[export_gguf-the export to GGUF-sigmoid in place]",
    ),
    mutant(
        OWN,
        "a shared expert's parameters are not counted",
        "runtime/checks/known.py",
        "return Counts(total,",
        "return Counts(closed,",
        "checks/test_changed_models.py::test_reports_count_the_model_as_it_is[shared expert]",
    ),
    mutant(
        OWN,
        "near ties excuse any difference",
        "runtime/inference/asked.py",
        "clear_N = ~torch.cat([p.near_ties() for p in probes])",
        "clear_N = torch.zeros(len(plain_NV), dtype=torch.bool)\n        share = 0.0",
        "inference/test_asked.py::test_two_experts_that_are_equally_good_are_no_difference",
    ),
    mutant(
        OWN,
        "what a module says of its residual outputs is not heard",
        "model.py",
        " or name in residual",
        "",
        "checks/test_known.py::test_a_parameter_of_another_kind_is_counted_and_named_and_can_say_that_it_is_residual",
    ),
    mutant(
        OWN,
        "the last block's modules are taken for all",
        "runtime/checks/known.py",
        "for name, kind in modules:",
        "for name, kind in dict(modules).items():",
        "checks/test_known.py::test_other_parts_are_named",
    ),
    mutant(
        OWN,
        "what was found for older code is believed",
        "runtime/inference/asked.py",
        "        _sources(),\n",
        "",
        "inference/test_asked.py::test_a_large_file_is_asked_once_and_again_when_anything_changes",
    ),
    mutant(
        OWN,
        "NaN on one side is no difference",
        "runtime/inference/asked.py",
        "if not torch.equal(finite_N, fast_finite_N):",
        "if False:",
        "inference/test_asked.py::test_logits_that_are_not_numbers_count_where_one_side_has_them",
    ),
    mutant(
        OWN,
        "a step that differs is used",
        "runtime/inference/decoder.py",
        "        if self.why_not_step:\n            rows_B11",
        "        if False:\n            rows_B11",
        "inference/test_asked.py::test_a_wrong_step_gives_way_to_the_plain_model",
    ),
    mutant(
        OWN,
        "YaRN's ramp is always rounded",
        "runtime/interop/published.py",
        "if model.truncate:",
        "if True:",
        "interop/test_published.py::test_it_computes_what_transformers_computes",
    ),
    mutant(
        OWN,
        "tensors without a place are not looked for",
        "runtime/interop/published.py",
        "return sorted(model.read.names - claimed)",
        "return []",
        "interop/test_published.py::test_a_tensor_without_a_place_is_named",
    ),
    mutant(
        OWN,
        "routers choose again in a narrow step",
        "runtime/inference/asked.py",
        "        return tuple(\n            torch.cat(values)[self._rows]",
        "        return None and tuple(\n            torch.cat(values)[self._rows]",
        "inference/test_asked.py::test_a_step_is_asked_with_the_experts_that_the_plain_model_chose",
    ),
    mutant(
        OWN,
        "--no-c_kernel is ignored",
        "predict.py",
        "Decoder(self.model, config.c_kernel,",
        "Decoder(self.model, True,",
        "inference/test_asked.py::test_no_c_kernel_turns_the_c_code_off",
    ),
    mutant(
        OWN,
        "all large files share one outcome",
        "predict.py",
        "config.compile, checkpoint.digest)",
        'config.compile, "the file")',
        "inference/test_asked.py::test_predict_hands_the_files_digest_on",
    ),
    mutant(
        OWN,
        "a new field may be left out of the random configurations",
        "tests/checks/test_known.py",
        "< 2",
        "< 1",
        "checks/test_changed_models.py::test_a_new_field_at_its_default_changes_nothing_and_a_test_asks_for_it",
    ),
    # ------------------------------------------------------------------ own: the plan for one GPU
    mutant(
        OWN,
        "a process in a session of its own outlives its stage",
        "benchmarks/gpu.py",
        "for pid in {*known, *descendants(process.pid)}:",
        "for pid in ():",
        "benchmarks/test_gpu.py::test_a_stage_that_hangs_is_killed_with_all_its_children",
    ),
    mutant(
        OWN,
        "a stage that hangs has all the time",
        "benchmarks/gpu.py",
        "return left - sum(stages[after].seconds for after in names[names.index(stage) + 1 :])",
        "return left",
        "benchmarks/test_gpu.py::test_a_stage_has_its_own_seconds_and_those_that_others_left",
    ),
    mutant(
        OWN,
        "figures are stored at a stage's end only",
        "benchmarks/gpu.py",
        "            known = descendants(process.pid)\n            on_poll()\n",
        "            known = descendants(process.pid)\n",
        "benchmarks/test_gpu.py::test_the_command_may_be_killed_at_any_time",
    ),
    mutant(
        OWN,
        "a figure far below its prediction has no mark",
        "benchmarks/gpu.py",
        'not 1 / OFF <= row["ratio"] <= OFF',
        'not row["ratio"] <= OFF',
        "benchmarks/test_gpu.py::test_a_prediction_stands_next_to_its_result",
    ),
    mutant(
        OWN,
        "a prediction for another size is shown",
        "benchmarks/gpu_plan.py",
        'and p.size in ("", size)',
        "and True",
        "benchmarks/test_gpu.py::test_a_prediction_stands_next_to_its_result",
    ),
    mutant(
        OWN,
        "a step may need all of a GPU's memory",
        "benchmarks/gpu_plan.py",
        "USABLE_SHARE = 0.95",
        "USABLE_SHARE = 1.2",
        "benchmarks/test_gpu.py::test_sizes_fit_the_memory",
    ),
    mutant(
        OWN,
        "a stage asks for more seconds than there are",
        "benchmarks/gpu_plan.py",
        '"probe": Stage(25,',
        '"probe": Stage(45,',
        "benchmarks/test_gpu.py::test_the_stages_of_a_command_fit_its_seconds",
    ),
    mutant(
        OWN,
        "out of memory ends the stage",
        "benchmarks/steps.py",
        "            if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__ or error):\n",
        "            if True:\n",
        "benchmarks/test_gpu.py::test_the_first_size_that_fits_is_measured",
    ),
    mutant(
        OWN,
        "the profiler's marks count as kernels",
        "benchmarks/steps.py",
        "event.device_type != DeviceType.CUDA or event.is_user_annotation",
        "event.device_type != DeviceType.CUDA",
        "benchmarks/test_gpu.py::test_seconds_of_a_gpus_kernels_are_summed_by_name",
    ),
    mutant(
        OWN,
        "first tokens without cuDNN are with it",
        "benchmarks/latency.py",
        "torch.backends.cuda.enable_cudnn_sdp(allowed)",
        "torch.backends.cuda.enable_cudnn_sdp(True)",
        "benchmarks/test_gpu.py::test_one_text_is_decoded_and_first_tokens_are_timed",
    ),
    mutant(
        OWN,
        "a resumed run is always the same",
        "benchmarks/gpu_resume.py",
        "if not torch.equal(x, y)",
        "if x.shape != y.shape",
        "benchmarks/test_gpu.py::test_a_difference_between_two_runs_is_seen",
    ),
    mutant(
        OWN,
        "an error in a fixture is no failed test",
        "benchmarks/gpu_tests.py",
        "        if report.failed:\n            self._fail(report.nodeid, report)\n        elif",
        '        if report.failed and report.when == "call":\n            self._fail(report.nodeid, report)\n        elif',
        "benchmarks/test_gpu.py::test_failed_tests_and_their_reasons_are_stored",
    ),
    mutant(
        OWN,
        "the GPU's tests compile a model for each of many spans",
        "tests/test_gpu.py",
        "COMPILED_SPAN = 16",
        "COMPILED_SPAN = 4",
        "benchmarks/test_gpu.py::test_gpu_tests_compile_few_models",
    ),
    mutant(
        OWN,
        "an import is not compared",
        "scripts/import_hf.py",
        "    check_published(route, KNOWS, model, logits_BTV, computed, ids_BT)\n",
        "",
        "checks/test_changed_models.py::test_an_import_is_what_the_architecture_computes_or_is_refused[sigmoid in place]",
    ),
    mutant(
        OWN,
        "GELU is given every row count",
        "runtime/kernels/cpu_experts.py",
        "        _in_few_shapes(lambda h, y: torch.ops.aten.gelu.out(h, out=y), h, y)",
        "        torch.ops.aten.gelu.out(h, out=y)",
        "kernels/test_cpu_experts.py::test_onednn_meets_few_row_counts",
    ),
    mutant(
        OWN,
        "rows of half precision are not padded",
        "runtime/kernels/cpu_experts.py",
        "if n == padded or x.element_size() != 2:",
        "if n <= padded:",
        "kernels/test_cpu_experts.py::test_onednn_meets_few_row_counts",
    ),
    mutant(
        OWN,
        "padding keeps what was in its memory",
        "runtime/kernels/cpu_experts.py",
        "    y[n:] = 0\n",
        "    y[n:] = 1\n",
        "kernels/test_cpu_experts.py::test_padding_changes_nothing",
    ),
    mutant(
        OWN,
        "the dry run accumulates where no step does",
        "train.py",
        "        if plan.config.grad_accum == 1:\n            optimizer",
        "        if plan.config.grad_accum == 0:\n            optimizer",
        "test_train.py::test_the_dry_run_changes_nothing",
    ),
    mutant(
        OWN,
        "a trial of a micro-batch compiles",
        "train.py",
        "dataclasses.replace(plan.config, compile=False)",
        "dataclasses.replace(plan.config)",
        "test_train.py::test_a_gpu_of_80_gb_is_tried_once_and_uncompiled",
    ),
    mutant(
        OWN,
        "a GPU tries what the estimate says not to fit",
        "train.py",
        "else estimate <= memory[0] or",
        "else estimate <= 1.25 * memory[0] or",
        "test_train.py::test_a_gpu_of_80_gb_is_tried_once_and_uncompiled",
    ),
    mutant(
        OWN,
        "more rows of logits than there is room for",
        "config_model.py",
        "<= spare_bytes // 2:",
        "<= spare_bytes * 2:",
        "test_train.py::test_a_gpu_with_room_holds_more_rows_of_logits",
    ),
    mutant(
        OWN,
        "the rows of logits do not reach the model",
        "train.py",
        "model.loss_rows = plan.loss_rows",
        "model.loss_rows = 0",
        "test_train.py::test_the_rows_of_a_plan_reach_the_model",
    ),
    mutant(
        OWN,
        "the estimate adds all gradients to all activations",
        "runtime/training/memory.py",
        "before = gradients if train.grad_accum > 1 else {}",
        "before = gradients",
        "benchmarks/test_fake_memory.py::test_the_estimate_is_the_count_of_a_full_size_step",
    ),
    mutant(
        OWN,
        "the estimate forgets Python and PyTorch",
        "runtime/training/memory.py",
        "else PROGRAM_BYTES + _kernel_bytes(c, b)",
        "else _kernel_bytes(c, b)",
        "training/test_memory.py::test_the_announced_peak_is_the_measured_one",
    ),
    mutant(
        OWN,
        "a process's peak is that of its parent",
        "runtime/base/device.py",
        'line.startswith("VmHWM")',
        'line.startswith("VmHwm")',
        "training/test_memory.py::test_a_process_does_not_begin_with_its_parents_peak",
    ),
    # ----------------------------------------------------- own: a CPU's kernels are asked
    mutant(
        OWN,
        "an activation of the kernel that is another is used",
        "runtime/checks/kernels.py",
        'return "" if same else',
        'return "" if True else',
        "checks/test_kernels.py::test_a_changed_activation_is_what_trains",
        "checks/test_kernels.py::test_a_decoder_says_so_and_reads_prompts_with_it",
    ),
    mutant(
        OWN,
        "a decoder does not ask a CPU's kernels",
        "runtime/inference/asked.py",
        "decoder.kernel_notes = settle_kernels(decoder.model)",
        "decoder.kernel_notes = []",
        "checks/test_kernels.py::test_a_decoder_says_so_and_reads_prompts_with_it",
    ),
    mutant(
        OWN,
        "a parameter that the experts' kernel is not given is left out in silence",
        "runtime/checks/kernels.py",
        "sorted(names - set(EXPERTS))",
        "[]",
        "checks/test_kernels.py::test_a_parameter_that_the_kernel_is_not_given_is_named",
    ),
    mutant(
        OWN,
        "decoders are asked about the first tokens of a text only",
        "runtime/inference/asked.py",
        "FAR = 511",
        "FAR = 77",
        "inference/test_asked.py::test_a_change_that_begins_far_into_a_text_is_found",
    ),
    mutant(
        OWN,
        "an answer holds for any build of the C code",
        "runtime/inference/asked.py",
        '"" if decoder.native is None else cpu_decode.library_digest()',
        '""',
        "inference/test_asked.py::test_another_build_of_the_c_code_is_asked_again",
    ),
    mutant(
        OWN,
        "a filled cache may be as large as its rows make it",
        "runtime/inference/asked.py",
        "max(_rows(decoder)) * kv_cache",
        "2 * kv_cache",
        "inference/test_asked.py::test_a_filled_cache_takes_no_more_memory_than_it_may",
    ),
    mutant(
        OWN,
        "what float32 loses excuses any difference of an export",
        "runtime/interop/export.py",
        "MOST_STEEPNESS * explained)",
        "1e9 * explained)",
        "interop/test_export.py::test_what_float32_loses_to_steep_softmaxes_is_allowed",
    ),
    mutant(
        OWN,
        "first tokens with and without cuDNN are both our choice",
        "benchmarks/latency.py",
        "attention.device_attention = None",
        "pass",
        "benchmarks/test_gpu.py::test_one_text_is_decoded_and_first_tokens_are_timed",
    ),
    mutant(
        OWN,
        "a product of an expert's backward pass is not cut",
        "runtime/kernels/cpu_experts.py",
        "grad_a = _product(grad, w_out_ECF[e], _temporary(h, w_out_ECF.shape[2]))",
        "grad_a = grad @ w_out_ECF[e]",
        "kernels/test_cpu_experts.py::test_onednn_meets_few_row_counts",
    ),
]


def names(mutants: Sequence[Mutant] = MUTANTS) -> list[str]:
    """A name for each: its fault, numbered where there are several of one: T2.1, T2.2, ..."""
    seen: dict[str, int] = {}
    of_fault = [one.fault for one in mutants]
    result = []
    for fault in of_fault:
        seen[fault] = seen.get(fault, 0) + 1
        result.append(fault if of_fault.count(fault) == 1 else f"{fault}.{seen[fault]}")
    return result


# --------------------------------------------------------------------------------------------------------------- the runner
@dataclass
class Outcome:
    name: str
    mutant: Mutant
    caught: bool
    said: str  # the test that failed, or why it survives
    why: str  # what that test said (it may name folders of this machine)
    seconds: float


def copy_tree(folder: Path) -> None:
    """The working tree without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=REPO, check=True, capture_output=True
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, folder / name)


class Tests:
    """`python -m pytest` in a copy, as often as asked: by children of a process that has imported the libraries and nothing of ours, which saves each run three seconds."""

    SERVER = """
import json, os, sys
import hypothesis, numpy, pytest, tiktoken, torch
for line in sys.stdin:
    arguments, printed = json.loads(line)
    if not (pid := os.fork()):
        os.setsid()
        for stream, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))):
            os.dup2(opened, stream)
        os.dup2(1, 2)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {
            name: value
            for name, value in os.environ.items()
            if name
            not in ("CI", "PYTHONPATH", "PYTEST_ADDOPTS", "GPTOSS_TRACEBACK", "PYTEST_CURRENT_TEST")
        }
        environment |= {
            "OMP_NUM_THREADS": "1",
            "GPTOSS_SHARED": str(SHARED),
            "XDG_CACHE_HOME": str(folder.parent / "cache"),
        }  # compiled code of mutants is not for keeping
        self._server = subprocess.Popen(
            [sys.executable, "-c", self.SERVER],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.kill()
        self._server.communicate()

    def run(
        self, tests: Sequence[str], *flags: str, seconds: float = HANG_SECONDS
    ) -> tuple[int | None, list[tuple[str, str, str]], str]:
        """(exit code, or None where it hangs; [(node id, passed, skipped or failed, why)]; the end of what it printed)."""
        report, printed = self.folder.parent / "report.xml", self.folder.parent / "printed"
        report.unlink(missing_ok=True)
        self._server.stdin.write(
            json.dumps(
                [
                    ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *flags, *tests],
                    str(printed),
                ]
            )
            + "\n"
        )
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        if hangs := not select.select([self._server.stdout], [], [], seconds)[0]:
            os.killpg(pid, signal.SIGKILL)
        code = int(self._server.stdout.readline())
        cases = []
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            kinds = {child.tag for child in case}
            result = (
                "failed"
                if kinds & {"failure", "error"}
                else "skipped"
                if "skipped" in kinds
                else "passed"
            )
            cases.append(
                (
                    f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}",
                    result,
                    " ".join(" ".join(child.get("message", "") for child in case).split()),
                )
            )
        return None if hangs else code, cases, printed.read_text(errors="replace")[-3000:]


@contextmanager
def mutated(folder: Path, one: Mutant, turn: int) -> Iterator[None]:
    """A copy with the mutant in it. ValueError unless what it replaces is there once."""
    path, original = folder / one.file, (folder / one.file).read_text(encoding="utf-8")
    if original.count(one.old) != 1:
        raise ValueError(f"{one.file} has {original.count(one.old)} times, not once: {one.old!r}")
    try:
        path.write_text(original.replace(one.old, one.new), encoding="utf-8")
        os.utime(path, (turn, turn))  # compiled modules are told apart by this, in whole seconds
        yield
    finally:
        path.write_text(original, encoding="utf-8")
        os.utime(path, (turn + 1, turn + 1))


def ended(test: str, cases: Sequence[tuple[str, str, str]]) -> set[str]:
    """How the cases of a test ended."""
    return {result for case, result, _ in cases if case == test or case.startswith(f"{test}[")}


@contextmanager
def copy_of_the_tree() -> Iterator[Tests]:
    """A copy of the working tree in a temporary folder, and the means to run its tests."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folder = Path(temporary) / "copy"
        copy_tree(folder)
        with Tests(folder) as tests:
            yield tests


def run_unchanged(tests: Tests, some: Sequence[str]) -> tuple[int, list[tuple[str, str, str]]]:
    """Return (exit code, cases) of some tests on the unchanged code.

    Raises ValueError if they do not run.
    """
    code, cases, printed = tests.run(some, seconds=2 * HANG_SECONDS)
    if code not in (0, 1):
        raise ValueError(f"the tests do not run on the unchanged code: {printed.strip()[-500:]}")
    return code, cases


def try_one(
    tests: Tests, name: str, one: Mutant, turn: int, cases: Sequence[tuple[str, str, str]]
) -> Outcome:
    """What one mutant's tests say of it. `cases`: what all tests said of the unchanged code."""
    started, why, caught = time.perf_counter(), "", False
    before = [ended(test, cases) for test in one.tests]
    if any("failed" in results for results in before):
        said = "its tests fail on the unchanged code too"
    elif not any("passed" in results for results in before):
        said = "none of its tests runs on this machine"
    else:
        with mutated(tests.folder, one, 1_000_000_000 + 10 * turn):
            code, after, printed = tests.run(one.tests, "-x")
        caught = code in CAUGHT
        if caught:
            failures = ((case, why[:200]) for case, result, why in after if result == "failed")
            said, why = next(failures, (f"exit code {code}", ""))
        elif code is None:
            said = "its tests hang"
        elif code == 0:
            said = "its tests pass"
        else:
            said = f"pytest ended with {code}: {' '.join(printed.split())[-200:]}"
    return Outcome(name, one, caught, said, why, time.perf_counter() - started)


def run(chosen: Sequence[tuple[str, Mutant]], say=print, jobs: int = 1) -> list[Outcome]:
    """Try some mutants, each under a name, `jobs` at a time, in as many copies of the tree."""
    with ExitStack() as stack:
        copies: SimpleQueue[Tests] = SimpleQueue()
        for _ in range(jobs):
            copies.put(stack.enter_context(copy_of_the_tree()))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))

        def in_a_copy(function, *arguments):
            tests = copies.get()
            try:
                return function(tests, *arguments)
            finally:
                copies.put(tests)

        everything = sorted({test for _, one in chosen for test in one.tests})
        started = time.perf_counter()
        shares = filter(None, (everything[job::jobs] for job in range(jobs)))
        results = list(pool.map(lambda share: in_a_copy(run_unchanged, share), shares))
        cases = [case for _, some in results for case in some]
        code = max((code for code, _ in results), default=0)
        seconds = time.perf_counter() - started
        say(f"{len(everything)} tests on the unchanged code: exit code {code}, {seconds:.0f} s")

        def attempt(turn: int) -> Outcome:
            o = in_a_copy(try_one, *chosen[turn], turn, cases)
            verdict = "caught  " if o.caught else "SURVIVES"
            reason = o.said + ": " * bool(o.why) + o.why
            what = f"{o.mutant.file}: {o.mutant.what}"
            say(f"{verdict} {o.name:6} {o.seconds:5.1f} s  {what}  [{reason}]")
            return o

        return list(pool.map(attempt, range(len(chosen))))


def default_jobs() -> int:
    """Return the cores that this process may use, at most MOST_JOBS."""
    if hasattr(os, "sched_getaffinity"):
        return min(MOST_JOBS, len(os.sched_getaffinity(0)))
    return min(MOST_JOBS, os.cpu_count() or 1)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ID",
        help="faults (T2) or single mutants (T2.3); nothing is stored then",
    )
    parser.add_argument(
        "-j",
        "--jobs",
        type=int,
        default=default_jobs(),
        metavar="N",
        help=f"mutants tried at the same time (here {default_jobs()})",
    )
    arguments = parser.parse_args(argv)
    only = arguments.only
    if arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {arguments.jobs}: mutants at a time")
    everything = list(zip(names(), MUTANTS, strict=True))
    if (
        unknown := set(only or ())
        - {name for name, _ in everything}
        - {one.fault for one in MUTANTS}
    ):
        raise ValueError(
            f"there is no mutant {min(unknown)}; there are {', '.join(dict.fromkeys(one.fault for one in MUTANTS))}"
        )
    started = time.perf_counter()
    chosen = [
        (name, one) for name, one in everything if only is None or name in only or one.fault in only
    ]
    outcomes = run(chosen, lambda line: print(line, flush=True), arguments.jobs)
    caught = sum(outcome.caught for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} mutants caught in {time.perf_counter() - started:.0f} s")
    if only is None:
        save_results(
            "mutants",
            {
                "caught": caught,
                "made": len(outcomes),
                "faults": len({o.mutant.fault for o in outcomes} - {OWN}),
                "not_applicable": NOT_APPLICABLE,
                "seconds": round(time.perf_counter() - started),
                "mutants": [
                    {
                        "id": o.name,
                        "fault": o.mutant.fault,
                        "what": o.mutant.what,
                        "file": o.mutant.file,
                        "caught": o.caught,
                        "by": o.said,
                        "seconds": round(o.seconds, 1),
                    }
                    for o in outcomes
                ],
            },
        )
    return int(caught < len(outcomes))


if __name__ == "__main__":
    cli.run_main(main)
