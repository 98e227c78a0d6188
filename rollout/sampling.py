"""What both backends share: how a token is drawn, how each response gets its own seed, and which
prompts fit. And what vLLM's engines share, here and in a server: options of the device, requests.
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema import RolloutConfig
from rlhf.models.templates import processor_of
from rlhf.process import distributed
from rlhf.types import Prompt, Rollout, UserError

# tokens per KV block on a CPU: only whole blocks of a prompt are shared, and vLLM's own 128 is
# longer than most prompts
_CPU_BLOCK = 32
_CPU_BATCH = 4096  # tokens of a pass, vLLM's own default


@dataclass(frozen=True, slots=True)
class Sampling:
    """The distribution that responses are drawn from: softmax(logits / temperature), then top-k,
    then top-p (Holtzman et al. 2020).
    """

    max_response_length: int  # tokens
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off

    @staticmethod
    def from_config(cfg: RolloutConfig) -> "Sampling":
        return Sampling(cfg.max_response_length, cfg.temperature, cfg.top_p, cfg.top_k)

    def limit_of(self, prompt: Prompt) -> int:
        """The most tokens of a response to the prompt."""
        if prompt.limit is None:
            return self.max_response_length
        return min(prompt.limit, self.max_response_length)

    def for_vllm(
        self, seed: int, ends: Iterable[int], prompt: Prompt, *, greedy: bool
    ) -> dict[str, Any]:
        """Fields of vLLM's SamplingParams for one response to `prompt`, the same in its engine here
        and in a server. `ends`: the tokens that end a response.
        """
        drawing: dict[str, Any] = {"temperature": 0.0}
        if not greedy:
            drawing = {
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "seed": seed,
            }
        return {
            "max_tokens": self.limit_of(prompt),
            "stop_token_ids": list(ends),
            "ignore_eos": True,  # these tokens and no others: vLLM would add some of its own
            "logprobs": 0,  # the sampled token's alone
            "detokenize": False,
            **drawing,
        }


def ignore(rollout: Rollout) -> None:
    """Nobody asked to hear of a response as it arrives."""


def fresh_seed() -> int:
    """A seed for a call that names none."""
    return secrets.randbits(62)


def response_seeds(seed: int, prompts: Sequence[Prompt], n: int) -> list[int]:
    """Seeds in [0, 2^62) of `n` responses per prompt, side by side.

    A seed depends on the call's seed, the prompt's id and how many responses to it came before,
    never on its position in the call: prompts shared out among ranks get the responses that one
    rank would have drawn.
    """
    drawn: Counter[str] = Counter()
    out = []
    for prompt in prompts:
        for _ in range(n):
            digest = hashlib.blake2b(
                f"{seed}/{prompt.id}/{drawn[prompt.id]}".encode(), digest_size=8
            ).digest()
            drawn[prompt.id] += 1
            out.append(int.from_bytes(digest, "big") >> 2)
    return out


def sampling_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] of the model -> logprobs [B, V] float32 of the distribution that `sampling`
    draws from; tokens filtered out get -inf.

    Ties at the k-th logit all stay. Top-p keeps the fewest most likely tokens whose probabilities
    add up to at least top_p.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - sampling.top_p
        outside[:, -1] = False  # the most likely token always stays
        logits = logits.masked_fill(
            torch.zeros_like(outside).scatter_(1, order, outside), -torch.inf
        )
    return logits.log_softmax(dim=-1)


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Logprobs [B, V] and one uniform number in [0, 1) per row [B] float64 -> token ids [B], by
    inverting the distribution function.
    """
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    # right: never a token of probability 0
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return chosen.squeeze(1).clamp_(max=logprobs.shape[-1] - 1)


def check_prompts(prompts: Sequence[Prompt], sampling: Sampling, *, max_tokens: int) -> None:
    """Every prompt has a token, and at most `max_tokens` with its longest response. Raises
    UserError naming the first that doesn't.
    """
    for prompt in prompts:
        tokens, room = len(prompt.token_ids), max_tokens - sampling.limit_of(prompt)
        if not 0 < tokens <= room:
            raise UserError(
                f"prompt {prompt.id}: it has {tokens} tokens, but a prompt has to have between 1 "
                f"and {room} here. "
                "Raise data.max_prompt_length, set data.truncate_prompts=true or drop the row."
            )


def check_shown(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Prompts with the tokens of pictures bring these along. Raises UserError."""
    processor = processor_of(tokenizer)
    if processor is None:
        return
    for prompt in prompts:
        if not prompt.images and any(t in processor.feature_ids for t in prompt.token_ids):
            raise UserError(
                f"prompt {prompt.id}: it shows pictures, which this use of its model does not hand "
                "on. Leave out rows with pictures."
            )


def picture_request(tokenizer: Any, prompt: Prompt) -> dict[str, Any]:
    """vLLM's request for a response to a prompt that shows pictures: its tokens with one for each
    picture, which the engine replaces by as many as it makes of it, and the pictures.
    """
    from rlhf.models.pictures import collapsed, opened

    processor = processor_of(tokenizer)
    images = [opened(picture) for picture in prompt.images]
    ids = collapsed(processor, prompt.token_ids, prompt.images)
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}


def check_read(prompt: Prompt, read: Sequence[int], family: str) -> None:
    """vLLM read the tokens that the trainer reads. Raises UserError."""
    if list(read) == list(prompt.token_ids):
        return
    raise UserError(
        f"rollout=vllm: of prompt {prompt.id}, which shows {len(prompt.images)} pictures, vLLM "
        f"reads {len(read)} tokens and the policy {len(prompt.token_ids)}, or others: its code for "
        f"{family} makes other tokens of the pictures. Set rollout=hf."
    )


def reading_options(*, pictures: bool) -> dict[str, Any]:
    """An engine's options for its prompts: token ids in, token ids out; the tokens of pictures are
    written by vLLM's own processor, which has the tokenizer in it.
    """
    if pictures:
        return {"limit_mm_per_prompt": {"video": 0}}
    return {"skip_tokenizer_init": True}


def device_options(cfg: RolloutConfig, dtype: torch.dtype, max_tokens: int) -> dict[str, Any]:
    """An engine's options that depend on the device of this rank."""
    if not torch.cuda.is_available():
        # Eager: compiling a model of 1M parameters takes 20 to 40 s at the start and saves 1.5 ms
        # of a 15 ms step (64 sequences, 2 cores).
        options: dict[str, Any] = {
            "kv_cache_memory_bytes": int(cfg.kv_cache_gib * 2**30),
            "enforce_eager": True,
            "block_size": _CPU_BLOCK,
            "enable_chunked_prefill": False,  # with seeds vLLM's sampler can't on a CPU
            "max_num_batched_tokens": max(_CPU_BATCH, max_tokens),
        }
        if dtype is torch.float32:
            # Of latent attention only: on processors with AMX vLLM would take a backend that has
            # bfloat16 alone.
            options["attention_backend"] = "CPU_MLA"
        return options
    options = {
        "gpu_memory_utilization": cfg.gpu_memory_utilization,
        "enforce_eager": cfg.enforce_eager,
    }
    if distributed.world_size() > 1:
        # each rank's engine on its own device; else all take the first
        options["distributed_executor_backend"] = "external_launcher"
    return options
