"""Answers of one or several policies to the same prompts: written by the rollout engine, scored by
the reward, one policy after the other.

What a policy wrote is kept in ``answers/`` of the run directory as soon as it is there, so that an
export that was stopped does not write it again.
"""

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.choices import ModelKind
from conf.schema import Config, ModelConfig, RewardConfig
from reward.terms import make_scorer
from rlhf.data import reading
from rlhf.labels.asking import Question
from rlhf.labels.candidates import Response
from rlhf.models.encoding import prompt_ids, response_ids
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.process import distributed
from rlhf.process.hashing import digest
from rlhf.process.watchdog import Watchdog
from rlhf.run.context import ANSWERS_FOLDER, RunContext
from rlhf.types import Prompt, Rollout, Scores, UserError
from rollout import make_generator

LOG = logging.getLogger("rlhf.stages.label")


@dataclasses.dataclass(slots=True)
class Clock:
    """Seconds by phase."""

    watchdog: Watchdog
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.watchdog.phase(name)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def model_of(cfg: Config, path: str) -> ModelConfig:
    """The configuration that loads one of the policies; only model.path itself can be a
    GGUF file.
    """
    gguf_file = cfg.model.gguf_file if path == cfg.model.path else None
    return dataclasses.replace(cfg.model, kind=ModelKind.pretrained, path=path, gguf_file=gguf_file)


def read_prompts(cfg: Config, policies: Mapping[str, str]) -> dict[str, tuple[Any, list[Prompt]]]:
    """Tokenizer and tokenised prompts of each policy: the same prompts, each in the policy's own
    tokens and template.

    Raises UserError naming the policy that can't read them.
    """
    loaded = reading.distinct_prompts(cfg, cfg.label.prompts)
    if cfg.label.prompts is not None and len(loaded.records) < cfg.label.prompts:
        LOG.warning(
            "label.prompts=%d, but there are only %d different prompts; all of them are used.",
            cfg.label.prompts,
            len(loaded.records),
        )
    out = {}
    for name, path in policies.items():
        try:
            tokenizer = load_tokenizer(model_of(cfg, path), cfg.data.chat_template)
            out[name] = (tokenizer, reading.tokenised(tokenizer, loaded, cfg.data))
        except UserError as error:
            raise UserError(f"policy {name} ({path}): {error}") from error
    return out


def write_answers(
    ctx: RunContext, policies: Mapping[str, str], count: int, clock: Clock
) -> tuple[list[Response], int]:
    """`count` responses of each policy to each prompt, scored where there is a reward; and how many
    hit the length limit.
    """
    cfg = ctx.cfg
    read = read_prompts(cfg, policies)
    responses: list[Response] = []
    cut = 0
    for place, (name, path) in enumerate(policies.items(), start=1):
        tokenizer, prompts = read[name]
        with clock.phase("rollout"):
            rollouts = _kept_or_written(
                ctx, place, path, tokenizer, prompts, count, policy_seed(cfg.run.seed, name)
            )
        with clock.phase("score"):
            scored = score(cfg.reward, rollouts, tokenizer)
        cut += sum(rollout.finish_reason == "length" for rollout in rollouts)
        for i, rollout in enumerate(rollouts):
            one, spread = (
                (None, None)
                if scored is None
                else (scored[0][i], None if scored[1] is None else scored[1][i])
            )
            responses.append(Response(rollout.prompt.source, rollout.text, name, one, spread))
    return responses, cut


def policy_seed(seed: int, name: str) -> int:
    """Each policy draws with numbers of its own: with the same ones near-equal policies would give
    equal answers, and no pair to judge.
    """
    return int(digest([seed, name]), 16) >> 2


