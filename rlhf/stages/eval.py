"""``stage=eval``: two policies on the same held-out prompts, before and after training: scores,
outside judges, KL, length, diversity.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch

from conf.choices import Judge, KLEstimator, ModelKind
from conf.schema import Config, ModelConfig, RewardConfig
from conf.stages import EvalStage
from eval import report
from eval.compare import Answers, compare, side_by_side
from eval.judges import ClassifierJudge, FunctionJudge, LexiconJudge, ResponseJudge
from policy.batching import Batch, collate, plan_micro_batches
from policy.kl import kl_per_token
from policy.model import PolicyModule, full_weights
from reward.base import is_set, model_paths
from reward.checks import check_reward, check_reward_model
from reward.terms import check_rows, make_scorer
from rlhf.checks import inputs, launch, rollout
from rlhf.data import reading
from rlhf.data.files import check_file, read_rows
from rlhf.data.sources import data_files, given
from rlhf.models.loading import (
    check_model_path,
    load_causal_lm,
    load_tokenizer,
    loads_as_it_is,
    resolve_dtype,
)
from rlhf.online.sync import gap_tolerance, verify_sync
from rlhf.process import distributed
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.types import Generator, Prompt, Rollout, Scorer, UserError
from rollout import make_generator

LOG = logging.getLogger("rlhf.stages.eval")
_PROBE_TOKENS = 16


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load; returns notes worth a warning. Raises
    UserError.
    """
    stage, data = cfg.stage, cfg.data
    assert isinstance(stage, EvalStage)
    notes = rollout.check_backend(cfg.rollout.backend)
    check_policies(stage, cfg.model)
    rollout.check_cache(cfg.rollout, cfg.model, data.max_prompt_length)
    inputs.check_template(data)
    if given(data) is None and data.eval_path is None:
        raise UserError(
            "data.path and data.eval_path are not set: stage=eval needs a file of prompts."
        )
    reading.check_first_rows(reading.DataRequest.of(cfg))
    inputs.refuse_pipeline(data, stage.name)
    check_judges(stage)
    if is_set(cfg.reward):
        check_reward(cfg.reward)
        tokenizer = inputs.policy_tokenizer(cfg.model, data.chat_template)
        for key, path in model_paths(cfg.reward):
            notes += check_reward_model(key, path, tokenizer)
        if cfg.reward.terms:
            check_rows(cfg.reward, reading.first_fields(reading.DataRequest.of(cfg)))
    return notes


def check_policies(stage: EvalStage, model: ModelConfig) -> None:
    """The two policies' directories are models. Raises UserError."""
    for key, path in (("stage.before", stage.before), ("stage.after", stage.after)):
        if path is not None:
            check_model_path(path, key)
    if model.path is not None or model.kind is ModelKind.tiny:
        inputs.check_model(model)


def check_judges(stage: EvalStage) -> None:
    """Every judge has what it judges by. Raises UserError."""
    if Judge.classifier in stage.judges:
        if stage.judge_path is None:
            raise UserError(
                "stage.judges holds classifier, but stage.judge_path is not set: expected a file "
                "of labelled texts (text, label)."
            )
        check_file(stage.judge_path, "stage.judge_path")
    if Judge.function in stage.judges and stage.judge_function is None:
        raise UserError(
            "stage.judges holds function, but stage.judge_function is not set: expected "
            "pkg.module:function."
        )
    if Judge.lexicon in stage.judges and not launch.installed("vaderSentiment"):
        raise UserError(
            "stage.judges holds lexicon, which needs the package vaderSentiment: `pip install "
            "vaderSentiment`, or leave lexicon out."
        )


def run(ctx: RunContext) -> None:
    """Compare ``stage.before`` with ``stage.after``. Reads prompts from data.eval_path (or the
    held-out share of data.path).
    """
    with ctx.closing():
        _run(ctx)


