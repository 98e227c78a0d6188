"""stage=export: adapters merged exactly, every form read again before it counts, a card with where
the model comes from.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.__main__ import execute
from rlhf.cli import config
from rlhf.export import gguf_file
from rlhf.models.directories import contents
from rlhf.run.models import model_path
from rlhf.types import UserError
from tests.checking import check
from tests.export.made import CHATML, language_model, saved
from tests.models import families

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("stage.answer_tokens=6", "engine.threads=1")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = families.made(template=CHATML)
    folder = saved(tmp_path / "base", language_model("llama", tokenizer), tokenizer)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n", encoding="utf-8")
    return folder


@pytest.fixture
def adapter(base: Path) -> Path:
    """A LoRA of rank 4 whose update is about as large as the weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(5)
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            param.data.normal_(std=0.05)
    folder = base.parent / "adapter"
    adapted.save_pretrained(folder)
    return folder


def exported(folder: Path, model: Path | None, *more: str) -> Path:
    given = ["stage=export", f"run.dir={folder}", "run.name=mine", "tracking=none", *SHORT, *more]
    if model is not None:
        given.append(f"model.path={model}")
    execute(config.compose(given), ())
    return folder / "mine" / "export"


@torch.no_grad()
def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    out: torch.Tensor = model.eval()(input_ids=torch.arange(5, 105)[None]).logits
    return out


def test_merged_logits_are_those_of_base_and_adapter(base: Path, adapter: Path) -> None:
    folder = exported(base.parent, adapter)
    expected, found = logits(base, adapter), logits(folder / "model")
    assert float((expected - logits(base)).abs().max()) > 0.5
    assert float((expected - found).abs().max()) < 1e-5
    assert not contents(folder / "model").adapters


def test_every_form_is_checked_and_told(base: Path, adapter: Path) -> None:
    kinds = ["f32", "f16", "q8_0"]
    more = [f"stage.gguf=[{','.join(kinds)}]", "stage.modelfile=true", "stage.title=toy"]
    folder = exported(base.parent, adapter, *more)
    files = {path.name for path in (folder / "gguf").iterdir()}
    expected = {f"toy-{kind}.gguf" for kind in kinds} | {f"Modelfile.{kind}" for kind in kinds}
    assert files == expected | {"README.md"}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["model"] == "model"
    metrics = summary["metrics"]
    assert metrics["f32/same_answers"] == 20 and metrics["f16/same_answers"] >= 19
    assert metrics["float32/same_answers"] == 20
    card = (folder / "gguf" / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nlicense: "apache-2.0"\n') and "| f32 | 20 of 20 |" in card
    assert str(adapter) in card and str(base) in card
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["path"] for entry in manifest["parents"]] == [str(adapter)]


def test_number_format_of_the_safetensors(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file

    bound = "stage.least_agreement=1"
    folder = exported(base.parent, base, "stage.dtype=bfloat16", bound)
    tensors = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    told = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"]
    same = told["bfloat16/same_answers"]
    assert ("least_agreement" in caplog.text) is (same < 20)
    config_file = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert config_file["dtype"] == "bfloat16"


def test_an_export_that_answers_otherwise_leaves_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = gguf_file.read_file

    def damaged(path: Path, known: Any = None) -> Any:
        model = read(path, known)
        model.model.layers[0].self_attn.q_proj.weight.data.neg_()
        return model

    monkeypatch.setattr(gguf_file, "read_file", damaged)
    with pytest.raises(UserError, match="f32") as refused:
        exported(base.parent, base, "stage.gguf=[f32]")
    assert "20 have to be" in str(refused.value)
    folder = base.parent / "mine" / "export"
    assert not (folder / "gguf").exists() and not (folder / "summary.json").exists()
    assert not list(folder.glob("*.part"))


def test_rows_of_the_query_matrix_are_in_llama_cpps_order(base: Path) -> None:
    """Row 2 i of a head is row i of the first half, row 2 i + 1 of the second."""
    import gguf
    from safetensors.torch import load_file

    folder = exported(base.parent, base, "stage.gguf=[f32]", "stage.safetensors=false")
    reader = gguf.GGUFReader(folder / "gguf" / "mine-f32.gguf")
    held = {tensor.name: tensor.data for tensor in reader.tensors}["blk.0.attn_q.weight"]
    own = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    head = own[16:32]  # the second of four, 16 wide
    rows = torch.stack([head[i // 2 + 8 * (i % 2)] for i in range(16)])
    assert torch.equal(torch.tensor(held[16:32]), rows)


# ---- which model ----


def finished(
    run: Path, stage: str, model: Path, time: float, kind: str = "LlamaForCausalLM"
) -> Path:
    """A finished stage whose model is a configuration alone."""
    import os

    folder = run / stage
    (folder / "model").mkdir(parents=True)
    held = json.dumps({"architectures": [kind], "model_type": "llama"})
    (folder / "model" / "config.json").write_text(held, encoding="utf-8")
    summary = folder / "summary.json"
    summary.write_text(json.dumps({"stage": stage, "model": "model"}), encoding="utf-8")
    os.utime(summary, (time, time))
    return folder / "model"


def test_the_newest_policy_of_a_run_is_found(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    cfg = config.compose(["stage=export", f"run.dir={tmp_path}", "run.name=mine"])
    with pytest.raises(UserError, match=r"model\.path"):
        model_path(cfg.model, cfg.run)
    sft = finished(run, "sft", tmp_path, 1000)
    reward = finished(run, "reward", tmp_path, 3000, "LlamaForSequenceClassification")
    finished(run, "export", tmp_path, 4000)
    assert model_path(cfg.model, cfg.run) == str(sft)
    ppo = finished(run, "ppo", tmp_path, 2000)
    assert model_path(cfg.model, cfg.run) == str(ppo)
    cfg.model.path = str(reward)
    with pytest.raises(UserError, match="reward model"):
        model_path(cfg.model, cfg.run)


# ---- refused before weights load ----


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["stage.gguf=[f32]", "stage.modelfile=true"], "stage.modelfile"),
        (["stage.gguf=[f32]"], "GPT2LMHeadModel"),
    ],
)
def test_a_model_that_has_no_such_form_is_refused(
    more: Sequence[str], named: str, tmp_path: Path
) -> None:
    tokenizer = families.made(template=None)
    kind = "llama" if "stage.modelfile" in named else "gpt2"
    sizes = {} if kind == "llama" else {"n_embd": 64, "n_layer": 1, "n_head": 2}
    folder = saved(tmp_path / "base", language_model(kind, tokenizer, **sizes), tokenizer)
    given = ["stage=export", f"run.dir={tmp_path}", f"model.path={folder}", *more]
    with pytest.raises(UserError, match=named):
        check(config.compose(given))


@pytest.mark.parametrize(
    "options",
    [
        ["stage.safetensors=false"],
        ["stage.modelfile=true"],
        ["stage.gguf=[f32]", "stage.title=a/b"],
    ],
)
def test_options_that_ask_for_nothing_or_for_a_wrong_name_are_refused(options: list[str]) -> None:
    key = options[-1].partition("=")[0]
    with pytest.raises((UserError, ValueError), match=r"stage\.(gguf|modelfile|title)") as refused:
        config.compose(["stage=export", *options])
    assert key in str(refused.value) or "stage.gguf" in str(refused.value)


def test_an_adapter_that_no_weights_hold_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    held = {"base_model_name_or_path": str(tiny_model()), "peft_type": "PREFIX_TUNING"}
    folder = tmp_path / "prefix"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(UserError, match="PREFIX_TUNING"):
        check(config.compose(["stage=export", f"model.path={folder}"]))
