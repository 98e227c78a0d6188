"""``stage=reward``: a pairwise reward model on TRL's RewardTrainer, judged on held-out pairs beside
a length-only baseline.

With ``stage.cache_frozen`` the frozen blocks are computed once for each text. Below the lowest
weight that trains, a forward pass of a text is the same in every step: the output of the last block
down there is kept in one file, mapped into memory, under a key of the weights and texts that it
came from. The frozen blocks then hand on what they get, and the last of them gives what was kept.
Texts are padded on the right and read causally, so a token's states depend on no padding.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from trl import RewardConfig as TRLRewardConfig

from conf.choices import AdapterKind, EngineKind
from conf.schema import AdapterConfig, Config, ModelConfig
from conf.stages import RewardStage
from policy.adapters import rates_of
from policy.engines import resharding
from policy.model import has_dropout
from reward.model import (
    Manifest,
    load_reward_module,
    template_hash,
    tokenizer_fingerprint,
    write_manifest,
)
from rlhf.checks.launch import BatchPlan
from rlhf.models.facts import check_forward
from rlhf.models.loading import load_classifier, resolve_dtype, without_weights
from rlhf.models.parts import blocks_of, outline
from rlhf.offline import judged_pairs, setup
from rlhf.offline.judged_pairs import Reward
from rlhf.offline.setup import (
    begin,
    check_positions,
    record_inputs,
    trainer_arguments,
    training_dtype,
    with_adapter,
)
from rlhf.offline.step_rows import (
    INDEX,
    STATES,
    FrozenStates,
    Texts,
    allocate_states,
    batches_of,
    mapped_states,
    padded,
    text_key,
)
from rlhf.offline.training import fit, free_memory, make_guard, save_trained
from rlhf.process import distributed
from rlhf.process.randomness import seed_everything
from rlhf.run.context import RunContext
from rlhf.types import SOFT_LABEL, EncodedRows, RowReader, UserError

adapt_checkpoint = resharding.adapt  # to this launch's ranks, before a resume

LOG = logging.getLogger("rlhf.stages")
Computing = Callable[[], AbstractContextManager[Any]]  # how a pass is computed: by autocast, or not


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load, beside rows and memory; returns notes worth a
    warning. Raises UserError.
    """
    notes = setup.check(cfg)
    if cfg.stage.cache_frozen:
        check_cache(cfg.stage, cfg.model, cfg.adapter)
    return notes


