"""What a stage loads is what the stage before it had when it saved, whatever adapter either trains:
base + first adapter + second adapter, merged or not.
"""

import importlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import ModelConfig
from policy import adapters
from reward.model import load_reward_module
from reward.scorers import reward_model
from rlhf.__main__ import execute
from rlhf.cli import config
from rlhf.models.directories import contents
from rlhf.models.loading import load_causal_lm, load_classifier, load_tokenizer
from rlhf.run.context import RunContext
from rlhf.stages import online, preference, reward, sft
from rlhf.stages import rows as stage_rows
from rlhf.stages.evaluation import policies
from rlhf.types import UserError
from tests import toys
from tests.offline import trl_tools

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = ["model.dtype=float32", "tracking=none", "stage.steps=2", "stage.learning_rate=2e-2"]
OFFLINE = [*COMMON, "stage.batch_size=4", "stage.eval_steps=2", "stage.max_length=48"]
ONLINE = [
    *COMMON,
    "rollout=hf",
    "data.max_prompt_length=24",
    "rollout.max_response_length=4",
    "reward.function=tests.toys:even_tokens",
    "stage.save_steps=0",
]
OPTIONS = {
    "sft": OFFLINE,
    "reward": [*OFFLINE, "stage.bootstrap=10"],
    "dpo": OFFLINE,
    "kto": OFFLINE,
    "orpo": OFFLINE,
    "ppo": [*ONLINE, "stage.prompts_per_step=4", "stage.critic_init=policy"],
    "grpo": [*ONLINE, "stage.prompts_per_step=2", "stage.samples_per_prompt=2"],
}
ADAPTERS = {
    "none": [],
    "lora": ["adapter=lora", "adapter.rank=4"],
    "merged": ["adapter=lora", "adapter.rank=2", "adapter.merge_on_save=true"],
}
MODULES = {"ppo": "online", "grpo": "online"} | dict.fromkeys(("dpo", "kto", "orpo"), "preference")
IDS = torch.arange(40, 100)[None]  # single letters among them


@torch.no_grad()
def figures(model: Any) -> torch.Tensor:
    """The logits of IDS, or a classifier's score."""
    was_training = model.training
    out: torch.Tensor = model.eval()(input_ids=IDS).logits
    model.train(was_training)
    return out


@dataclass
class Runs:
    """Runs of a folder, each stage and adapter on each start once."""

    folder: Path
    base: Path
    saved: dict[Path, torch.Tensor] = field(default_factory=dict)  # figures by directory

    def model(self, *chain: str) -> Path:
        """The model after a chain of ``stage:adapter``, each of which starts from the one
        before.
        """
        start = self.base if len(chain) == 1 else self.model(*chain[:-1])
        name = "-".join(chain).replace(":", "_")
        stage, adapter = chain[-1].split(":")
        run = self.folder / name / stage
        if not run.exists():
            given = [f"stage={stage}", f"run.dir={self.folder}", f"run.name={name}"]
            given += [f"model.path={start}", f"data.path={self.folder / self.rows(stage)}"]
            ctx = RunContext.open(config.compose([*given, *OPTIONS[stage], *ADAPTERS[adapter]]))
            importlib.import_module(f"rlhf.stages.{MODULES.get(stage, stage)}").run(ctx, stage_rows)
        return run / "model"

    def rows(self, stage: str) -> str:
        if stage in ("sft", "reward"):
            return {"sft": "sft.jsonl", "reward": "pairs.jsonl"}[stage]
        return "prompts.jsonl" if MODULES[stage] == "online" else "pairs.jsonl"


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("chains")
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows(20))
    trl_tools.write_rows(folder / "pairs.jsonl", trl_tools.pair_rows(20))
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    made = Runs(folder, tiny_model())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_model", "save_adapter"):
            patch.setattr(adapters, name, noting(made, getattr(adapters, name)))
        yield made


def noting(runs: Runs, save: Callable[..., None]) -> Callable[..., None]:
    def noted(model: Any, *arguments: Any) -> None:
        directory = next(value for value in arguments if isinstance(value, Path))
        runs.saved[directory] = figures(model)
        save(model, *arguments)

    return noted


def read(directory: Path, stage: str) -> Any:
    cfg = ModelConfig(path=str(directory))
    if stage == "reward":
        return load_reward_module(directory, torch.float32)
    return load_causal_lm(cfg, load_tokenizer(cfg)).eval()


