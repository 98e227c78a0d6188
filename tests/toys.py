"""Reward functions and tiny inputs of the tests; reward.function=tests.toys:... reaches them by
name.
"""

import json
from pathlib import Path
from typing import Any

# Longest prompt and response of the tests' models, in tokens. The options' defaults are meant for
# models that read thousands of tokens; a tiny one reads 512.
PROMPT_LENGTH = 256
RESPONSE_LENGTH = 64
LENGTHS = (
    f"data.max_prompt_length={PROMPT_LENGTH}",
    f"rollout.max_response_length={RESPONSE_LENGTH}",
)


def even_first_token(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Two arms: 1 for a response whose first token id is even, 0 for an odd one."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def short_is_good(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def mostly_even(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """The honest judge of it: best where three quarters of a response's token ids are even, worse
    with every further one.
    """
    return [-abs(sum(token % 2 == 0 for token in ids) / len(ids) - 0.75) for ids in completion_ids]


def not_a_number_for_b(prompts: list[str], **columns: object) -> list[float]:
    return [float("nan") if prompt.startswith("b") else 0.0 for prompt in prompts]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt_rows() -> list[dict[str, object]]:
    return [
        {"prompt": f"{word} {number}"}
        for number in range(4)
        for word in ("alpha", "beta", "gamma", "delta")
    ]


def even_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Share of even token ids in a response: a random policy starts near one half."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def constant(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [1.0] * len(completion_ids)


def reward_manifest(tokenizer: Any, max_length: int = 64) -> Any:
    """The manifest of a reward model with this tokenizer, its weights never looked at."""
    from reward.model import FORMAT_VERSION, Manifest, template_hash, tokenizer_fingerprint

    return Manifest(
        base="tiny",
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        chat_template_hash=template_hash(tokenizer),
        conversational=tokenizer.chat_template is not None,
        max_length=max_length,
        dtype="float32",
        score_mean=0.0,
        score_std=1.0,
        held_out_texts=2,
        format_version=FORMAT_VERSION,
    )
