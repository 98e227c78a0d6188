"""Scores of preference pairs by a saved reward model, for the preparation step `label_noise`:
Context.score_pairs of rlhf/data/prepare/items.py.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from conf.choices import Dtype
from reward.model import load_reward_model, score_ids
from rlhf.models.encoding import encode_answer, require_template
from rlhf.models.loading import resolve_dtype
from rlhf.process import distributed
from rlhf.types import UserError

Pair = tuple[Any, Any, Any, Any]  # prompt, chosen, rejected: texts or messages; tools


def score_pairs(
    directory: str, pairs: Sequence[Pair], *, batch_tokens: int
) -> list[tuple[float, float]]:
    """Scores of the chosen and the rejected side of each pair, read as stage=reward trains on them.

    Raises UserError: no reward model, rows of messages without a template, a pair that can't be
    encoded, or one longer than the model.
    """
    device = distributed.device()
    loaded = load_reward_model(directory, resolve_dtype(Dtype.auto))
    if any(isinstance(chosen, list) for _, chosen, _, _ in pairs):
        require_template(loaded.tokenizer, f"label_noise.reward_model={directory}")
    module: Any = loaded.module
    limit = int(getattr(module.config.get_text_config(), "max_position_embeddings", 2**31))
    rows = []
    for number, (prompt, chosen, rejected, tools) in enumerate(pairs):
        for side in (chosen, rejected):
            try:
                ids = encode_answer(loaded.tokenizer, prompt, side, tools)
            except ValueError as error:
                raise UserError(f"label_noise: pair {number}: {error}.") from error
            if not 0 < len(ids) <= limit:
                raise UserError(
                    f"label_noise.reward_model={directory}: a side of pair {number} has "
                    f"{len(ids)} tokens, expected 1 to {limit}. "
                    "Leave longer rows out with a length step before."
                )
            rows.append(ids)
    scores = score_ids(module.to(device), rows, batch_tokens, device)
    del module, loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return list(zip(scores[::2], scores[1::2], strict=True))


def pair_scorer(batch_tokens: int) -> Callable[[str, Sequence[Pair]], list[tuple[float, float]]]:
    """What a stage puts into Context.score_pairs."""
    return lambda directory, pairs: score_pairs(directory, pairs, batch_tokens=batch_tokens)