FIRST = "sft:lora"
COVERING = [
    ("sft:lora", "sft:none"),
    ("sft:lora", "sft:lora"),
    ("sft:lora", "sft:merged"),
    ("sft:lora", "reward:none"),
    ("sft:lora", "reward:lora"),
    ("sft:lora", "dpo:none"),
    ("sft:lora", "sft:lora", "dpo:lora"),
    ("sft:lora", "ppo:none"),
    ("sft:lora", "sft:lora", "grpo:lora"),
]
REST = [
    chain
    for first in ("none", "lora", "merged")
    for second in ("sft", "reward", "dpo", "kto", "orpo", "ppo", "grpo")
    for adapter in ADAPTERS
    if (chain := (f"sft:{first}", f"{second}:{adapter}")) not in COVERING
]


@pytest.mark.parametrize(
    "chain",
    [*COVERING, *(pytest.param(chain, marks=pytest.mark.full) for chain in REST)],
    ids=">".join,
)
def test_what_is_read_back_is_what_was_trained(runs: Runs, chain: tuple[str, ...]) -> None:
    stage = chain[-1].split(":")[0]
    before, after = runs.model(*chain[:-1]), runs.model(*chain)
    found = read(after, stage)
    torch.testing.assert_close(figures(found), runs.saved[after], atol=2e-5, rtol=1e-5)
    assert all(weight.requires_grad for weight in found.parameters())
    # each run changed the model: what was read is neither the start nor the base
    if stage != "reward":
        for other in (before, runs.base):
            assert (figures(read(other, stage)) - runs.saved[after]).abs().max() > 1e-3