def run(ctx: RunContext, reader: RowReader) -> None:
    """Train, keep the best weights by held-out loss, save a self-contained model/ (and adapter/ for
    LoRA), judge it on held-out pairs.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage
    with ctx.closing():
        ctx.watchdog.phase("data")
        plan = begin(stage.batch_size, cfg.engine)
        rows = reader.read_rows(cfg, plan.micro)
        setup.check_steps(stage, len(rows.train))
        tokenizer, held_out = rows.tokenizer, rows.held_out
        record_inputs(ctx, "policy", rows.files)
        if stage.soft_label:
            # held-out pairs that are all ties are refused here rather than after training
            judged_pairs.better_side(np.array(held_out[SOFT_LABEL]))
        steps, metrics = _train(ctx, plan, rows)
        ctx.watchdog.phase("judge")
        # The figures are those of the saved weights, read back as every later stage reads them.
        device = distributed.device()
        module = load_reward_module(ctx.model_dir, resolve_dtype(cfg.model.dtype)).to(device)
        judged = judged_pairs.judge(module, held_out, cfg.reward.batch_tokens, device)
        metrics |= judged_pairs.judgement_metrics(judged, stage.bootstrap, cfg.run.seed)
        if distributed.is_main():
            manifest = manifest_of(cfg.model, rows, stage.max_length, metrics)
            write_manifest(ctx.model_dir, manifest)
            ctx.tracker.samples(steps, judged_pairs.sample_rows(tokenizer, held_out, judged))
            plot = judged_pairs.plot_judged(judged, metrics, ctx.dir / "plots")
            ctx.tracker.images([plot])
        ctx.watchdog.phase("finish")
        ctx.finish(
            steps=steps,
            metrics=metrics,
            figures=judged_pairs.shown(metrics),
            next_command=(
                "python -m rlhf stage=ppo model.path=<policy> "
                f"reward.path={ctx.model_dir} data.path=<prompts>"
            ),
        )


def _train(ctx: RunContext, plan: BatchPlan, rows: EncodedRows) -> tuple[int, dict[str, float]]:
    """Train and save, and free the trainer's memory. Returns the steps and the run's figures."""
    ctx.watchdog.phase("build")
    trainer = make_trainer(ctx, plan, rows)
    steps, metrics = fit(trainer, ctx)
    ctx.watchdog.phase("save the model")
    save_trained(trainer, rows.tokenizer, ctx.dir, ctx.cfg.model, ctx.cfg.adapter)
    del trainer
    free_memory()
    return steps, metrics


def make_trainer(ctx: RunContext, plan: BatchPlan, rows: EncodedRows) -> Reward:
    """Load the model and build its trainer. Raises UserError for pairs longer than the model
    reads.
    """
    cfg, stage, tokenizer = ctx.cfg, ctx.cfg.stage, rows.tokenizer
    seed_everything(cfg.run.seed)
    dtype = training_dtype(cfg.model.dtype, cfg.adapter.kind, cfg.engine.kind)
    model = load_classifier(dataclasses.replace(cfg.model, dtype=dtype), tokenizer)
    check_forward(model, "a reward model")
    check_positions(model.config, rows.longest, cfg.adapter)
    model = with_adapter(model, tokenizer, stage, cfg.model, cfg.adapter, ctx.start_dir, rows)
    if stage.cache_frozen:
        ctx.watchdog.phase("frozen blocks")
        folder = Path(cfg.data.cache_dir or Path(cfg.run.dir) / ".encoded").expanduser()
        read_frozen_once(
            model,
            rows,
            folder if cfg.data.cache else ctx.dir,
            resolve_dtype(cfg.model.dtype),
            casts=cfg.engine.kind is EngineKind.torch,
            budget=cfg.reward.batch_tokens,
        )
    args = TRLRewardConfig(
        **trainer_arguments(
            stage, plan, cfg.engine, cfg.run, cfg.model.dtype, ctx.checkpoint_dir, ctx.resume_from
        ),
        center_rewards_coefficient=stage.centering_coef or None,
    )
    return Reward(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=tokenizer,
        guard=make_guard(ctx),
        engine=cfg.engine,
        rates=rates_of(model, stage, cfg.adapter),
    )


def manifest_of(
    model: ModelConfig, rows: EncodedRows, max_length: int, metrics: dict[str, float]
) -> Manifest:
    """What later stages must know of the reward model beside its weights. max_length: tokens of the
    longest pair that it may have trained on.
    """
    return Manifest(
        base=model.path or model.kind.value,
        tokenizer_hash=tokenizer_fingerprint(rows.tokenizer),
        chat_template_hash=template_hash(rows.tokenizer),
        conversational=rows.conversational,
        max_length=max_length,
        dtype=str(resolve_dtype(model.dtype)).removeprefix("torch."),
        score_mean=metrics["eval/score_mean"],
        score_std=metrics["eval/score_std"],
        held_out_texts=2 * int(metrics["eval/pairs"]),
    )


# ---- frozen blocks, computed once (stage.cache_frozen) ----


def check_cache(stage: RewardStage, model: ModelConfig, adapter: AdapterConfig) -> None:
    """Whether the frozen blocks say the same of a text in every step. Raises UserError."""
    why = None
    if adapter.kind is not AdapterKind.none:
        why = f"adapter={adapter.kind.value} trains inside the frozen blocks"
    elif stage.unfreeze.on:
        why = "stage.unfreeze has all blocks train in the end"
    elif stage.train.everything:
        why = "all weights train"
    if why is not None:
        raise UserError(
            f"stage.cache_frozen=true: {why}. Set adapter=none and stage.train.layers, or "
            "stage.cache_frozen=false."
        )
    empty = without_weights(model, classifier=True)
    if empty is None:
        return
    for module in empty.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # as TRL does for a reward model
    if has_dropout(empty):
        raise UserError(
            "stage.cache_frozen=true: the model's configuration has a dropout, with which no two "
            "passes of the frozen blocks are alike. Set it to 0 there, or stage.cache_frozen=false."
        )


class _Reached(Exception):
    """The hidden states that were wanted are there: the blocks above need not run."""


@dataclasses.dataclass(slots=True)
class FrozenPart:
    """The blocks of a model below its lowest weight that trains."""

    model: Any
    blocks: Sequence[Any]
    returned: int = 0  # elements of the tuple that a block returns; 0: the states themselves

    @staticmethod
    def of(model: Any) -> "FrozenPart":
        """Raises UserError where there are none."""
        parts = outline(model)
        trained = {name for name, param in model.named_parameters() if param.requires_grad}
        passed = max(parts.passed(weight) for weight in parts.weights if weight.name in trained)
        if passed == parts.count:
            raise UserError(
                "stage.cache_frozen=true: the lowest block, or something below it, trains, so no "
                "hidden states stay as they are. Set stage.train.layers below the number of "
                f"blocks ({parts.count}), or stage.cache_frozen=false."
            )
        return FrozenPart(model, list(blocks_of(model))[: parts.count - passed])

    def key(self, texts: Texts, half: bool) -> str:
        """A hash of what the states depend on: frozen weights, texts, and how they are computed."""
        config = self.model.config
        told = [len(self.blocks), half, str(config._attn_implementation), config.to_json_string()]
        told += [transformers.__version__, torch.__version__, str(distributed.device().type)]
        digest = hashlib.sha256(json.dumps(told).encode())
        for name, param in sorted(self.model.named_parameters()):
            if not param.requires_grad:
                digest.update(f"{name} {param.dtype}".encode())
                raw = param.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
        for text in texts:
            digest.update(text_key(text))
        return digest.hexdigest()[:40]

    @torch.no_grad()
    def states(self, texts: Texts, computing: Computing) -> Tensor:
        """What the last frozen block says of texts, padded on the right: [B, L, H]."""
        found: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            self.returned = len(output) if isinstance(output, tuple) else 0
            found.append(output[0] if self.returned else output)
            raise _Reached

        ids, mask = padded(texts, self.model.config.pad_token_id)
        handle = self.blocks[-1].register_forward_hook(keep)
        try:
            with computing():
                self.model(input_ids=ids, attention_mask=mask)
        except _Reached:
            return found[0]
        finally:
            handle.remove()
        raise RuntimeError("the model did not call its blocks")

    def read(self, states: "FrozenStates") -> None:
        """From here on a pass of the model reads `states` in place of computing the blocks."""
        now: list[Tensor] = []  # those of the batch under way

        def look_up(model: Any, given: Any, options: dict[str, Any]) -> None:
            now[:] = [states.batch(options["input_ids"], options["attention_mask"])]

        self.model.register_forward_pre_hook(look_up, with_kwargs=True)
        for number, block in enumerate(self.blocks):
            block.forward = self._handing_on(now if number == len(self.blocks) - 1 else None)

    def _handing_on(self, now: list[Tensor] | None) -> Any:
        """A block's forward that gives back its input, or the only element of `now`."""

        def give(hidden_states: Tensor, *given: Any, **options: Any) -> Any:
            states = hidden_states if now is None else now[0]
            return (states, *[None] * (self.returned - 1)) if self.returned else states

        return give


