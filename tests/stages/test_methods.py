"""Every preset of conf/adapter in every kind of stage: it trains two steps, what it saves is read
back as it was, and a generator computes what the trainer does. A new preset is tried by itself.
"""

import contextlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.adapters import READS, facts_of
from conf.schema import Config, ModelConfig
from policy import adapters
from policy.model import base_of
from reward.model import load_reward_module
from rlhf.cli import config, presets
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.checking import check
from tests.offline import trl_tools

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = ["model.dtype=float32", "tracking=none", "stage.steps=2", "stage.learning_rate=1e-2"]
OFFLINE = [*COMMON, "stage.batch_size=4", "stage.eval_steps=2", "stage.max_length=48"]
ONLINE = [
    *COMMON,
    "data.max_prompt_length=24",
    "rollout.max_response_length=4",
    "reward.function=tests.toys:even_tokens",
    "stage.save_steps=0",
    "stage.prompts_per_step=2",
    "stage.samples_per_prompt=2",
]
# name -> (stage, module, options, rows)
CELLS = {
    "sft": ("sft", "sft", OFFLINE, "sft.jsonl"),
    "reward": ("reward", "reward", [*OFFLINE, "stage.bootstrap=10"], "pairs.jsonl"),
    "dpo": ("dpo", "preference", OFFLINE, "pairs.jsonl"),
    "kto": ("kto", "preference", OFFLINE, "pairs.jsonl"),
    "cpo": ("cpo", "preference", OFFLINE, "pairs.jsonl"),
    "orpo": ("orpo", "preference", OFFLINE, "pairs.jsonl"),
    "hf": ("grpo", "online", [*ONLINE, "rollout=hf"], "prompts.jsonl"),
    "vllm": ("grpo", "online", [*ONLINE, "rollout=vllm"], "prompts.jsonl"),
}
# Sizes for a model of two layers.
TINY: dict[str, list[str]] = {
    "lora_plus": ["stage.learning_rate=1e-3"],  # B trains at 16 times that
    "houlsby": ["adapter.bottleneck.size=8"],
    "pfeiffer": ["adapter.bottleneck.size=8"],
    "parallel": ["adapter.bottleneck.size=8"],
    "molora": ["adapter.molora.experts=3"],
    "prompt": ["adapter.prompt.tokens=5"],
    "ptuning": ["adapter.prompt.tokens=5", "adapter.prompt.encoder_size=16"],
    "prefix": ["adapter.prompt.tokens=5"],
}
# What a cell is refused for, before anything loads: the option that the message names.
REFUSED: dict[tuple[str, str], str] = {
    ("vllm", "prefix"): "rollout=vllm has no way for adapter.kind=prefix. Set rollout=hf.",
}
# Rows decide which layers have which rank: parameters as said but for this share.
ROUGHLY = {"eva": 0.02}
# What trains of these follows from the rows: tests/policy/adapters/test_gelora.py
BY_ROWS = ("gelora",)
PRESETS = sorted(path.stem for path in (presets.CONF_DIR / "adapter").glob("*.yaml"))
PRESETS.remove("none")
IDS = torch.arange(40, 100)[None]
# each preset once in the tests that always run; the whole matrix in `make test-full`
# (variants of a method that is among them aside)
VARIANTS = ("rslora", "olora", "corda", "lora_plus", "lora_fa", "parallel", "pfeiffer")
COVERING = [("sft", name) for name in PRESETS if name not in VARIANTS]
REST = [(cell, name) for cell in CELLS for name in PRESETS if (cell, name) not in COVERING]


@dataclass
class Bench:
    """Where the runs are, and what their models computed when they were saved."""

    folder: Path
    base: Path
    saved: dict[Path, torch.Tensor] = field(default_factory=dict)

    def config(self, cell: str, preset: str, *more: str) -> Config:
        stage, _, options, rows = CELLS[cell]
        given = [f"stage={stage}", f"run.dir={self.folder}", f"run.name={cell}-{preset}"]
        given += [f"model.path={self.base}", f"data.path={self.folder / rows}"]
        given += [*options, f"adapter={preset}", "adapter.dropout=0", *TINY.get(preset, [])]
        return config.compose([*given, *more])

    def run(self, cell: str, preset: str, *more: str, killed_at: int | None = None) -> Path:
        """`killed_at`: the run ends like one that is killed while that step is written down."""
        ctx = RunContext.open(self.config(cell, preset, *more))
        log = ctx.tracker.log

        def killed(step: int, metrics: Any) -> None:
            if step == killed_at:
                raise KeyboardInterrupt
            log(step, metrics)

        ctx.tracker.log = killed  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            importlib.import_module(f"rlhf.stages.{CELLS[cell][1]}").run(ctx, stage_rows)
        return ctx.dir