EVALUATED = [(FIRST, f"{stage}:{a}") for stage in ("sft", "reward", "dpo", "ppo") for a in ADAPTERS]
EVAL = [
    "stage=eval",
    "rollout=hf",
    "tracking=none",
    "model.dtype=float32",
    "data.max_prompt_length=24",
    "rollout.max_response_length=4",
    "stage.prompts=2",
    "stage.samples_per_prompt=1",
    "stage.bootstrap=10",
]


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param(chain, marks=() if chain in COVERING else pytest.mark.full)
        for chain in EVALUATED
    ],
    ids=">".join,
)
def test_eval_loads_what_the_last_stage_had(
    runs: Runs, chain: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``python -m rlhf stage=eval`` runs it: each time that it loads a policy or a reward model,
    in the engine that generates too, that is the model which the stage before it saved.
    """
    loaded: list[tuple[Path, torch.Tensor]] = []

    def noted(load: Callable[..., Any]) -> Callable[..., Any]:
        def loading(given: Any, *rest: Any, **more: Any) -> Any:
            model = load(given, *rest, **more)
            path = given.path if isinstance(given, ModelConfig) else given
            loaded.append((Path(path), figures(model)))
            return model

        return loading

    monkeypatch.setattr(policies, "load_causal_lm", noted(load_causal_lm))
    monkeypatch.setattr(reward_model, "load_reward_module", noted(load_reward_module))
    monkeypatch.setattr("rlhf.run.plots.plot_run", lambda _: [])
    before, place = runs.model(*chain[:-1]), runs.model(*chain)
    given = [*EVAL, f"run.dir={runs.folder}", f"run.name=eval_{chain[-1].replace(':', '_')}"]
    given += [f"data.path={runs.folder / 'prompts.jsonl'}", f"model.path={before}"]
    expected = {before, place}
    if "reward" in chain[-1]:
        given += [f"stage.before={runs.base}", f"stage.after={before}", f"reward.path={place}"]
        expected.add(runs.base)
    else:
        given += [f"stage.before={before}", f"stage.after={place}"]
    execute(config.compose(given), ())
    assert {path for path, _ in loaded} == expected
    for path, found in loaded:
        saved = figures(read(runs.base, "sft")) if path == runs.base else runs.saved[path]
        torch.testing.assert_close(found, saved, atol=2e-5, rtol=1e-5)


def test_a_run_begins_at_the_loss_at_which_the_last_one_ended(runs: Runs) -> None:
    chain = ("sft:lora", "sft:lora", "sft:none")
    ends = []
    for length in (1, 2, 3):
        summary = runs.model(*chain[:length]).parent / "summary.json"
        ends.append(json.loads(summary.read_text(encoding="utf-8"))["metrics"])
    for before, after in itertools.pairwise(ends):
        assert after["initial/eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "chain",
    [
        ("reward:none", "reward:still"),
        ("reward:lora", "reward:still_lora"),
        ("sft:lora", "dpo:still"),
        ("dpo:lora", "ppo:still"),
        ("ppo:none", "ppo:still_lora"),
        ("ppo:lora", "ppo:still"),
    ],
    ids=">".join,
)
def test_a_run_that_learns_nothing_saves_what_the_last_one_saved(
    runs: Runs, chain: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it began with the weights at which the last one ended, whatever stage and adapter."""
    still = ["stage.learning_rate=1e-20"]
    monkeypatch.setitem(ADAPTERS, "still", still)
    monkeypatch.setitem(ADAPTERS, "still_lora", [*still, *ADAPTERS["lora"]])
    before, after = runs.model(*chain[:-1]), runs.model(*chain)
    torch.testing.assert_close(runs.saved[after], runs.saved[before], atol=2e-5, rtol=1e-5)
    if "reward" not in chain[0]:
        assert (runs.saved[after] - figures(read(runs.base, "sft"))).abs().max() > 1e-3


def test_other_libraries_read_an_adapter_on_an_adapter_too(runs: Runs) -> None:
    """PEFT follows one base only: it has to be whole weights."""
    from peft import AutoPeftModelForCausalLM

    place = runs.model(FIRST, "sft:lora")
    for directory in (place, place.parent / "adapter"):
        model = AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        torch.testing.assert_close(figures(model), runs.saved[place], atol=2e-5, rtol=1e-5)
    named = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    assert named["base_model_name_or_path"] == str((place.parent / "start").resolve())


def test_an_adapter_that_names_an_adapter_is_read_whole(runs: Runs, tmp_path: Path) -> None:
    """As older versions and other trainers wrote it: the base's adapter counts as well."""
    first, second = runs.model(FIRST), runs.model(FIRST, "sft:lora")
    for file in second.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    adapter = json.loads((second / "adapter_config.json").read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = str(first)
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    held = contents(tmp_path)
    assert [one.directory for one in held.adapters] == [first, tmp_path]
    assert Path(held.weights) == runs.base and not held.loads_as_it_is
    torch.testing.assert_close(
        figures(read(tmp_path, "sft")), runs.saved[second], atol=2e-5, rtol=1e-5
    )


def test_a_classifier_has_the_weights_of_base_and_adapter(runs: Runs) -> None:
    place = runs.model(FIRST)
    cfg = ModelConfig(path=str(place))
    tokenizer = load_tokenizer(cfg)
    policy, classifier = load_causal_lm(cfg, tokenizer), load_classifier(cfg, tokenizer)
    with torch.no_grad():
        expected, found = (
            model.eval().model(input_ids=IDS).last_hidden_state for model in (policy, classifier)
        )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert classifier.score.weight.shape[0] == 1
    # a reward run's own adapter brings the head along
    reward = runs.model(FIRST, "reward:lora")
    again = load_classifier(ModelConfig(path=str(reward.parent / "adapter")), tokenizer)
    torch.testing.assert_close(figures(again), runs.saved[reward], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "orpo", "kto", "grpo", "ppo"])
def test_an_adapter_on_a_tied_weight_is_refused_before_anything_loads(
    runs: Runs, stage: str, target: str
) -> None:
    """Merged, it would change the other use of the weight too: 5.1 trained, 27.1 read back."""
    given = [f"stage={stage}", f"run.dir={runs.folder}", f"model.path={runs.base}"]
    given += [f"data.path={runs.folder / runs.rows(stage)}", *OPTIONS[stage], *ADAPTERS["lora"]]
    given.append(f"adapter.targets=[q_proj,{target}]")
    module = {"sft": sft, "grpo": online, "ppo": online}.get(stage, preference)
    with pytest.raises(UserError, match=rf"adapter\.targets=.*'{target}'.*tied embeddings"):
        module.check(config.compose(given))


def test_a_reward_model_has_no_head_of_a_language_model(runs: Runs) -> None:
    given = ["stage=reward", f"run.dir={runs.folder}", f"model.path={runs.base}"]
    given += [f"data.path={runs.folder / 'pairs.jsonl'}", *OPTIONS["reward"], *ADAPTERS["lora"]]
    with pytest.raises(UserError, match="no such module as 'lm_head'"):
        reward.check(config.compose([*given, "adapter.targets=[q_proj,lm_head]"]))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_weight_that_is_not_tied_is_read_back(
    runs: Runs, tiny_model: Callable[..., Path], target: str
) -> None:
    untied = Runs(runs.folder / f"untied_{target}", tiny_model(tied=False), runs.saved)
    untied.folder.mkdir()
    for name in ("sft.jsonl", "prompts.jsonl", "pairs.jsonl"):
        (untied.folder / name).write_bytes((runs.folder / name).read_bytes())
    ADAPTERS[target] = [*ADAPTERS["lora"], f"adapter.targets=[{target}]"]
    for stage in ("grpo", "orpo" if target == "lm_head" else "sft"):
        place = untied.model(f"{stage}:{target}")
        found = figures(read(place, stage))
        torch.testing.assert_close(found, untied.saved[place], atol=2e-5, rtol=1e-5)
        assert (figures(read(untied.base, stage)) - found).abs().max() > 1e-3
