"""AdaLoRA under TRL's trainers and ZeRO on two CPU ranks: the penalty is added once, the budget
falls by gradients over all ranks, and masks reach the float32 weights that ranks hold parts of.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import ModelKind
from conf.schema import ModelConfig
from rlhf.models.loading import load_causal_lm
from tests.offline import trl_tools, zero_trl_worker
from tests.offline.test_zero_trl import launch, spec_of

pytestmark = [pytest.mark.distributed, pytest.mark.full]
CASES = [("sft", 0), ("sft", 1), ("reward", 1), ("dpo", 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_thread: Iterator[None]) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows())
    trl_tools.write_rows(folder / "reward.jsonl", trl_tools.pair_rows())
    tokenizer = trl_tools.tiny_tokenizer()
    torch.manual_seed(0)
    tiny = ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY)
    load_causal_lm(tiny, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for stage in dict.fromkeys(stage for stage, _ in CASES):
        zero_trl_worker.run_case(spec_of(folder, "one", []), stage, None, "adalora")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch(folder, "two", ranks, [(stage, zero, "adalora") for stage, zero in CASES])
    return folder


@pytest.mark.parametrize(("stage", "zero"), CASES)
def test_two_ranks_end_as_one_process(runs: Path, stage: str, zero: int) -> None:
    places = (
        runs / "one" / "torch-adalora" / stage,
        runs / "two" / f"zero{zero}-adalora" / stage,
    )
    told = [json.loads((place / "summary.json").read_text("utf-8"))["adapter"] for place in places]
    assert told[0] == told[1]
    assert told[0]["used"] == told[0]["budget"]
    expected, found = (load_file(one / "adapter" / "adapter_model.safetensors") for one in places)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    values = [tensor for name, tensor in expected.items() if name.endswith("lora_E")]
    assert max(float(one.abs().max()) for one in values) > 1e-3, "nothing was trained"