def read_frozen_once(
    model: Any, rows: EncodedRows, place: Path, dtype: torch.dtype, *, casts: bool, budget: int
) -> None:
    """Let `model` read the states of its frozen blocks from a folder in `place`, where an earlier
    run may have left them. A collective. Raises UserError where the disk can't hold them, and by
    the family's name where they don't give the scores that the blocks give.

    dtype: that training computes in; casts: by autocast (DeepSpeed's weights are in half precision
    themselves); budget: padded tokens that are computed together.
    """
    part, texts = FrozenPart.of(model), _texts(rows)
    half = dtype is not torch.float32
    device = distributed.device()

    def computing() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype) if casts and half else nullcontext()

    model.to(device).eval()
    tried = [min(texts, key=len), max(texts, key=len)]
    whole = _scores(model, tried, computing)
    folder = place / f"frozen-{part.key(texts, half)}"
    if not distributed.broadcast((folder / INDEX).is_file()):
        write_states(part, texts, folder, budget, computing)
    part.states(tried, computing)  # what form a block's output has
    part.read(FrozenStates(folder))
    again = _scores(model, tried, computing)
    tolerance = 5e-2 if half else 1e-4
    if not torch.allclose(again, whole, rtol=tolerance, atol=tolerance):
        raise UserError(
            f"stage.cache_frozen=true: {model.config.model_type} scores {again.tolist()} by the "
            f"kept states of its frozen blocks, and {whole.tolist()} by the blocks themselves. Set "
            "stage.cache_frozen=false."
        )