def _kept_or_written(
    ctx: RunContext,
    place: int,
    path: str,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    count: int,
    seed: int,
) -> list[Rollout]:
    cfg = ctx.cfg
    key = _key(cfg, path, prompts, count, seed)
    file = ctx.dir / ANSWERS_FOLDER / f"{place}.jsonl"
    kept = read_kept(file, key, prompts, count)
    if kept is not None:
        LOG.info("resume: the %d answers of %s are there already (%s).", len(kept), path, file)
        return kept
    rollouts = _generate(ctx, place, path, tokenizer, prompts, count, seed)
    file.parent.mkdir(exist_ok=True)
    beside = file.with_name(file.name + ".tmp")
    with beside.open("w", encoding="utf-8", newline="\n") as out:
        out.write(json.dumps({"key": key}) + "\n")
        for rollout in rollouts:
            row = {
                "prompt": rollout.prompt.id,
                "response": rollout.text,
                "token_ids": rollout.token_ids,
                "finish_reason": rollout.finish_reason,
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    beside.replace(file)
    return rollouts


def read_kept(file: Path, key: str, prompts: Sequence[Prompt], count: int) -> list[Rollout] | None:
    """What an earlier start wrote for the same policy, prompts and options (`key`); None where
    there is none, or another.
    """
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8").split("\n")
    if json.loads(lines[0]) != {"key": key}:
        LOG.warning(
            "%s holds answers of another policy, other prompts or options, so they are written "
            "anew.",
            file,
        )
        return None
    rows = [json.loads(line) for line in lines[1:] if line]
    owners = [prompt for prompt in prompts for _ in range(count)]
    return [
        Rollout(owner, row["response"], row["token_ids"], [], row["finish_reason"], 0)
        for owner, row in zip(owners, rows, strict=True)
    ]


def _key(cfg: Config, path: str, prompts: Sequence[Prompt], count: int, seed: int) -> str:
    """All that a policy's answers depend on."""
    place = Path(path).expanduser()
    files = (
        sorted(
            [f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in place.iterdir() if f.is_file()
        )
        if place.is_dir()
        else []
    )
    sampling = [
        cfg.rollout.max_response_length,
        cfg.rollout.temperature,
        cfg.rollout.top_p,
        cfg.rollout.top_k,
    ]
    return digest(
        [
            path,
            files,
            cfg.model.dtype.value,
            sampling,
            count,
            seed,
            [[prompt.id, list(prompt.token_ids)] for prompt in prompts],
        ]
    )


def _generate(
    ctx: RunContext,
    place: int,
    path: str,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    count: int,
    seed: int,
) -> list[Rollout]:
    """Start an engine on the policy, let it write, and free it. An adapter or a GGUF file is
    written out whole first, as engines want it.
    """
    model = model_of(ctx.cfg, path)
    folder = Path(path).expanduser()
    whole = model.gguf_file is None and (not folder.is_dir() or (folder / "config.json").exists())
    start = ctx.dir / f"start-{place}"
    if not whole:
        load_causal_lm(model, tokenizer).save_pretrained(start)
        tokenizer.save_pretrained(start)
    loaded = model if whole else dataclasses.replace(model, path=str(start), gguf_file=None)
    LOG.info("%s writes %d responses to each of %d prompts.", path, count, len(prompts))
    try:
        generator = make_generator(
            ctx.cfg,
            model_path=str(folder if folder.is_dir() else path) if whole else str(start),
            tokenizer=tokenizer,
            model_factory=lambda: load_causal_lm(loaded, tokenizer),
            adapter_rank=None,
        )
        try:
            return generator.generate(prompts, n=count, seed=seed)
        finally:
            generator.close()
    finally:
        shutil.rmtree(start, ignore_errors=True)


def has_reward(reward: RewardConfig) -> bool:
    return reward.path is not None or reward.function is not None or bool(reward.terms)


def score(
    reward: RewardConfig, rollouts: Sequence[Rollout], tokenizer: Any
) -> tuple[list[float], list[float] | None] | None:
    """Scores of the rollouts and, of an ensemble, their spread; None without a reward. The reward
    is loaded for this call and freed after it.
    """
    if not has_reward(reward):
        return None
    scorer = make_scorer(
        reward, device=distributed.device(), policy_tokenizer=tokenizer, training=False
    )
    scores = scorer.score(rollouts)
    return scores.total, spread_of(
        scores, {name: term.weight for name, term in reward.terms.items()}
    )


def spread_of(scores: Scores, weights: Mapping[str, float]) -> list[float] | None:
    """Standard deviation of each total, from those of the terms that are ensembles (taken as
    independent); None where none is.
    """
    parts = [
        [weights[name] * value for value in scores.extras[f"{name}_spread"]]
        for name in weights
        if f"{name}_spread" in scores.extras
    ]
    return [math.hypot(*row) for row in zip(*parts, strict=True)] if parts else None


def score_questions(cfg: Config, questions: Sequence[Question], path: str) -> list[Question]:
    """Questions whose answers no policy wrote, with the scores that the reward gives them as
    answers of the policy in `path`.

    Raises UserError as the reward does.
    """
    tokenizer = load_tokenizer(model_of(cfg, path), cfg.data.chat_template)
    rollouts = []
    for question in questions:
        ids = tuple(prompt_ids(tokenizer, question.prompt))
        text = question.prompt if isinstance(question.prompt, str) else tokenizer.decode(ids)
        prompt = Prompt(question.id, text, ids, source=question.prompt)
        rollouts += [
            Rollout(prompt, answer.text, response_ids(tokenizer, answer.text), [], "stop", 0)
            for answer in question.answers
        ]
    scored = score(cfg.reward, rollouts, tokenizer)
    assert scored is not None, "preflight refuses label.prelabel without a reward"
    spread: list[float | None] = [None] * len(rollouts) if scored[1] is None else list(scored[1])
    totals, spreads = iter(scored[0]), iter(spread)
    return [
        dataclasses.replace(
            question,
            answers=tuple(
                dataclasses.replace(answer, score=next(totals), spread=next(spreads))
                for answer in question.answers
            ),
        )
        for question in questions
    ]
