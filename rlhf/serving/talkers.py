"""What answers a conversation piece by piece: transformers in this process, or a vLLM server that
it started. Both read the tokens that training reads, and end where training ends.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import torch

from rlhf.models.joining import conversation_ids
from rlhf.models.turns import end_ids, response_text
from rlhf.serving.server import ApiServer
from rlhf.types import Message, Tools, UserError
from rollout.sampling import Sampling, sampling_logprobs

_UNFINISHED = "\ufffd"  # what a tokenizer shows of a character whose bytes are not all there


@dataclass(frozen=True, slots=True)
class Toolbox:
    """Functions that answers may call."""

    tools: Tools  # as templates show them
    act: Callable[[str], Sequence[Message]]  # what they say to a turn's calls; empty: none


class Talker(Protocol):
    """Answers conversations, one at a time."""

    name: str
    toolbox: Toolbox | None
    finished: bool  # whether the last answer ended by itself, not at the longest length

    def stream(self, messages: Sequence[Message], seed: int, *, greedy: bool) -> Iterator[str]:
        """Pieces of the answer. Raises UserError for a conversation that can't be answered."""
        ...

    def close(self) -> None: ...


def _asked(
    tokenizer: Any,
    messages: Sequence[Message],
    sampling: Sampling,
    longest: int,
    toolbox: Toolbox | None,
) -> list[int]:
    """The conversation's tokens. Raises UserError where an answer has no room behind them."""
    tools = None if toolbox is None else toolbox.tools
    ids = conversation_ids(tokenizer, messages, tools)
    room = longest - sampling.max_response_length
    if len(ids) > room:
        raise UserError(
            f"the conversation has {len(ids)} tokens, and {room} fit before an answer of "
            f"rollout.max_response_length={sampling.max_response_length}. /clear begins anew."
        )
    return ids


class HFTalker:
    """transformers, a token at a time."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        longest: int,
        toolbox: Toolbox | None = None,
    ) -> None:
        """longest: tokens of prompt and answer together."""
        self.name = name
        self.finished = True
        self._model, self._tokenizer = model.eval(), tokenizer
        self._sampling, self._longest, self.toolbox = sampling, longest, toolbox

    def stream(self, messages: Sequence[Message], seed: int, *, greedy: bool) -> Iterator[str]:
        ids = _asked(self._tokenizer, messages, self._sampling, self._longest, self.toolbox)
        written: list[int] = []
        shown = ""
        self.finished = False
        for token in self._tokens(ids, seed, greedy):
            written.append(token)
            text = response_text(self._tokenizer, written, chat=True)
            if text.startswith(shown) and not text.endswith(_UNFINISHED):
                yield text[len(shown) :]
                shown = text
        text = response_text(self._tokenizer, written, chat=True)
        if text.startswith(shown):
            yield text[len(shown) :]

    @torch.no_grad()
    def _next(self, given: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits [1, V] behind the tokens, and the cache that holds them too."""
        ids = torch.tensor([list(given)], device=self._model.device)
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].float(), out.past_key_values

    def _tokens(self, ids: Sequence[int], seed: int, greedy: bool) -> Iterator[int]:
        draws = torch.Generator().manual_seed(seed)
        ends = end_ids(self._tokenizer)
        cache, given = None, list(ids)
        for _ in range(self._sampling.max_response_length):
            logits, cache = self._next(given, cache)
            if greedy:
                token = int(logits.argmax())
            else:
                chances = sampling_logprobs(logits, self._sampling).exp().cpu()
                token = int(torch.multinomial(chances, 1, generator=draws))
            if token in ends:
                self.finished = True
                return
            yield token
            given = [token]

    def close(self) -> None:
        """Nothing outlives this object."""


class ServerTalker:
    """vLLM's server in a process that ends with this object."""

    def __init__(
        self,
        name: str,
        server: ApiServer,
        tokenizer: Any,
        sampling: Sampling,
        longest: int,
        toolbox: Toolbox | None = None,
    ) -> None:
        """name: of the model at the server, which is ready. Others as `HFTalker`."""
        self.name = name
        self.finished = True
        self._server, self._tokenizer = server, tokenizer
        self._sampling, self._longest, self.toolbox = sampling, longest, toolbox
        headers = {"authorization": f"Bearer {server.token}"}
        self._client = httpx.Client(headers=headers, trust_env=False, timeout=600.0)

    def stream(self, messages: Sequence[Message], seed: int, *, greedy: bool) -> Iterator[str]:
        ids = _asked(self._tokenizer, messages, self._sampling, self._longest, self.toolbox)
        sampling = self._sampling
        body = {
            "model": self.name,
            "prompt": ids,
            "max_tokens": sampling.max_response_length,
            "stop_token_ids": list(end_ids(self._tokenizer)),
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "stream": True,
            # as the model wrote it: <think> and its like are special tokens too
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        self.finished = False
        try:
            url = f"{self._server.url}/v1/completions"
            with self._client.stream("POST", url, json=body) as got:
                if not got.is_success:
                    got.read()
                    raise UserError(f"the server answered {got.status_code}: {got.text[:300]}")
                yield from self._pieces(got.iter_lines())
        except httpx.HTTPError as error:
            raise UserError(f"the server is gone ({error}); its log: {self._server.log}") from error

    def _pieces(self, lines: Iterator[str]) -> Iterator[str]:
        """The texts of server-sent events."""
        for line in lines:
            data = line.removeprefix("data: ")
            if data in (line, "[DONE]"):  # not an event, or the last one
                continue
            for choice in json.loads(data).get("choices", []):
                if choice.get("finish_reason") == "stop":
                    self.finished = True
                if choice["text"]:
                    yield choice["text"]

    def close(self) -> None:
        self._client.close()
        self._server.stop()
