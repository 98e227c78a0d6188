"""The reward model behind the service: which requests it accepts, and how it scores them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conf.choices import Dtype
from reward.model import load_reward_model, longest_text, score_ids, text_ids
from rlhf.models.encoding import is_chat
from rlhf.models.loading import resolve_dtype
from rlhf.types import UserError


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str


class Item(BaseModel):
    """A response to score. `token_ids` holds prompt and response as they were sampled; only clients
    with the tokenizer and template of /info may send it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | list[Message]
    response: str
    finished: bool = True
    fields: dict[str, Any] = Field(default_factory=dict)  # for verifiers; a reward model reads none
    token_ids: list[int] | None = None
    # functions that the template shows beside messages
    tools: list[dict[str, Any]] | None = None


class ScoreRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    items: list[Item]
    tokenizer_hash: str | None = None  # of the tokenizer that the items' token_ids come from


class Refused(Exception):
    """A request that is answered with an error: HTTP status, message, and index of the item."""

    def __init__(self, status: int, message: str, item: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.item = status, message, item


def parse(body: bytes, max_batch: int, tokenizer_hash: str) -> list[Item]:
    """The items of a request to a reward model with the tokenizer `tokenizer_hash`. Raises Refused,
    which names the key that is wrong.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error
    items = request.items
    if len(items) > max_batch:
        raise Refused(
            422, f"items: found {len(items)}, expected at most {max_batch} (max_batch of /info)"
        )
    tokenised = next((i for i, item in enumerate(items) if item.token_ids is not None), None)
    if tokenised is not None and request.tokenizer_hash != tokenizer_hash:
        raise Refused(
            422,
            f"items[{tokenised}].token_ids: of the tokenizer {request.tokenizer_hash}, expected "
            f"tokenizer_hash {tokenizer_hash} (of /info)",
            tokenised,
        )
    return items


def _refusal(error: ValidationError) -> Refused:
    """The error of the client for a body that is no request."""
    errors = error.errors(include_url=False, include_context=False)
    # Where a value fits none of two types there is an error for each: the deepest one belongs to
    # the type that the client most likely meant.
    deepest = max(errors, key=lambda e: len(e["loc"]))
    if deepest["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON: {deepest['msg']}")
    keys = [key for key in deepest["loc"] if key not in ("str", "list[Message]")]
    index = keys[1] if len(keys) > 1 and isinstance(keys[1], int) else None
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return Refused(422, f"{name.lstrip('.') or 'the body'}: {deepest['msg']}", index)


class ServedModel:
    """The reward model of a directory: reads items as token ids, and scores them."""

    def __init__(self, path: str, device: torch.device, *, batch_tokens: int) -> None:
        loaded = load_reward_model(path, resolve_dtype(Dtype.auto))
        self.path, self.device, self.budget = path, device, batch_tokens
        self.tokenizer, self.manifest = loaded.tokenizer, loaded.manifest
        module: Any = loaded.module
        self.module = module.to(device)
        self.limit = longest_text(self.module)
        self.vocabulary = int(self.module.config.get_text_config().vocab_size)

    def token_ids(self, items: Sequence[Item]) -> list[list[int]]:
        """The tokens that the model reads of each item. Raises Refused naming an item that it can't
        read.
        """
        rows = []
        for i, item in enumerate(items):
            if item.token_ids is None:
                row = self._tokenised(i, item)
            else:
                row = self._checked(i, item.token_ids)
            if not 0 < len(row) <= self.limit:
                raise Refused(
                    422,
                    f"items[{i}]: prompt and response have {len(row)} tokens, expected 1 to "
                    f"{self.limit}",
                    i,
                )
            rows.append(row)
        return rows

    def _checked(self, i: int, ids: list[int]) -> list[int]:
        wrong = next((t for t in ids if not 0 <= t < self.vocabulary), None)
        if wrong is not None:
            raise Refused(
                422,
                f"items[{i}].token_ids: found {wrong}, expected ids in [0, {self.vocabulary})",
                i,
            )
        return ids

    def _tokenised(self, i: int, item: Item) -> list[int]:
        prompt: Any = item.prompt
        if not isinstance(item.prompt, str):
            prompt = [message.model_dump() for message in item.prompt]
        if is_chat(prompt) and not self.manifest.conversational:
            raise Refused(
                422,
                f"items[{i}].prompt: found messages, but this reward model reads plain text: "
                "send the rendered prompt as a string",
                i,
            )
        try:
            return text_ids(
                self.tokenizer,
                self.manifest,
                prompt,
                item.response,
                finished=item.finished,
                tools=item.tools,
            )
        except UserError as error:
            raise Refused(422, f"items[{i}].prompt: {error}", i) from error

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        return score_ids(self.module, rows, self.budget, self.device)

    def info(self) -> dict[str, Any]:
        """The answer of /info: the manifest, and how many tokens an item may have."""
        return {"model": self.path, **dataclasses.asdict(self.manifest), "max_tokens": self.limit}
