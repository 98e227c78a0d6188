"""Step perplexity: what a causal language model thinks of each text."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from conf.preparation.cleaning import Perplexity
from conf.schema import ModelConfig
from rlhf.data.prepare.items import Context, Item, require_free
from rlhf.data.prepare.quality import extremes, filter_scored
from rlhf.data.prepare.texts import imitated


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices by length, in groups whose padded size is at most `most` tokens (one text alone may
    be longer).
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and lengths[index] * (len(group) + 1) > most:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def mean_nll(model: Any, ids: Sequence[Sequence[int]], pad_id: int) -> list[float]:
    """[B] nats per predicted token of each text (its first token is given), float32 at the head.
    Every text has at least two tokens.
    """
    import torch

    with torch.inference_mode():
        width = max(map(len, ids))
        # [B, T]
        tokens = torch.tensor(
            [[*text, *[pad_id] * (width - len(text))] for text in ids], device=model.device
        )
        # [B, T], from lengths
        mask = torch.tensor(
            [[1] * len(text) + [0] * (width - len(text)) for text in ids], device=model.device
        )
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()  # [B, T-1, V]
        # [B, T-1] nats
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        counted = mask[:, 1:]
        return ((nll * counted).sum(dim=1) / counted.sum(dim=1)).tolist()


def perplexities(
    texts: Sequence[str], model: Any, tokenizer: Any, *, max_tokens: int, batch_tokens: int
) -> list[float | None]:
    """[N] perplexity of each text's first `max_tokens` tokens; None for one of fewer than two
    tokens, of which nothing is predicted.
    """
    ids = [
        list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]) if text else []
        for text in texts
    ]
    known = [i for i, tokens in enumerate(ids) if len(tokens) >= 2]
    out: list[float | None] = [None] * len(texts)
    for group in batches([len(ids[i]) for i in known], batch_tokens):
        rows = [known[i] for i in group]
        for row, nll in zip(
            rows, mean_nll(model, [ids[i] for i in rows], tokenizer.pad_token_id), strict=True
        ):
            out[row] = math.exp(nll) if nll < 700 else math.inf
    return out


def perplexity(options: Perplexity, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Leave out rows by the perplexity of what they are to teach; rows with nothing to imitate, or
    of one token, pass and are counted.
    """
    from rlhf.models.directories import check_model_path
    from rlhf.models.loading import load_causal_lm, load_tokenizer
    from rlhf.process import distributed

    check_model_path(options.model, "step perplexity: model")
    rows = list(items)
    if options.column is not None:
        require_free(rows, options.column, "perplexity", "; or name another by column")
    config = ModelConfig(path=options.model)
    tokenizer = load_tokenizer(config)
    model = load_causal_lm(config, tokenizer).to(distributed.device()).eval()
    texts = ["\n".join(imitated(row.columns, options.part, context.kind).values()) for row in rows]
    limit = min(
        options.max_tokens,
        getattr(model.config, "max_position_embeddings", None) or options.max_tokens,
    )
    values = perplexities(
        texts, model, tokenizer, max_tokens=limit, batch_tokens=options.batch_tokens
    )
    judged = [i for i, value in enumerate(values) if value is not None]
    scores = [float(value) for value in values if value is not None]
    context.figures["too_short_kept"] = len(rows) - len(judged)
    reasons = extremes(
        "perplexity", scores, low=options.low, high=options.high, high_share=options.high_share
    )
    yield from filter_scored(rows, judged, scores, reasons, options.column, context)
