"""Scores of texts by reward models, one model in memory at a time."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from conf.choices import Dtype
from reward.model import (
    Manifest,
    load_reward_model,
    load_reward_tokenizer,
    longest_text,
    score_ids,
    text_ids,
)
from rlhf.models.encoding import encode_answer
from rlhf.models.loading import resolve_dtype
from rlhf.process import distributed
from rlhf.stages.evaluation.reward_rows import Text
from rlhf.types import UserError


def encoded(tokenizer: Any, manifest: Manifest, text: Text, key: str) -> list[int]:
    """What the reward model of the option `key` reads of a text. Raises UserError naming the row
    for one that it can't read.
    """
    try:
        if isinstance(text.answer, list):
            return encode_answer(tokenizer, text.prompt, text.answer)
        return text_ids(tokenizer, manifest, text.prompt, text.answer, finished=True)
    except ValueError as error:
        raise UserError(f"{text.place}, read by {key}: {error}.") from error


def check_models(models: Mapping[str, str], texts: Sequence[Text]) -> None:
    """Each directory is a reward model's, and it can read these texts. Raises UserError."""
    for name, path in models.items():
        key = f"stage.models.{name}"
        tokenizer, manifest = load_reward_tokenizer(path, key)
        for text in texts:
            encoded(tokenizer, manifest, text, f"{key}={path}")


def score_texts(
    models: Mapping[str, str], texts: Sequence[Text], *, batch_tokens: int
) -> dict[str, list[float | None]]:
    """Scores by model, in the order of `texts`; None for a text that is longer than the model
    reads. Raises UserError as `check_models`.
    """
    return {
        name: _scores(path, f"stage.models.{name}={path}", texts, batch_tokens)
        for name, path in models.items()
    }


def _scores(path: str, key: str, texts: Sequence[Text], batch_tokens: int) -> list[float | None]:
    device = distributed.device()
    loaded = load_reward_model(path, resolve_dtype(Dtype.auto))
    module: Any = loaded.module
    limit = longest_text(module)
    rows: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        ids = encoded(loaded.tokenizer, loaded.manifest, text, key)
        if not ids:
            raise UserError(f"{text.place}, read by {key}: prompt and answer are empty.")
        if len(ids) <= limit:
            rows[number] = ids
    found = score_ids(module.to(device), list(rows.values()), batch_tokens, device)
    out: list[float | None] = [None] * len(texts)
    for number, score in zip(rows, found, strict=True):
        out[number] = score
    del module, loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return out
