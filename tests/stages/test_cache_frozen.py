"""stage.cache_frozen: the frozen blocks are computed once, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rlhf.models.loading import load_classifier, load_tokenizer
from rlhf.stages import reward
from rlhf.types import UserError
from tests.offline import trl_tools
from tests.stages.test_parts_of_models import Run, run, weights

assert run  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
LAST = ["stage.train.layers=1", "stage.weight_decay=0.1", "stage.steps=3", "stage.eval_steps=1"]
SCORE = ["stage.train.layers=0", "stage.steps=3"]


def close(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Losses, held-out ones too, and weights."""
    for name in ("loss", "eval_loss", "grad_norm"):
        theirs, ours = (
            [line[name] for line in trl_tools.metric_lines(run) if name in line]
            for run in (expected, found)
        )
        assert len(ours) == len(theirs) >= 2
        assert ours == pytest.approx(theirs, abs=tolerance), name
    ours, theirs = weights(found / "model"), weights(expected / "model")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        LAST,
        [*LAST, "engine.gradient_checkpointing=true"],
        [*SCORE, "stage.train.modules=[model.norm]"],
        SCORE,
    ],
)
def test_a_run_is_what_it_is_without(run: Run, options: list[str]) -> None:
    whole = run("reward", "whole", *options)
    kept = run("reward", "kept", *options, "stage.cache_frozen=true")
    close(kept, whole)


@pytest.mark.full
def test_a_run_in_half_precision_is_what_it_is_without(run: Run) -> None:
    options = [*LAST, "model.dtype=bfloat16"]
    whole = run("reward", "whole", *options)
    kept = run("reward", "kept", *options, "stage.cache_frozen=true")
    close(kept, whole, 2e-2)


def test_frozen_blocks_are_computed_once_for_a_text(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No step computes them, no evaluation; a run with another rate finds the first's states."""
    calls: list[tuple[int, bool]] = []  # the block, and whether it was in a step
    forward = LlamaDecoderLayer.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((self.self_attn.layer_idx, self.training))
        return forward(self, *args, **kwargs)

    def computed(name: str, *options: str) -> tuple[int, int]:
        """Passes of the lower block, those in steps and the others."""
        calls.clear()
        run("reward", name, *LAST, *options)
        assert calls.count((1, True)) == 3
        return calls.count((0, True)), calls.count((0, False))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    keep = "stage.cache_frozen=true"
    evaluations = 4
    steps, others = computed("whole")
    first, again = computed("first", keep), computed("second", keep, "stage.learning_rate=1e-3")
    assert steps == 3 and first[0] == again[0] == 0
    # a pass of two texts without kept states; then, where there are none, of one and of all
    assert again[1] == others - evaluations + 2 and first[1] == again[1] + 2
    assert len(list((tmp_path / ".encoded").glob("frozen-*"))) == 1


@pytest.mark.full
def test_other_weights_or_rows_have_other_states(run: Run, tmp_path: Path) -> None:
    run("reward", "one", *SCORE, "stage.cache_frozen=true")
    run("reward", "two", *SCORE, "stage.cache_frozen=true", untied=True)
    run("reward", "three", *SCORE, "stage.cache_frozen=true", "data.eval_fraction=0.4")
    assert len(list((tmp_path / ".encoded").glob("frozen-*"))) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["adapter=lora"], "adapter=lora trains inside the frozen blocks"),
        ([], "all weights train"),
        (["stage.train.layers=1", "stage.unfreeze.every=1"], "has all blocks train in the end"),
        (["stage.train.layers=2"], "the lowest block, or something below it, trains"),
        (["stage.train.layers=1", "stage.train.modules=[embeddings]"], "something below it"),
    ],
)
def test_what_can_not_be_kept_is_refused(run: Run, options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run("reward", "refused", *options, "stage.cache_frozen=true")


def test_a_full_disk_is_told(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"of hidden states can't be kept.*No space left"):
        run("reward", "full", *SCORE, "stage.cache_frozen=true")
    assert not list((tmp_path / ".encoded").glob("frozen-*"))


def test_a_family_whose_blocks_tell_more_is_refused_by_name(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept states that are not the blocks'."""
    monkeypatch.setattr(
        "rlhf.offline.frozen.FrozenStates.batch",
        lambda self, ids, mask: torch.zeros(*ids.shape, self.hidden),
    )
    with pytest.raises(UserError, match=r"stage\.cache_frozen=true: llama scores"):
        run("reward", "other", *LAST, "stage.cache_frozen=true")


def test_dropout_is_refused_before_weights_load(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from rlhf.cli import config

    options = ["stage=reward", "stage.train.layers=1", "stage.cache_frozen=true"]
    cfg = config.compose([*options, f"model.path={tiny_model()}"])
    reward.check_cache(cfg.stage, cfg.model, cfg.adapter)
    tokenizer = load_tokenizer(cfg.model)
    model = load_classifier(cfg.model, tokenizer)
    model.config.attention_dropout = 0.1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cfg = config.compose([*options, f"model.path={tmp_path}"])
    with pytest.raises(UserError, match="the model's configuration has a dropout"):
        reward.check_cache(cfg.stage, cfg.model, cfg.adapter)
