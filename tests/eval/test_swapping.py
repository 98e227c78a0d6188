"""stage=eval on LoRA adapters of one base: one model and one engine that swap them give what whole
merged weights give.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.choices import AdapterKind, LoraSync, RolloutBackend
from conf.model import RolloutConfig
from conf.schema import AdapterConfig, ModelConfig
from policy import adapters
from policy.model import no_gather
from policy.saving import adapter_weights, named, save_adapter
from rlhf.cli import config
from rlhf.models.directories import adapter_name, contents
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.run.context import RunContext
from rlhf.stages import eval as stage
from rlhf.stages.evaluation.one_base import Swapped, one_base
from rlhf.stages.evaluation.policies import asked
from rlhf.types import UserError
from tests import toys

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(40, 90)[None]
VLLM = RolloutConfig(backend=RolloutBackend.vllm)
MADE: dict[str, dict[str, Any]] = {
    "polite": {"rank": 4, "alpha": 8.0},
    "brief": {"rank": 2, "targets": ["q_proj", "down_proj"], "rslora": True},
    "ranks": {"rank": 2, "rank_pattern": {"v_proj": 16}},
    "dora": {"rank": 2, "dora": True},
    "norms": {"rank": 2, "save_whole": ["norm"]},
}


def trained(base: Path, seed: int, **options: Any) -> Any:
    """The base with an adapter that has trained, as it were."""
    cfg = ModelConfig(path=str(base))
    model = load_causal_lm(cfg, load_tokenizer(cfg))
    adapter = AdapterConfig(kind=AdapterKind.lora, **options)
    model = adapters.attach(model, adapter, task="CAUSAL_LM", base=str(base)).eval()
    torch.manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(0.05 * torch.randn_like(param))
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A folder with base/, copy/ (the same weights), other/ (a model of its own) and an adapter of
    base/ by each name of MADE; of copy/ `copied`, of `polite` merged `merged`.
    """
    folder = tmp_path_factory.mktemp("places")
    for name in ("base", "copy"):
        shutil.copytree(tiny_model(), folder / name)
    shutil.copytree(tiny_model(tied=False), folder / "other")
    for seed, (name, options) in enumerate(MADE.items()):
        save_adapter(trained(folder / "base", seed, **options), folder / name, name=name)
    save_adapter(trained(folder / "copy", 7, rank=4), folder / "copied", name="polite")
    merged = load(folder / "polite")
    merged.save_pretrained(folder / "merged")
    load_tokenizer(ModelConfig(path=str(folder / "base"))).save_pretrained(folder / "merged")
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    return folder