@torch.no_grad()
def _scores(model: Any, texts: Texts, computing: Computing) -> Tensor:
    ids, mask = padded(texts, model.config.pad_token_id)
    with computing():
        scores: Tensor = model(input_ids=ids, attention_mask=mask).logits.float().flatten().cpu()
    return scores


def _texts(rows: EncodedRows) -> Texts:
    """Every text that the trainer reads, once."""
    found: dict[tuple[int, ...], None] = {}
    for data in (rows.train, rows.held_out):
        for column in ("chosen_ids", "rejected_ids"):
            found.update(dict.fromkeys(map(tuple, data[column])))
    return list(found)


def write_states(
    part: FrozenPart, texts: Texts, folder: Path, budget: int, computing: Computing
) -> None:
    """The states of `texts` into `folder`, which appears when it is whole; each rank computes a
    share. A collective. Raises UserError where the disk can't hold them.
    """
    first = part.states(texts[:1], computing)
    lengths = [len(text) for text in texts]
    ends = np.cumsum([0, *lengths])
    tokens, hidden = int(ends[-1]), first.shape[-1]
    side = folder.with_name(folder.name + ".part")
    problem = None
    if distributed.is_main():
        size = tokens * hidden * first.element_size()
        problem = allocate_states(side / STATES, size)
    problem = distributed.broadcast(problem)
    if problem is not None:
        raise UserError(problem)
    states = mapped_states(side / STATES, tokens, hidden, first.dtype)
    own = range(distributed.rank(), len(texts), distributed.world_size())
    for numbers in batches_of(texts, own, budget):
        found = part.states([texts[number] for number in numbers], computing).cpu()
        for row, number in enumerate(numbers):
            states[int(ends[number]) : int(ends[number + 1])] = found[row, : lengths[number]]
    distributed.barrier()
    if distributed.is_main():
        told = {"dtype": str(first.dtype).removeprefix("torch."), "hidden": hidden}
        keys = [text_key(text).hex() for text in texts]
        (side / INDEX).write_text(
            json.dumps({**told, "lengths": lengths, "keys": keys}), encoding="utf-8"
        )
        side.rename(folder)
        gib = (folder / STATES).stat().st_size / 2**30
        LOG.info("stage.cache_frozen: %.2f GiB of hidden states in %s", gib, folder)
    distributed.barrier()
