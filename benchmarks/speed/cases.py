"""What both programs are given: model, prompts, group size, sampling, lengths, and a reward that
costs nothing.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# In one process, which writes and then trains; the same with servers; with servers, where they
# write the next step's responses meanwhile; the same in one process; and TRL.
WAYS = ("turns", "server", "ahead", "here", "trl")


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: GRPO, one optimizer step per rollout, AdamW in float32, no KL penalty (TRL's
    default), the same clip range.
    """

    name: str
    model: str  # directory of the starting policy
    prompts: list[Any]  # strings, or lists of messages; each step uses all of them
    samples: int  # per prompt
    max_response: int  # tokens
    max_prompt: int  # tokens
    lora: bool
    rank: int = 8
    learning_rate: float = 1e-6  # small: the policy, and so the work, stays what it is
    micro_batch: int = 16  # TRL: sequences per forward pass
    micro_tokens: int = 2048  # ours: tokens per forward pass
    kv_cache_gib: float = 0.25
    way: str = "turns"  # of WAYS, but "trl"
    server_cores: tuple[str, ...] = ()  # a list of cores for each server; none: no servers
    # of the trainer once its servers run, which may use cores of its own alone; None: all
    trainer_core: int | None = None

    def dump(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "Case":
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        return Case(**held | {"server_cores": tuple(held["server_cores"])})


def distinct_words(completions: list[Any], **columns: Any) -> list[float]:
    """The reward of both: share of distinct words. It differs within a group and takes no time."""
    texts = [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]
    return [len(set(words)) / max(len(words), 1) for words in (text.split() for text in texts)]
