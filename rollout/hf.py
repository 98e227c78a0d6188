"""Rollouts by transformers: the plain twin of rollout/vllm.py, for machines without vLLM and as its
reference in tests.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.models.encoding import is_chat
from rlhf.models.templates import processor_of
from rlhf.models.turns import end_ids, response_text
from rlhf.types import AdapterWeights, FullWeights, Prompt, Rollout, SyncError
from rollout.sampling import (
    Sampling,
    check_prompts,
    check_shown,
    draw,
    fresh_seed,
    response_seeds,
    sampling_logprobs,
)
from rollout.weights import Incoming, specs_of, weights_checksums

LOG = logging.getLogger(__name__)
_PADDING, _TOKENS = 5, 8  # of a row that shows whether padding is read

# Fields of an adapter's configuration beside which its tensors do not say what it computes.
_SCALING_FIELDS = (
    *("r", "lora_alpha", "use_rslora", "use_dora"),
    *("alpha", "experts", "placement", "blocks", "combine"),
)


class _Chooser:
    """A logits processor that draws each row's token with the row's own numbers, keeps its logprob
    and leaves generate no other choice.
    """

    def __init__(self, sampling: Sampling | None, uniform: Tensor) -> None:
        self.sampling = sampling  # None: greedy
        self.uniform = uniform  # [B, T] float64 in [0, 1)
        self.logprobs: list[Tensor] = []  # T x [B] nats

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [B, V] -> [B, V]: 0 at the chosen token, -inf elsewhere."""
        if self.sampling is None:
            logprobs = scores.float().log_softmax(dim=-1)
            chosen = logprobs.argmax(dim=-1)
        else:
            logprobs = sampling_logprobs(scores, self.sampling)
            chosen = draw(logprobs, self.uniform[:, len(self.logprobs)])
        self.logprobs.append(logprobs.gather(1, chosen[:, None]).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def _left_padded(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, P] long. Padding is on the left, so that every
    response starts in the same column.
    """
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.token_ids)
        ids[row, start:] = torch.tensor(prompt.token_ids)
        mask[row, start:] = 1
    return ids, mask


def _uniform(count: int, seed: int) -> Tensor:
    """[count] float64 in [0, 1), one response's own random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, dtype=torch.float64, generator=generator)


class HFGenerator:
    """Generates with a model instance of its own, so that training in between never shows before a
    sync.
    """

    def __init__(
        self,
        model_factory: Callable[[], Any],
        tokenizer: Any,
        sampling: Sampling,
        *,
        max_tokens: int,
        max_num_seqs: int,
        device: torch.device,
    ) -> None:
        """`max_tokens`: prompt and response together."""
        self.version = 0
        self.sent: dict[str, str] = {}
        self._model = model_factory().to(device).eval().requires_grad_(False)
        self.sampling = sampling
        self._tokenizer, self._device = tokenizer, device
        self._max_tokens, self._max_num_seqs = max_tokens, max_num_seqs
        self._base = self._model.get_base_model() if self._is_adapter() else self._model
        self._pads = True  # whether a batch holds prompts of several lengths
        for module in self._model.modules():
            if hasattr(module, "fold_encoders"):  # a sync brings what they make
                module.fold_encoders()
                self._pads = self._reads_padding()

    def _is_adapter(self) -> bool:
        return hasattr(self._model, "peft_config")

    @property
    def model(self) -> Any:
        return self._model

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        """`n` responses per prompt, side by side. `greedy`: the most likely token each time, with
        its logprob at temperature 1.
        """
        check_prompts(prompts, self.sampling, max_tokens=self._max_tokens)
        check_shown(prompts, self._tokenizer)
        seed = fresh_seed() if seed is None else seed
        repeated = [prompt for prompt in prompts for _ in range(n)]
        rows = list(zip(repeated, response_seeds(seed, prompts, n), strict=True))
        out: dict[int, Rollout] = {}
        for batch in self._batches(repeated):
            written = self._generate_batch([rows[number] for number in batch], greedy)
            out.update(zip(batch, written, strict=True))
        return [out[number] for number in range(len(rows))]

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """The numbers of the prompts that are continued together."""
        groups: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            length = 0 if self._pads else len(prompt.token_ids)
            groups.setdefault(length, []).append(number)
        for group in groups.values():
            for start in range(0, len(group), self._max_num_seqs):
                yield group[start : start + self._max_num_seqs]

    @torch.inference_mode()
    def _reads_padding(self) -> bool:
        """Whether a row that is padded in front is read as it is by itself. Behind virtual tokens
        the padding is not the first that the model reads: families with a state (Jamba, Qwen3-Next)
        take it in, and MPT counts it as distance.
        """
        width, count = _PADDING + _TOKENS, self._base.config.get_text_config().vocab_size
        ids = (torch.arange(width, device=self._device) * 7 + 3).remainder(count)[None]
        seen = torch.ones_like(ids)
        seen[:, :_PADDING] = 0
        options: dict[str, Tensor] = {}
        if "position_ids" in inspect.signature(type(self._base).forward).parameters:
            options["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
        padded = self._model(input_ids=ids, attention_mask=seen, use_cache=False, **options).logits
        alone = self._model(input_ids=ids[:, _PADDING:], use_cache=False).logits[0, -1].float()
        gap = float((padded[0, -1].float() - alone).abs().max() / alone.abs().max())
        bound = 1e-3
        if padded.dtype in (torch.bfloat16, torch.float16):
            bound = 0.05
        if gap > bound:
            LOG.warning(
                "rollout=hf: behind virtual tokens %s reads rows padded in front otherwise "
                "(by %.1e of its logits), so prompts of one length are continued at a time.",
                self._base.config.model_type,
                gap,
            )
        return gap <= bound

    @torch.inference_mode()
    def _generate_batch(self, rows: Sequence[tuple[Prompt, int]], greedy: bool) -> list[Rollout]:
        from transformers import GenerationConfig, LogitsProcessorList

        most, pad = self.sampling.max_response_length, self._tokenizer.pad_token_id
        ids, mask = _left_padded([prompt for prompt, _ in rows], pad)
        uniform = torch.stack([_uniform(most, response_seed) for _, response_seed in rows])
        chooser = _Chooser(None if greedy else self.sampling, uniform.to(self._device))
        settings = GenerationConfig(
            max_new_tokens=max(self.sampling.limit_of(prompt) for prompt, _ in rows),
            do_sample=False,
            eos_token_id=list(end_ids(self._tokenizer)),
            pad_token_id=pad,
        )
        # generate fills unset fields from the model's own settings (repetition penalties and the
        # like): those change the policy
        self._base.generation_config = settings
        written = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([chooser]),
            **self._pictures(rows, ids),
        )
        responses = written[:, ids.shape[1] :].tolist()
        logprobs = torch.stack(chooser.logprobs, dim=1).tolist()  # [B, T]
        return [
            self._rollout(prompt, responses[i], logprobs[i]) for i, (prompt, _) in enumerate(rows)
        ]

    def _pictures(self, rows: Sequence[tuple[Prompt, int]], ids: Tensor) -> dict[str, Tensor]:
        """The model's arguments for the pictures of rows with these token ids [B, P]; none for a
        model of text.
        """
        processor = processor_of(self._tokenizer)
        if processor is None:
            return {}
        from rlhf.models.pictures import picture_inputs

        inputs = picture_inputs(processor, [prompt.images for prompt, _ in rows], ids)
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def _rollout(self, prompt: Prompt, token_ids: list[int], logprobs: list[float]) -> Rollout:
        """One row of the batch, cut at its prompt's limit and after the token that ends it; what
        generate wrote behind it is padding, or more than was asked.
        """
        ends = end_ids(self._tokenizer)
        reason, kept = "length", token_ids[: self.sampling.limit_of(prompt)]
        for position, token in enumerate(kept):
            if token in ends:
                reason, kept = "stop", token_ids[: position + 1]
                break
        length = len(kept)
        text = response_text(self._tokenizer, kept, chat=is_chat(prompt.source))
        return Rollout(prompt, text, kept, logprobs[:length], reason, self.version)

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) in nats for i >= 1, at temperature 1: length
        len(token_ids) - 1.
        """
        ids = torch.tensor([list(token_ids)], device=self._device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # [L - 1, V]
        return logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """Copy the trainer's weights in, by name. Raises SyncError naming every parameter that is
        missing, unknown or of another shape.
        """
        if isinstance(weights, AdapterWeights):
            self._check_adapter(weights, version)
            tensors: Iterator[tuple[str, Tensor]] = iter(weights.tensors.items())
        elif self._is_adapter():
            raise SyncError(
                f"weight sync {version}: the trainer sent whole weights, but this generator's "
                "model is a base model with an adapter."
            )
        else:
            tensors = iter(weights.tensors)
        kept = weights.kept if isinstance(weights, FullWeights) else frozenset()
        targets = {name: t for name, t in self._tensors().items() if name not in kept}
        incoming = Incoming(tensors, specs_of(targets))
        with torch.no_grad():
            for name, tensor in incoming:
                targets[name].copy_(tensor)
        incoming.finish(version)
        self.sent, self.version = incoming.checksums, version

    def _tensors(self) -> Mapping[str, Tensor]:
        """What a sync writes to: the adapter under PEFT's saved names, or the whole state dict with
        tied tensors under each name.
        """
        if not self._is_adapter():
            return self._model.state_dict()
        from peft import get_peft_model_state_dict

        name = self._model.active_adapter
        return get_peft_model_state_dict(
            self._model, adapter_name=name, save_embedding_layers=False
        )

    def _check_adapter(self, weights: AdapterWeights, version: int) -> None:
        if not self._is_adapter():
            raise SyncError(
                f"weight sync {version}: the trainer sent an adapter, but this generator's model "
                "has none."
            )
        ours = self._model.peft_config[self._model.active_adapter].to_dict()
        for name in _SCALING_FIELDS:
            if weights.config.get(name) != ours.get(name):
                raise SyncError(
                    f"weight sync {version}: the trainer's adapter has "
                    f"{name}={weights.config.get(name)}, the generator's {ours.get(name)}."
                )

    def checksums(self) -> dict[str, str]:
        """Checksums of the weights that the generator holds now, by the names in `sent`."""
        return weights_checksums(self._tensors().items())

    def close(self) -> None:
        """Drop the model."""
        self._model = self._base = None