def _run(ctx: RunContext) -> None:
    cfg, stage = ctx.cfg, ctx.cfg.stage
    assert isinstance(stage, EvalStage)
    ctx.watchdog.phase("build")
    distributed.require_one_process("stage=eval", "Run it without torchrun.")
    paths = _paths(stage)
    tokenizer = same_tokenizer(cfg, *paths)
    prompts = _prompts(cfg, tokenizer)
    judges = make_judges(stage, tokenizer)
    scorer = _scorer(cfg, tokenizer)
    for kind, path in (
        ("before", paths[0]),
        ("after", paths[1]),
        *(("reward", path) for _, path in model_paths(cfg.reward)),
    ):
        ctx.add_parent(kind, path)
    for file in data_files(cfg.data):
        ctx.add_data(file)
    ctx.add_data(stage.judge_path if Judge.classifier in stage.judges else None)

    after_model = load_causal_lm(_model(cfg, paths[1]), tokenizer)
    old, new = _generate(ctx, tokenizer, after_model, prompts)
    ctx.watchdog.phase("judge")
    before, after = (
        Answers(old, _judge(old, judges, scorer)),
        Answers(new, _judge(new, judges, scorer)),
    )
    ctx.watchdog.phase("kl")
    kl = response_kl(
        after_model,
        load_causal_lm(_model(cfg, paths[0]), tokenizer),
        new,
        tokenizer.pad_token_id,
        cfg,
    )
    ctx.watchdog.phase("compare")
    comparison = compare(before, after, kl, resamples=stage.bootstrap, seed=cfg.run.seed)

    rows = side_by_side(before, after, kl)
    ctx.tracker.samples(0, rows)
    scores = {
        name: {"before": before.judgements[name], "after": after.judgements[name]}
        for name in before.judgements
    }
    plots = report.plot(comparison, scores, ctx.dir / "plots")
    ctx.tracker.images(plots)
    metrics = comparison.metrics()
    ctx.tracker.log(0, metrics)
    console.table(report.sample_rows(rows, stage.shown), title="The same prompt before and after")
    console.table(
        report.table_rows(comparison), title=f"Before and after on {len(prompts)} held-out prompts"
    )
    ctx.finish(
        steps=1,
        metrics=metrics,
        model=None,
        figures=_headlines(metrics),
        files={"samples": ctx.dir / "samples.jsonl"},
    )


def _paths(stage: EvalStage) -> tuple[str, str]:
    if stage.before is None or stage.after is None:
        missing = "stage.before" if stage.before is None else "stage.after"
        raise UserError(
            f"{missing} is not set: stage=eval compares two model directories, "
            "stage.before=<before> and stage.after=<after>."
        )
    return stage.before, stage.after


def _model(cfg: Config, path: str) -> ModelConfig:
    return dataclasses.replace(cfg.model, path=path, gguf_file=None)


def same_tokenizer(cfg: Config, before: str, after: str) -> Any:
    """The tokenizer of both policies. Raises UserError when theirs differ: KL between them would
    mean nothing.
    """
    old, new = (
        load_tokenizer(_model(cfg, path), cfg.data.chat_template) for path in (before, after)
    )
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


def _prompts(cfg: Config, tokenizer: Any) -> list[Prompt]:
    """The first ``stage.prompts`` held-out prompts; a lone data.eval_path is taken whole."""
    assert isinstance(cfg.stage, EvalStage)
    whole = given(cfg.data) is None
    source = (
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=cfg.data.eval_path))
        if whole
        else cfg
    )
    prompts = reading.prompts(reading.DataRequest.of(source), tokenizer, split="eval")
    if len(prompts) < cfg.stage.prompts:
        LOG.warning(
            "stage.prompts=%d, but there are only %d held-out prompts; all of them are used.",
            cfg.stage.prompts,
            len(prompts),
        )
    return prompts[: cfg.stage.prompts]


def make_judges(stage: EvalStage, tokenizer: Any) -> list[ResponseJudge]:
    """The judges of ``stage.judges``, trained where they need it. Raises UserError for one without
    what it judges by.
    """
    judges: list[ResponseJudge] = []
    for kind in stage.judges:
        if kind is Judge.lexicon:
            judges.append(LexiconJudge())
        elif kind is Judge.classifier:
            if stage.judge_path is None:
                raise UserError(
                    "stage.judges holds classifier, but stage.judge_path is not set: expected a "
                    "file of labelled texts (text, label)."
                )
            rows = read_rows(stage.judge_path, key="stage.judge_path")
            judges.append(ClassifierJudge.from_rows(rows, f"stage.judge_path={stage.judge_path}"))
        elif stage.judge_function is None:
            raise UserError(
                "stage.judges holds function, but stage.judge_function is not set: expected "
                "pkg.module:function."
            )
        else:
            scorer = make_scorer(
                RewardConfig(function=stage.judge_function),
                device=distributed.device(),
                policy_tokenizer=tokenizer,
            )
            judges.append(FunctionJudge(scorer))
    return judges