def load(place: Path) -> Any:
    """Whole weights, an adapter merged into them."""
    cfg = ModelConfig(path=str(place))
    return load_causal_lm(cfg, load_tokenizer(cfg)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def configured(places: Path, folder: Path, before: str, after: str, *more: str) -> config.Config:
    given = ["stage=eval", "rollout=vllm", "tracking=none", f"run.dir={folder}"]
    given += [f"data.eval_path={places / 'prompts.jsonl'}", "data.max_prompt_length=16"]
    given += [f"stage.before={places / before}", f"stage.after={places / after}"]
    given += ["rollout.max_response_length=8", "model.dtype=float32", "stage.bootstrap=20"]
    given += ["reward.function=tests.toys:even_first_token", "stage.greedy=true", *more]
    return config.compose(given)


def samples(places: Path, folder: Path, *paths: str, more: tuple[str, ...] = ()) -> list[Any]:
    """Rows of samples.jsonl: both greedy responses to each prompt, and the KL."""
    cfg = configured(places, folder, *paths, *more)
    assert not stage.check(cfg)
    ctx = RunContext.open(cfg, ())
    stage.run(ctx)
    lines = (ctx.dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- one model ----


@pytest.mark.parametrize(
    "paths", [("polite", "brief"), ("base", "polite"), ("ranks", "base"), ("polite", "copied")]
)
def test_one_model_is_each_state_as_often_as_it_is_asked(
    paths: tuple[str, str], places: Path, tmp_path: Path
) -> None:
    cfg = configured(places, tmp_path, *paths)
    common = one_base(cfg.rollout, *(str(places / path) for path in paths))
    assert common is not None and common.weights == str(places / "base")
    tokenizer = load_tokenizer(ModelConfig(path=str(places / "base")))
    states = Swapped(asked(cfg, tokenizer, *(str(places / path) for path in paths)), common)
    wanted = [logits(load(places / path)) for path in paths]
    assert (wanted[0] - wanted[1]).abs().max() > 0.1
    for _ in range(2):
        torch.testing.assert_close(logits(states.before()), wanted[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(logits(states.after()), wanted[1], rtol=0, atol=1e-4)
    assert states.before() is states.after()


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("base", "merged", "both are whole weights"),
        ("merged", "polite", "rests on"),
        ("other", "polite", "rests on"),
        ("polite", "dora", "has use_dora=True"),
        ("norms", "polite", "has modules_to_save=['model.norm']"),
    ],
)
def test_what_can_not_be_swapped_is_compared_by_whole_weights(
    before: str, after: str, reason: str, places: Path
) -> None:
    paths = str(places / before), str(places / after)
    assert one_base(VLLM, *paths) is None
    asked = RolloutConfig(backend=RolloutBackend.vllm, lora_sync=LoraSync.adapter)
    with pytest.raises(UserError) as refused:
        one_base(asked, *paths)
    assert "rollout.lora_sync=adapter" in str(refused.value) and reason in str(refused.value)


def test_merged_weights_are_taken_where_they_are_asked_for(places: Path) -> None:
    paths = str(places / "polite"), str(places / "brief")
    assert one_base(VLLM, *paths) is not None
    for changed in (
        RolloutConfig(backend=RolloutBackend.vllm, lora_sync=LoraSync.merged),
        RolloutConfig(backend=RolloutBackend.hf),
        RolloutConfig(backend=RolloutBackend.vllm, max_lora_rank=1),
    ):
        assert one_base(changed, *paths) is None


# ---- names ----


def test_an_adapters_name_is_saved_with_it(places: Path, tmp_path: Path) -> None:
    assert [adapter_name(contents(places / name).adapters[0]) for name in MADE] == list(MADE)
    model = trained(places / "base", 3, rank=2)
    assert named(adapter_weights, "task")(model, no_gather).name == "task"  # type: ignore[union-attr]
    save_adapter(model, tmp_path / "evil", name="../outside")
    assert adapter_name(contents(tmp_path / "evil").adapters[0]) is None
    model.save_pretrained(tmp_path / "theirs")
    assert adapter_name(contents(tmp_path / "theirs").adapters[0]) is None


# ---- whole runs ----

CASES = [
    ("polite", "brief"),
    *(
        pytest.param(*paths, marks=pytest.mark.full)
        for paths in (("base", "polite"), ("ranks", "base"), ("polite", "copied"))
    ),
]


@pytest.mark.vllm
@pytest.mark.parametrize(("before", "after"), CASES)
def test_the_same_answers_as_by_whole_weights(
    before: str,
    after: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Greedy tokens are equal, and so is the KL within 1e-4 a token; no merged copy is written."""
    by_whole = ("rollout.lora_sync=merged", "run.name=whole")
    wanted = samples(places, tmp_path, before, after, more=by_whole)
    loaded = []
    load = Swapped.generate

    def noted(self: Swapped, *args: Any) -> Any:
        loaded.append(self)
        return load(self, *args)

    monkeypatch.setattr(Swapped, "generate", noted)
    found = samples(places, tmp_path, before, after, more=("run.name=swapped",))
    assert len(loaded) == 1 and len(found) == len(wanted) > 4
    assert not (tmp_path / "swapped" / "eval" / "start").exists()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["response_before"] == theirs["response_before"]
        assert ours["response"] == theirs["response"]
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4 * ours["response_length"])
    assert any(row["response_before"] != row["response"] for row in found)
    if (before, after) == ("polite", "brief"):
        assert "Before (polite) and after (brief)" in capsys.readouterr().out


@pytest.mark.vllm
@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [("merged", "polite"), ("polite", "dora")])
def test_mixed_cases_still_run(before: str, after: str, places: Path, tmp_path: Path) -> None:
    found = samples(places, tmp_path, before, after)
    same = [row["response_before"] == row["response"] for row in found]
    assert all(same) is (before == "merged"), "polite and its merged weights write alike"
