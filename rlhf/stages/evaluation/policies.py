"""Two states of one policy: their tokenizer, their responses, and the KL between them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.choices import KLEstimator
from conf.schema import Config, ModelConfig, RolloutConfig
from policy.agreement import check_agreement
from policy.batching import Batch, collate, plan_micro_batches
from policy.kl import kl_per_token
from policy.model import PolicyModule
from policy.saving import full_weights
from rlhf.models.directories import contents
from rlhf.models.loading import (
    load_causal_lm,
    load_tokenizer,
    resolve_dtype,
    starts_whole,
    write_whole,
)
from rlhf.models.templates import processor_of
from rlhf.online.collect import in_words, tokens_of
from rlhf.online.sync import Calibration, Probe, Proof, gap_tolerance, sampled_probes
from rlhf.process import distributed
from rlhf.types import Generator, Prompt, Rollout, UserError
from rollout import acting_in, make_generator

_PROBE_TOKENS = 16


def model_at(model: ModelConfig, path: str) -> ModelConfig:
    """The options of the model with another directory."""
    return dataclasses.replace(model, path=path, gguf_file=None)


def same_tokenizer(model: ModelConfig, chat_template: str | None, before: str, after: str) -> Any:
    """The tokenizer of both policies. Raises UserError when theirs differ: KL between them would
    mean nothing.
    """
    old = load_tokenizer(model_at(model, before), chat_template)
    new = load_tokenizer(model_at(model, after), chat_template)
    for what, ours, theirs in (
        ("vocabularies", old.get_vocab(), new.get_vocab()),
        ("end-of-sequence tokens", old.eos_token, new.eos_token),
        ("chat templates", old.chat_template, new.chat_template),
    ):
        if ours != theirs:
            raise UserError(
                f"stage.before={before} and stage.after={after} have different {what}: expected "
                "two states of one policy, "
                "so that the same prompt and the same tokens mean the same to both."
            )
    return old


@dataclass(frozen=True, slots=True)
class Asked:
    """Two states of a policy, and how they are to answer."""

    model: ModelConfig
    rollout: RolloutConfig
    before: str  # directories or hub's names
    after: str
    tokenizer: Any
    drawing: dict[str, Any]  # arguments of `Generator.generate`, the same for both
    # `rollout.make_generator` for this tokenizer
    make_generator: Callable[..., Generator]
    # what writes with a generator: the same, or episodes around it
    writing: Callable[[Generator], Generator]

    def prove(
        self, generator: Generator, model: Any, written: Sequence[Rollout], version: int
    ) -> None:
        """The generator, which holds this version, computes what the `model` does. `written`:
        responses of either state, whose tokens are compared. Raises SyncError.
        """
        tolerance = gap_tolerance(self.rollout.gap_tolerance, resolve_dtype(self.model.dtype))
        first = written[0]
        (prompt,) = in_words([first.prompt], self.tokenizer)
        ids = (*prompt.token_ids, *first.token_ids[:_PROBE_TOKENS])
        probes: tuple[Probe, ...] = (Probe(ids),)
        if tolerance is None:
            prompts = list({one.prompt.id: one.prompt for one in written}.values())
            asked = in_words(prompts, self.tokenizer)
            probes = sampled_probes(generator, asked, self.rollout.gap_tokens)

        def logprobs() -> list[float]:
            found = []
            for probe in probes:
                found += probe_logprobs(model, probe.token_ids)[probe.first - 1 :]
            return found

        proof = Proof(probes, tolerance, Calibration(self.rollout.gap_factor))
        proof.check(generator, model, logprobs, version)


def asked(cfg: Config, tokenizer: Any, before: str, after: str) -> Asked:
    """What ``stage=eval`` is asked of two paths."""
    stage: Any = cfg.stage
    acting = acting_in(cfg.environment, tokenizer)
    return Asked(
        cfg.model,
        cfg.rollout,
        before,
        after,
        tokenizer,
        {"n": stage.samples_per_prompt, "seed": cfg.run.seed, "greedy": stage.greedy},
        functools.partial(make_generator, cfg, tokenizer=tokenizer),
        functools.partial(acting.around, data=cfg.data, rollout=cfg.rollout),
    )


class Apart:
    """Two models, each of its directory: `before` and `after` load them; that of `after` is
    kept.
    """

    def __init__(self, asked: Asked, start: Path) -> None:
        """`start`: where an adapter of ``stage.before`` is written as a whole model, which engines
        need.
        """
        self._asked, self._start = asked, start

    def before(self) -> Any:
        return self._load(self._asked.before)

    def after(self) -> Any:
        return self._after

    @cached_property
    def _after(self) -> Any:
        return self._load(self._asked.after)

    def _load(self, path: str) -> Any:
        options = model_at(self._asked.model, path)
        return load_causal_lm(options, self._asked.tokenizer, native=True)

    def generate(
        self, prompts: Sequence[Prompt], phase: Callable[[str], None]
    ) -> tuple[list[Rollout], list[Rollout]]:
        """Both policies' responses with the same seeds: one engine starts as ``stage.before`` and
        generates, takes over the weights of ``stage.after``, proves it, and generates again.

        Where one of them has an adapter that whole weights can't hold, transformers generates for
        each by itself. `phase` is told what is going on.
        """
        asked = self._asked
        if any(contents(place).is_native for place in (asked.before, asked.after)):
            phase("generate before")
            old = self._responses(asked.before, self.before, prompts)
            phase("generate after")
            return old, self._responses(asked.after, self.after, prompts)
        generator = asked.make_generator(model_path=self._engine_path(), model_factory=self.before)
        try:
            phase("generate before")
            writing = asked.writing(generator)
            old = writing.generate(prompts, **asked.drawing)
            phase("sync")
            model = self.after()
            generator.sync(full_weights(model), 1)
            asked.prove(generator, model, old, 1)
            phase("generate after")
            return old, writing.generate(prompts, **asked.drawing)
        finally:
            generator.close()

    def _engine_path(self) -> str:
        """What an engine starts from as ``stage.before``."""
        path = self._asked.before
        if starts_whole(model_at(self._asked.model, path)):
            return path
        return write_whole(self.before(), self._asked.tokenizer, self._start)

    def _responses(
        self, path: str, load: Callable[[], Any], prompts: Sequence[Prompt]
    ) -> list[Rollout]:
        """What the model of `path` writes by transformers."""
        generator = self._asked.make_generator(
            model_path=contents(path).weights, model_factory=load, native=True
        )
        try:
            return self._asked.writing(generator).generate(prompts, **self._asked.drawing)
        finally:
            generator.close()


@torch.inference_mode()
def probe_logprobs(model: Any, token_ids: Sequence[int]) -> list[float]:
    """log p(token_ids[i] | token_ids[:i]) in nats for i >= 1, by transformers."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    return log_p.gather(1, ids[0, 1:, None]).squeeze(1).tolist()