@pytest.fixture
def bench(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Bench:
    trl_tools.write_rows(tmp_path / "sft.jsonl", trl_tools.sft_rows(20))
    trl_tools.write_rows(tmp_path / "pairs.jsonl", trl_tools.pair_rows(20))
    toys.write_jsonl(tmp_path / "prompts.jsonl", toys.prompt_rows())
    made = Bench(tmp_path, tiny_model())
    save = adapters.save

    def noted(model: Any, adapter: Any, tokenizer: Any, directory: Path, *rest: Any, **more: Any):  # type: ignore[no-untyped-def]
        made.saved[directory] = figures(model)
        save(model, adapter, tokenizer, directory, *rest, **more)

    monkeypatch.setattr(adapters, "save", noted)
    return made


@torch.no_grad()
def figures(model: Any) -> torch.Tensor:
    """The logits of IDS, or a classifier's score."""
    was_training = model.training
    out: torch.Tensor = model.eval()(input_ids=IDS).logits
    model.train(was_training)
    return out


def read(directory: Path, cell: str) -> Any:
    if cell == "reward":
        return load_reward_module(directory, torch.float32)
    cfg = ModelConfig(path=str(directory))
    return load_causal_lm(cfg, load_tokenizer(cfg), native=True).eval()


def wear(base: Path, adapter: Path) -> Any:
    """A plain LoRA as PEFT alone reads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


@pytest.mark.parametrize(
    ("cell", "preset"),
    [*COVERING, *(pytest.param(*cell, marks=pytest.mark.full) for cell in REST)],
)
def test_it_trains_and_is_read_back(cell: str, preset: str, bench: Bench) -> None:
    cfg = bench.config(cell, preset)
    if (cell, preset) in REFUSED:
        with pytest.raises(UserError) as refused:
            check(cfg)
        assert REFUSED[cell, preset] in str(refused.value)
        return
    check(cfg)
    start = figures(read(bench.base, "sft"))
    directory = bench.run(cell, preset)
    trained = bench.saved[directory]
    assert torch.isfinite(trained).all()
    if cell != "reward":
        assert not torch.equal(trained, start), "nothing was trained"
    again = figures(read(directory / "model", cell))
    torch.testing.assert_close(again, trained, atol=1e-5, rtol=1e-5)
    assert (directory / "adapter" / "adapter_config.json").is_file()
    if (directory / "lora").is_dir() and cell != "reward":
        twin = figures(wear(bench.base, directory / "lora"))
        torch.testing.assert_close(twin, trained, atol=1e-5, rtol=1e-5)
    if cell in ("hf", "vllm"):
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["metrics"]["rollout/logprob_gap_max"] < 1e-4


@pytest.mark.full
@pytest.mark.parametrize(("cell", "saving"), [("sft", "eval_steps"), ("hf", "save_steps")])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_goes_on_to_the_bit(cell: str, saving: str, preset: str, bench: Bench) -> None:
    """As if it had never stopped, dropout included where the method has one."""
    more = ["stage.steps=4", f"stage.{saving}=2", "run.keep_checkpoints=0"]
    if "dropout" in READS[bench.config(cell, preset).adapter.kind]:
        more.append("adapter.dropout=0.2")
    straight = bench.run(cell, preset, *more, "run.name=straight")
    broken = bench.run(cell, preset, *more, "run.name=broken", killed_at=4)
    assert not (broken / "adapter").exists()
    broken = bench.run(cell, preset, *more, "run.name=broken", "run.resume=true")
    starts = json.loads((broken / "manifest.json").read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 2 and starts[1]["resume_from"].endswith("-2")
    expected = load_file(straight / "adapter" / "adapter_model.safetensors")
    found = load_file(broken / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize("preset", PRESETS)
def test_what_trains_is_what_the_formula_says(preset: str, bench: Bench) -> None:
    if preset in BY_ROWS:
        return
    cfg = bench.config("sft", preset)
    model = read(bench.base, "sft")
    wanted = adapters.method_of(cfg.adapter).expected(model, cfg.adapter)
    rows = [list(range(40 + i, 60 + i)) for i in range(16)]
    adapted = adapters.attach(model, cfg.adapter, task="CAUSAL_LM", sample=lambda: rows)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained > 0
    assert abs(trained - wanted) <= ROUGHLY.get(preset, 0.0) * wanted


@pytest.mark.parametrize("preset", PRESETS)
def test_switched_off_it_is_the_start(preset: str, bench: Bench) -> None:
    cfg = bench.config("sft", preset)
    if not facts_of(cfg.adapter).off_is_start:
        return
    model = read(bench.base, "sft")
    adapters.prepare(model, cfg.adapter)  # the start may be rounded weights
    before = figures(model)
    rows = [list(range(40 + i, 60 + i)) for i in range(16)]
    adapted = adapters.attach(model, cfg.adapter, task="CAUSAL_LM", sample=lambda: rows)
    with torch.no_grad():
        for param in adapted.parameters():
            if param.requires_grad:
                param.add_(0.1)
    assert not torch.equal(figures(adapted), before)
    with adapted.disable_adapter():
        assert torch.equal(figures(adapted), before)
    assert base_of(adapted) is not adapted
