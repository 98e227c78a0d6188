"""What a policy wrote, kept in the export's run directory as soon as it is complete, so that an
export that was stopped does not generate it again.

The first line of the file is {"key"}, a hash of all that the answers depend on; then follows a
line for each answer, in the order of the prompts.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from conf.choices import Dtype
from conf.schema import RolloutConfig
from rlhf.labels.files import write_text
from rlhf.process.files import digest
from rlhf.types import Prompt, Rollout

LOG = logging.getLogger("rlhf.labels")


def answers_key(
    model_path: str,
    dtype: Dtype,
    rollout: RolloutConfig,
    prompts: Sequence[Prompt],
    count: int,
    seed: int,
) -> str:
    """A hash of all that `count` answers to each prompt depend on: the model's files by name,
    size and time, its precision, how responses are drawn, and the prompts.
    """
    folder = Path(model_path).expanduser()
    entries = list(folder.iterdir()) if folder.is_dir() else []
    files = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in entries
        if file.is_file()
    ]
    sampling = [
        rollout.max_response_length,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
    ]
    tokens = [[prompt.id, list(prompt.token_ids)] for prompt in prompts]
    return digest([model_path, sorted(files), dtype.value, sampling, count, seed, tokens])


def read_kept(path: Path, key: str, prompts: Sequence[Prompt], count: int) -> list[Rollout] | None:
    """The answers in the file `path`, `count` for each prompt; None where there is no file, or one
    with another key.
    """
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").split("\n")
    if json.loads(lines[0]) != {"key": key}:
        LOG.warning(
            "%s holds answers of another policy, other prompts or options, so they are generated "
            "again.",
            path,
        )
        return None
    rows = [json.loads(line) for line in lines[1:] if line]
    owners = [prompt for prompt in prompts for _ in range(count)]
    return [
        Rollout(owner, row["response"], row["token_ids"], [], row["finish_reason"], 0)
        for owner, row in zip(owners, rows, strict=True)
    ]


def write_kept(path: Path, key: str, rollouts: Sequence[Rollout]) -> None:
    """Write what `read_kept` reads."""
    lines = [json.dumps({"key": key}) + "\n"]
    for rollout in rollouts:
        row = {
            "prompt": rollout.prompt.id,
            "response": rollout.text,
            "token_ids": rollout.token_ids,
            "finish_reason": rollout.finish_reason,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(lines))
