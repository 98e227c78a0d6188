"""Two states of one policy: their tokenizer, their responses, and the KL between them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

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
from rlhf.online.sync import Calibration, Probe, Proof, gap_tolerance, sampled_probes
from rlhf.process import distributed
from rlhf.types import Generator, Prompt, Rollout, UserError
from rollout import make_generator

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


def generate_both(
    cfg: Config,
    tokenizer: Any,
    after: Any,
    prompts: Sequence[Prompt],
    start: Path,
    phase: Callable[[str], None],
) -> tuple[list[Rollout], list[Rollout]]:
    """Both policies' responses with the same seeds: one engine starts as ``stage.before`` and
    generates, takes over the weights of the model `after`, proves it, and generates again.

    An adapter is first written to `start` as a whole model, which engines need. Where one of them
    has an adapter that whole weights can't hold, transformers generates for each by itself. `phase`
    is told what is going on.
    """
    stage = cfg.stage
    path = stage.before

    def load_before() -> Any:
        return load_causal_lm(model_at(cfg.model, path), tokenizer, native=True)

    drawing = {"n": stage.samples_per_prompt, "seed": cfg.run.seed, "greedy": stage.greedy}
    if any(contents(place).is_native for place in (path, stage.after)):
        written = []
        for name, place, load in (
            ("before", path, load_before),
            ("after", stage.after, lambda: after),
        ):
            phase(f"generate {name}")
            generator = make_generator(
                cfg,
                model_path=contents(place).weights,
                tokenizer=tokenizer,
                model_factory=load,
                native=True,
            )
            written.append(_responses(generator, prompts, drawing))
        return written[0], written[1]
    engine_path = path
    if not starts_whole(model_at(cfg.model, path)):
        engine_path = write_whole(load_before(), tokenizer, start)
    generator = make_generator(
        cfg,
        model_path=engine_path,
        tokenizer=tokenizer,
        model_factory=load_before,
    )

    try:
        phase("generate before")
        old = generator.generate(prompts, **drawing)
        phase("sync")
        generator.sync(full_weights(after), 1)
        dtype = resolve_dtype(cfg.model.dtype)
        _prove(generator, after, prompts, old[0], cfg.rollout, dtype)
        phase("generate after")
        return old, generator.generate(prompts, **drawing)
    finally:
        generator.close()


def _responses(generator: Generator, prompts: Sequence[Prompt], drawing: Any) -> list[Rollout]:
    """What a generator of one policy writes; it is closed. drawing: arguments of its `generate`."""
    try:
        return generator.generate(prompts, **drawing)
    finally:
        generator.close()


def _prove(
    generator: Generator,
    after: Any,
    prompts: Sequence[Prompt],
    written: Rollout,
    rollout: RolloutConfig,
    dtype: torch.dtype,
) -> None:
    """The generator computes what the model `after` does. Raises SyncError."""
    tolerance = gap_tolerance(rollout.gap_tolerance, dtype)
    probes: tuple[Probe, ...] = (
        Probe((*prompts[0].token_ids, *written.token_ids[:_PROBE_TOKENS])),
    )
    if tolerance is None:
        probes = sampled_probes(generator, prompts, rollout.gap_tokens)

    def logprobs() -> list[float]:
        found = []
        for probe in probes:
            found += probe_logprobs(after, probe.token_ids)[probe.first - 1 :]
        return found

    proof = Proof(probes, tolerance, Calibration(rollout.gap_factor))
    proof.check(generator, after, logprobs, 1)


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


@torch.inference_mode()
def response_kl(
    after: Any,
    before: Any,
    rollouts: Sequence[Rollout],
    *,
    pad_id: int,
    temperature: float,
    logits_chunk: int,
    micro_tokens: int,
) -> list[float]:
    """KL(after || before) in nats of each response of `after`: log p_after - log p_before (k1),
    summed over its tokens, float32 at the head. Raises UserError for a `before` that can't be
    a policy; `check_policy` tells it of `after`.
    """
    device = distributed.device()
    modules = [
        PolicyModule(model.to(device).eval(), chunk=logits_chunk, temperature=temperature)
        for model in (after, before)
    ]
    check_agreement(modules[1], micro_tokens, "stage.before")
    prompts = [rollout.prompt.token_ids for rollout in rollouts]
    responses = [rollout.token_ids for rollout in rollouts]
    batch: Batch = collate(prompts, responses, pad_id, device)
    out = [0.0] * len(rollouts)
    for rows in plan_micro_batches(batch.lengths.tolist(), micro_tokens):
        part = batch.select(rows)
        inputs = (part.input_ids, part.positions, part.response_ids, part.response_mask)
        logprobs, ref_logprobs = (module(*inputs)[0] for module in modules)
        per_token = kl_per_token(logprobs, ref_logprobs, KLEstimator.k1) * part.response_mask
        for row, value in zip(rows, per_token.sum(dim=1).tolist(), strict=True):
            out[row] = value
    return out
