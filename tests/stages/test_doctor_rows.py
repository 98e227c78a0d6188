"""The doctor compares what trains with what the sampler goes on from, row by row."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.schema import DataConfig, ModelConfig
from rlhf.stages.examination import agreement
from rlhf.stages.examination.findings import State
from tests.models import families
from tests.models.families import made

CHAT = {
    "messages": [
        {"role": "user", "content": "is it so"},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "sat"},
        {"role": "assistant", "content": "on the mat"},
    ]
}
PAIR = {"prompt": CHAT["messages"][:1], "chosen": CHAT["messages"][1:2], "rejected": "dog"}
PAIR["rejected"] = [{"role": "assistant", "content": "dog"}]


def findings(folder: Path, tokenizer: Any, *rows: dict[str, Any]) -> dict[State, str]:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = agreement.check_rows(ModelConfig(path=str(folder)), DataConfig(path=str(data)), seed=0)
    return {finding.state: finding.found for finding in found}


@pytest.mark.parametrize("template", [families.PHI, families.UNPROMPTED, families.SPACED])
@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        PAIR,
        {"prompt": CHAT["messages"][:1]},
        {"text": "the cat"},
        {"prompt": "is it so", "completion": " the cat"},
    ],
)
def test_equal_token_for_token(tmp_path: Path, template: str, row: dict[str, Any]) -> None:
    found = findings(tmp_path, made(template=template), row, row)
    assert "2 rows" in found[State.ok]
    told = found.get(State.warn, "")
    unprompted = template is families.UNPROMPTED and not {"text", "completion"} & set(row)
    assert ("2 rows" in told and repr("<|assistant|>\n") in told) == unprompted, told
    assert "'<|end|>'" in found[State.info]


def test_the_first_row_that_differs_is_named(tmp_path: Path) -> None:
    spaced = json.loads(json.dumps(CHAT))
    spaced["messages"][1]["content"] = "the cat "
    trims = families.PHI.replace("m['content']", "m['content'] | trim")
    found = findings(tmp_path, made(template=trims), CHAT, spaced, spaced)
    assert "2 of 3 rows" in found[State.warn] and "row 2" in found[State.warn]
    assert "'the cat '" in found[State.warn] and "'the cat'" in found[State.warn]


def test_refused_rows_and_roles_that_nobody_reads(tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "looked"}, *CHAT["messages"]]}
    special = ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    tok = made(special, eos="<eos>", bos="<bos>", template=families.GEMMA)
    found = findings(tmp_path, tok, CHAT, system)
    assert "1 of 2 rows" in found[State.warn] and "row 2" in found[State.warn]
    assert "System role not supported" in found[State.warn]
    found = findings(tmp_path, made(template=families.SILENT), CHAT, system)
    assert "1 rows" in found[State.warn] and "'system'" in found[State.warn]