def _scorer(cfg: Config, tokenizer: Any) -> Scorer | None:
    """What trained the policy; None where no reward is configured, then there is no score among the
    figures.
    """
    if not is_set(cfg.reward):
        return None
    return make_scorer(
        cfg.reward, device=distributed.device(), policy_tokenizer=tokenizer, training=False
    )


def _judge(
    rollouts: Sequence[Rollout], judges: Sequence[ResponseJudge], scorer: Scorer | None
) -> dict[str, list[float]]:
    values = {} if scorer is None else {"score": scorer.score(rollouts).total}
    return values | {judge.name: judge.judge(rollouts) for judge in judges}


def _generate(
    ctx: RunContext, tokenizer: Any, after: Any, prompts: Sequence[Prompt]
) -> tuple[list[Rollout], list[Rollout]]:
    """Both policies' responses with the same seeds: one engine writes as before, takes over the
    weights of `after`, proves it and writes again.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage

    def load_before() -> Any:
        return load_causal_lm(_model(cfg, stage.before), tokenizer)

    start = stage.before
    # an adapter alone: engines start from whole weights
    if not loads_as_it_is(start):
        start = str(ctx.dir / "start")
        load_before().save_pretrained(start)
        tokenizer.save_pretrained(start)
    generator: Generator = make_generator(
        cfg, model_path=start, tokenizer=tokenizer, model_factory=load_before, adapter_rank=None
    )
    try:
        ctx.watchdog.phase("generate before")
        old = generator.generate(
            prompts, n=stage.samples_per_prompt, seed=cfg.run.seed, greedy=stage.greedy
        )
        ctx.watchdog.phase("sync")
        generator.sync(full_weights(after), 1)
        probe = [*prompts[0].token_ids, *old[0].token_ids[:_PROBE_TOKENS]]
        tolerance = gap_tolerance(cfg.rollout.gap_tolerance, resolve_dtype(cfg.model.dtype))
        verify_sync(generator, probe, probe_logprobs(after, probe), tolerance, 1)
        ctx.watchdog.phase("generate after")
        return old, generator.generate(
            prompts, n=stage.samples_per_prompt, seed=cfg.run.seed, greedy=stage.greedy
        )
    finally:
        generator.close()


@torch.inference_mode()
def probe_logprobs(model: Any, token_ids: Sequence[int]) -> list[float]:
    """log p(token_ids[i] | token_ids[:i]) in nats for i >= 1, by transformers."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    return log_p.gather(1, ids[0, 1:, None]).squeeze(1).tolist()


@torch.inference_mode()
def response_kl(
    after: Any, before: Any, rollouts: Sequence[Rollout], pad_id: int, cfg: Config
) -> list[float]:
    """KL(after || before) in nats of each response of `after`: log p_after - log p_before (k1),
    summed over its tokens, float32 at the head.
    """
    device = distributed.device()
    modules = [
        PolicyModule(
            model.to(device).eval(),
            chunk=cfg.engine.logits_chunk,
            temperature=cfg.rollout.temperature,
        )
        for model in (after, before)
    ]
    batch: Batch = collate(
        [r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts], pad_id, device
    )
    out = [0.0] * len(rollouts)
    for rows in plan_micro_batches(batch.lengths.tolist(), cfg.engine.micro_tokens):
        part = batch.select(rows)
        logprobs, ref_logprobs = (
            m(part.input_ids, part.positions, part.response_ids, part.response_mask)[0]
            for m in modules
        )
        sums = (kl_per_token(logprobs, ref_logprobs, KLEstimator.k1) * part.response_mask).sum(
            dim=1
        )
        for row, value in zip(rows, sums.tolist(), strict=True):
            out[row] = value
    return out


def _headlines(metrics: dict[str, float]) -> dict[str, str]:
    """The few figures of the closing panel."""
    out = {}
    for label, name in (
        ("score up by (standard deviations)", "eval/score_shift_sd"),
        ("KL (nats per token)", "eval/kl_per_token"),
    ):
        if name in metrics:
            out[label] = f"{metrics[name]:.3f}"
    for judge in ("lexicon", "classifier", "function"):
        if f"eval/{judge}_delta" in metrics:
            low, high = metrics[f"eval/{judge}_low"], metrics[f"eval/{judge}_high"]
            out[f"judge {judge}"] = (
                f"{metrics[f'eval/{judge}_delta']:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    return out | {"distinct-2 (share of before)": f"{metrics['eval/distinct_2_ratio']:.2f}"}
