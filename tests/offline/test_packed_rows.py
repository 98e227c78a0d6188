"""Packed rows that attend by themselves train as those that a mask keeps apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.choices import AdapterKind
from conf.schema import AdapterConfig, EngineConfig, ModelConfig
from conf.stages import SFTStage
from policy.model import BY_SEGMENTS
from rlhf.offline import packed_rows
from rlhf.offline.trainers import SFT
from rlhf.run.context import RunContext
from rlhf.stages import methods, sft
from rlhf.stages import rows as stage_rows
from tests.offline import trl_tools
from tests.online.families import tiny_family


def test_lengths_by_hand() -> None:
    """A prompt of no tokens, then the rows."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        longest = packed_rows.LONGEST_DENSE + rows[0]["more"]
        ends = torch.tensor([0, 3, 10, longest], dtype=torch.int32)
        return {"input_ids": torch.zeros(1, longest, dtype=torch.long), "cu_seq_lens_q": ends}

    batch = packed_rows.WithLengths(collate)([{"more": 1}])
    mask = batch["attention_mask"]
    assert mask.dtype is torch.long
    assert mask.tolist() == [[[[0, 3, 7, packed_rows.LONGEST_DENSE - 9]]]]
    assert "attention_mask" not in packed_rows.WithLengths(collate)([{"more": 0}])


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_rows_by_themselves_train_as_behind_a_mask(
    tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods.register()
    trl_tools.tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tiny_family("qwen3", tmp_path / "tokenizer", tmp_path / "start")
    masks: list[Tensor] = []
    real = packed_rows.lengths_mask

    def counted(lengths: Tensor) -> Tensor:
        masks.append(lengths)
        return real(lengths)

    monkeypatch.setattr(packed_rows, "lengths_mask", counted)
    found = {}
    for name, longest in (("masked", 10**6), ("alone", 0)):
        monkeypatch.setattr(packed_rows, "LONGEST_DENSE", longest)
        masks.clear()
        cfg = trl_tools.config(
            SFTStage(
                packing=True,
                steps=4,
                batch_size=2,
                eval_steps=4,
                max_length=60,
                learning_rate=1e-3,
                adam_eps=1e-4,
            ),
            tmp_path,
            name,
            trl_tools.sft_rows(),
            model=ModelConfig(path=str(tmp_path / "start")),
            adapter=AdapterConfig(kind=AdapterKind(adapter), rank=4),
            engine=EngineConfig(micro_batch_size=1, gradient_checkpointing=name == "alone"),
        )
        sft.run(RunContext.open(cfg), stage_rows)
        found[name] = Path(cfg.run.dir) / name / "sft"
        # that of the proof, then at least one for each of the steps' micro-batches
        assert (len(masks) >= 9) is (longest == 0)
    masked, alone = found["masked"], found["alone"]
    expected = trl_tools.losses(masked)
    assert trl_tools.losses(alone) == pytest.approx(expected, abs=1e-5) and len(expected) == 4
    held_out = [
        [line["eval_loss"] for line in trl_tools.metric_lines(run) if "eval_loss" in line]
        for run in (masked, alone)
    ]
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-5)
    assert held_out[0][-1] < held_out[0][0] - 1e-3, "a model that stands still would pass"
    compared = 0
    for path in masked.glob("*/*.safetensors"):
        other = load_file(alone / path.relative_to(masked))
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(other[key], tensor, atol=1e-5, rtol=0, msg=key)
            compared += 1
    assert compared >= 8


def test_families_without_such_attention_keep_the_mask(tmp_path: Path) -> None:
    trl_tools.tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    kinds = {}
    for family in ("llama", "mistral"):  # the latter has a sliding window
        tiny_family(family, tmp_path / "tokenizer", tmp_path / family)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        kinds[family] = packed_rows.packed_sft(model, EngineConfig())
        by_segments = model.config._attn_implementation == BY_SEGMENTS
        assert by_segments is (family == "llama")
    assert kinds == {"llama": packed_rows.PackedSFT, "mistral": SFT}
