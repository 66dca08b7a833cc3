"""The small dense model next to a plain GPT, at a tiny size."""

import json

import pytest
import torch

from benchmarks import common, plain_gpt

TINY = [
    *("--name", "tiny", "--device", "cpu", "--characters", "20000", "--context_length", "16"),
    *("--batch_size", "4", "--d_model", "16", "--blocks", "2", "--heads", "2", "--repeats", "1"),
]


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "REPO", tmp_path)
    # Whether other processes disturb it is not what is tested.
    monkeypatch.setattr(common, "foreign_cores", lambda before, after: 0.0)
    return tmp_path


def tiny_sides():
    """Return both sides of the comparison, and their setting."""
    parser = plain_gpt.flags()
    setting = plain_gpt.make_setting(parser.parse_args(TINY))
    return plain_gpt.build(setting, compiled=False), setting


@pytest.mark.nightly
def test_it_stores_both_sides(results_folder):
    assert plain_gpt.main([*TINY, "--steps", "150"]) == 0
    stored = json.loads((results_folder / "plain_gpt_tiny.json").read_text())
    ours, plain = stored["variants"]["ours"], stored["variants"]["plain"]
    assert plain["x_plain"] == 1 and ours["x_plain"] == pytest.approx(
        plain["seconds_per_step"]["median"] / ours["seconds_per_step"]["median"]
    )
    for side in (ours, plain):
        assert side["losses"]["last"] < side["losses"]["first"]
    assert stored["model"]["num_experts"] == 1 and stored["characters"] == 20_000
    # Ours has a router, the plain one learned positions: 2 blocks and 16 tokens of 16 features.
    difference = 16 * 16 - 2 * 16
    assert stored["plain_parameters"] - stored["parameters"] == difference


def test_both_sides_see_the_same_tokens(monkeypatch):
    """Also at the text's last window, which is moved back to end at the last token."""
    sides, setting = tiny_sides()
    seen = []
    loss = sides["ours"].task.loss_fn
    sides["ours"].task.loss_fn = lambda model, batch: seen.append(batch) or loss(model, batch)
    steps = sides["plain"].windows.num_windows // setting.config.batch_size + 1
    sides["ours"].run(steps)
    for theirs in seen:
        ours = sides["plain"].batch()
        sides["plain"].samples_seen += setting.config.batch_size
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    assert len(seen) == steps
    assert plain_gpt.seen(sides["ours"]) == plain_gpt.seen(sides["plain"])


def test_losses_that_do_not_fall_alike_are_refused():
    first = {"ours": 4.0, "plain": 4.0}
    plain_gpt.check_losses(first, {"ours": 2.0, "plain": 2.1})
    with pytest.raises(ValueError, match="loss of plain does not fall"):
        plain_gpt.check_losses(first, {"ours": 2.0, "plain": 3.9})
    plain_gpt.check_losses(first, {"ours": 1.9, "plain": 2.3})
    for last in ({"ours": 2.0, "plain": 3.0}, {"ours": 2.4, "plain": 2.0}):
        with pytest.raises(ValueError, match="do not learn alike"):
            plain_gpt.check_losses(first, last)
