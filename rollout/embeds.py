"""Rollouts by vLLM with virtual tokens in front of every prompt (policy/adapters/prompts.py)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.types import AdapterWeights, FullWeights, SyncError
from rollout.vllm import VLLMGenerator
from rollout.weights import Incoming, Spec, weights_checksums

_NAME = "prompt_embeddings"  # PEFT's, of an adapter's one tensor


class EmbedsGenerator(VLLMGenerator):
    """An engine that reads some embeddings as they are in front of a prompt's tokens, which it
    embeds itself. Before the first sync there are none: then it is the model without the adapter.
    """

    def __init__(self, *args: Any, adapter: AdapterWeights, **options: Any) -> None:
        """`adapter`: one like those of later syncs; all else as in `VLLMGenerator`."""
        shape = tuple(adapter.tensors[_NAME].shape)
        super().__init__(*args, ahead=shape[0], **options)
        self._ahead = shape[0]
        self._virtual_spec = Spec(shape, self._dtype)
        # [ahead + max_tokens, width]: the virtual tokens, then what no position reads. A request
        # holds a part of this one tensor.
        self._virtual: Tensor | None = None

    def _request(self, token_ids: Sequence[int]) -> dict[str, Any]:
        if self._virtual is None:
            return super()._request(token_ids)
        tokens = len(token_ids)
        return {
            "prompt_embeds": self._virtual[: self._ahead + tokens],
            "prompt_token_ids": [0] * self._ahead + list(token_ids),
            "prompt_is_token_ids": [False] * self._ahead + [True] * tokens,
        }

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """Take over the trainer's virtual tokens and forget every prefix computed with the old
        ones. Raises SyncError for any other tensors.
        """
        if not isinstance(weights, AdapterWeights):
            raise SyncError(
                f"weight sync {version}: the trainer sent whole weights to an engine that was "
                "started for virtual tokens."
            )
        super().sync(weights, version)

    def _sync_adapter(self, weights: AdapterWeights, version: int) -> None:
        incoming = Incoming(weights.tensors.items(), {_NAME: self._virtual_spec}, {_NAME})
        held = {name: tensor.detach().cpu() for name, tensor in incoming}
        incoming.finish(version)
        rows, width = self._virtual_spec.shape
        # anew, not into the old one: a request that still runs may hold that
        self._virtual = torch.zeros(rows + self._max_tokens, width, dtype=self._dtype)
        self._virtual[:rows] = held[_NAME]
        self.sent = incoming.checksums

    def checksums(self) -> dict[str, str]:
        """The checksum of the virtual tokens that requests get."""
        if self._virtual is None:
            return {}
        return weights_checksums([(_NAME, self._virtual[: self._ahead])])