def check_policy(model: Any, micro_tokens: int, key: str) -> None:
    """The log-probabilities of the KL are those of the model's own forward. `model`, of the option
    `key`, is on the CPU before and after. Raises UserError.
    """
    module = PolicyModule(model.to(distributed.device()).eval(), chunk=_PROBE_TOKENS)
    check_agreement(module, micro_tokens, key)
    model.to("cpu")


def response_kl(
    after: Callable[[], Any],
    before: Callable[[], Any],
    rollouts: Sequence[Rollout],
    *,
    tokenizer: Any,
    temperature: float,
    logits_chunk: int,
    micro_tokens: int,
) -> list[float]:
    """KL(after || before) in nats of each response of `after`: log p_after - log p_before (k1),
    summed over its tokens, float32 at the head. Raises UserError for a `before` that can't be
    a policy; `check_policy` tells it of `after`.

    `after` and `before` give the models, one after the other: it may be one model in two states.
    """
    device = distributed.device()
    new = PolicyModule(after().to(device).eval(), chunk=logits_chunk, temperature=temperature)
    processor = processor_of(tokenizer)
    batch, _ = tokens_of(rollouts, tokenizer.pad_token_id, processor)
    of_after = batch_logprobs(new, batch, micro_tokens)
    old = PolicyModule(before().to(device).eval(), chunk=logits_chunk, temperature=temperature)
    check_agreement(old, micro_tokens, "stage.before")
    of_before = batch_logprobs(old, batch, micro_tokens)
    out = []
    for ours, theirs in zip(of_after, of_before, strict=True):
        nats = kl_per_token(ours[None], theirs[None], KLEstimator.k1)
        out.append(float(nats.sum()))
    return out


def sequence_logprobs(
    module: PolicyModule,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    counted: Sequence[Sequence[bool]] | None = None,
    *,
    pad_id: int,
    micro_tokens: int,
) -> list[Tensor]:
    """The logprobs in nats of each response's tokens behind its prompt, those that are `counted`
    (None: all).
    """
    batch = collate(prompts, responses, pad_id, distributed.device(), counted)
    return batch_logprobs(module, batch, micro_tokens)


@torch.inference_mode()
def batch_logprobs(module: PolicyModule, batch: Batch, micro_tokens: int) -> list[Tensor]:
    """The logprobs in nats of each row's response tokens under the mask."""
    out: dict[int, Tensor] = {}
    for rows in plan_micro_batches(batch.lengths.tolist(), micro_tokens):
        part = batch.select(rows)
        inputs = (part.input_ids, part.positions, part.response_ids, part.response_mask)
        logprobs = module(*inputs, **part.seen())[0]
        for row, values, mask in zip(rows, logprobs, part.response_mask, strict=True):
            out[row] = values[mask]
    return [out[row] for row in range(len(batch.lengths))]
