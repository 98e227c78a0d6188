"""The online loop of every algorithm: rollouts -> scores -> KL-penalised update -> verified weight
sync (stage=ppo, grpo, ...).
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from conf.choices import OnNonFinite
from conf.stages import OnlineStage
from policy.advantages import group_index
from policy.batching import Batch, collate
from policy.engines import resharding
from policy.engines.base import NonFinite
from policy.engines.spikes import Brake
from policy.kl import kl_per_token
from policy.model import mix_weights
from policy.prepare import Layout, TrainBatch, policy_logprobs, prepare
from policy.saving import save_adapter, save_model
from policy.update import update
from rlhf.online.collect import Collected, collect, group_figures
from rlhf.online.judging import BEST, Keeper, Watching, make_judge
from rlhf.online.setup import Parts
from rlhf.online.sync import verify_sync
from rlhf.online.watch import response_statistics
from rlhf.process import checkpoints, distributed, randomness
from rlhf.process.interrupts import Stopping
from rlhf.process.moments import RunningMoments
from rlhf.process.resident import Resident
from rlhf.process.watchdog import Watchdog
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.types import Interrupted, NonFiniteScore, Rollout, Scores, TrainingDiverged, UserError

LOG = logging.getLogger("rlhf.online.loop")
_DUMPS = 5  # batches written before further ones replace each other


@dataclass(slots=True)
class Clock:
    """Seconds per phase of one step."""

    watchdog: Watchdog
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.watchdog.phase(name)
        yield
        self.seconds[f"time/{name}_s"] = (
            self.seconds.get(f"time/{name}_s", 0.0) + time.perf_counter() - start
        )


class BadStep(TrainingDiverged):
    """A step that must not be applied, on every rank alike; what follows is stage.on_nonfinite's.
    `scores`: a score is no number.
    """

    def __init__(self, message: str, *, scores: bool = False) -> None:
        super().__init__(message)
        self.scores = scores


class Loop:
    """State that lives as long as the run: step number, KL controller, score statistics."""

    def __init__(self, ctx: RunContext, parts: Parts) -> None:
        self.ctx, self.parts, self.cfg, self.watchdog = ctx, parts, ctx.cfg, ctx.watchdog
        stage = ctx.cfg.stage
        assert isinstance(stage, OnlineStage) and stage.steps is not None
        self.stage, self.steps = stage, stage.steps
        self.moments = RunningMoments()
        self.step = 0  # updates done
        self.draws = 0  # of prompts, since the run began
        self.brake = Brake.from_stage(stage)
        self.rewinds = self.dumps = 0
        self.resident = Resident()
        self.limit = ctx.cfg.rollout.max_response_length
        self.history: list[dict[str, float]] = []
        self.watching = Watching(
            ctx.cfg,
            make_judge(ctx.cfg, parts.tokenizer, parts.scorer),
            Keeper(ctx.dir / BEST, self._save_weights),
        )
        if ctx.resume_from is not None:
            self._load(ctx.resume_from)

    def train(self) -> None:
        self.watchdog.phase("sync")
        self.sync(self.step)
        if self.ctx.resume_from is not None:
            # last, so that nothing draws between here and the next step
            randomness.load(self.ctx.resume_from, self._generator_seed())
        if self.step == 0 and self.watching.judge is not None:
            self.watchdog.phase("judge")
            self.ctx.tracker.log(0, self.watching.begin(self.parts.generator))
        with console.progress(self.steps, self.stage.name) as bar, Stopping() as stopping:
            while self.step < self.steps and self.watching.stopped is None:
                step, began = self.step, time.perf_counter()
                try:
                    metrics, rows = self.one_step(step)
                except BadStep as error:
                    if self.stage.on_nonfinite is OnNonFinite.rewind:
                        self._rewind(error)
                        continue
                    if not (error.scores and self.stage.on_nonfinite is OnNonFinite.skip):
                        raise
                    metrics, rows = self._leave_out(error, began), []
                self.step += 1
                self.history.append(metrics)
                self.watchdog.phase("judge")
                watched = self.watching.after(step + 1, metrics, self.parts.generator)
                metrics["time/step_s"] += watched.get("time/judge_s", 0.0)
                self.ctx.tracker.log(step + 1, metrics | watched)
                bar.update(step + 1, metrics)
                if rows:
                    self.ctx.tracker.samples(step + 1, rows)
                    every = self.cfg.tracking.samples_every
                    if every and (step + 1) % every == 0:
                        console.samples_table(rows)
                self._end_step(step + 1, stopping)
        self.watchdog.phase("finish")
        self._finish()

    def _end_step(self, step: int, stopping: Stopping) -> None:
        """Save where it is due, after the last step too (a run can be made longer), and where a
        signal stops the run, which raises Interrupted.
        """
        signal, every = stopping.agreed(), self.stage.save_steps
        if signal is not None or (every and (step % every == 0 or step == self.steps)):
            self.watchdog.phase("save")
            self._save(step)
        if signal is not None:
            raise Interrupted(signal, step, self._checkpoint(step))

    def _checkpoint(self, step: int) -> Path:
        return self.ctx.checkpoint_dir / f"step-{step}"

    def one_step(self, step: int) -> tuple[dict[str, float], list[dict[str, object]]]:
        """One online step; returns its metrics over all ranks and this rank's sample rows."""
        stage, parts = self.stage, self.parts
        began, clock = time.perf_counter(), Clock(self.watchdog)
        collected = collect(
            parts.generator,
            lambda rollouts: self._score(rollouts, step),
            parts.prompts,
            stage,
            first_draw=self.draws,
            seed=self.cfg.run.seed,
            limit=self.limit,
            moments=self.moments,
            phase=clock.phase,
        )
        self.draws += collected.draws
        with clock.phase("prepare"):
            batch = self._prepare(collected)
        with clock.phase("update"):
            figures = self._update(batch, collected, step)
        with clock.phase("sync"):
            probe_gap = self.sync(step + 1)
            self._move_reference(step)
        with clock.phase("log"):
            metrics = self._metrics(collected, batch, clock.seconds) | figures
            metrics |= response_statistics(collected.rollouts, collected.scores)
            metrics |= {
                "reward/clipped": collected.clipped,
                "rollout/probe_gap": probe_gap,
                "objective/kl_coef": parts.kl.coef,
            }
            self._check_gap(metrics["rollout/logprob_gap"], step)
            if "objective/kl" in metrics:
                parts.kl.update(metrics["objective/kl"], int(metrics["rollout/trained_responses"]))
            rows = self._sample_rows(collected, batch, step)
            memory = self.resident.figures()
            # of the rank that has most
            metrics |= dict(zip(memory, distributed.all_max(list(memory.values())), strict=True))
        trained = metrics["rollout/trained_tokens"] * figures["policy/updates"] / stage.minibatches
        metrics |= clock.seconds
        metrics["train/tokens_per_s"] = trained / max(clock.seconds["time/update_s"], 1e-9)
        metrics["time/step_s"] = time.perf_counter() - began
        return metrics, rows

    def _score(self, rollouts: list[Rollout], step: int) -> Scores:
        """Scores of this rank's responses. Every rank raises when one of them can't score: BadStep
        where a score is no finite number.
        """
        wrong, scores = None, None
        try:
            scores = self.parts.scorer.score(rollouts)
        except UserError as error:
            wrong = (
                f"{error} The batch is in {self._dump(rollouts, None, None, step)}.",
                isinstance(error, NonFiniteScore),
            )
        first = next((found for found in distributed.gather(wrong) if found is not None), None)
        if first is not None:
            raise (
                BadStep(f"step {step + 1}: {first[0]}", scores=True)
                if first[1]
                else TrainingDiverged(f"step {step + 1}: {first[0]}")
            )
        assert scores is not None
        return scores

    def _prepare(self, collected: Collected) -> TrainBatch:
        """The rows that train as tensors. A rank without any holds one row at weight 0, for the
        collectives that the others take part in.
        """
        device, stage, parts = distributed.device(), self.stage, self.parts
        rows = collected.rows or [0]
        rollouts = [collected.rollouts[row] for row in rows]
        tokens = collate(
            [r.prompt.token_ids for r in rollouts],
            [r.token_ids for r in rollouts],
            parts.tokenizer.pad_token_id,
            device,
        )
        sampled = torch.zeros(tokens.response_mask.shape, dtype=torch.float32)
        for row, rollout in enumerate(rollouts):
            sampled[row, : len(rollout.rollout_logprobs)] = torch.tensor(rollout.rollout_logprobs)
        keep = [
            bool(collected.rows) and not (stage.mask_truncated and r.finish_reason == "length")
            for r in rollouts
        ]
        batch = TrainBatch(
            tokens=tokens,
            keep=torch.tensor(keep, device=device),
            groups=group_index([collected.groups[row] for row in rows], device),
            pairs=collected.pairs,
            rollout_logprobs=sampled.to(device),
        )
        return prepare(
            batch,
            collected.finals[rows].to(device),
            None if collected.baselines is None else collected.baselines[rows].to(device),
            policy=parts.policy,
            reference=parts.reference,
            critic=parts.critic,
            stage=stage,
            kl_coef=parts.kl.coef,
            layout=parts.layout,
            passes=parts.passes,
        )

    def _update(self, batch: TrainBatch, collected: Collected, step: int) -> dict[str, float]:
        parts, stage = self.parts, self.stage
        try:
            figures = update(
                batch,
                policy=parts.policy,
                critic=parts.critic,
                reference=parts.reference,
                stage=stage,
                layout=parts.layout,
                kl_coef=parts.kl.coef,
                constant_length=stage.constant_length or self.limit,
                seed=self.cfg.run.seed * 1_000_003 + step,
                train_policy=parts.critic is None or step >= stage.critic_warmup,
                brake=self.brake,
            )
        except NonFinite as error:
            place = self._dump(collected.rollouts, collected.scores.total, batch, step)
            raise BadStep(f"step {step + 1}: {error}. The batch is in {place}.") from error
        if figures["policy/skipped"]:
            self._dump(collected.rollouts, collected.scores.total, batch, step)
        return figures

    def _leave_out(self, error: BadStep, began: float) -> dict[str, float]:
        """The step's responses have no scores: nothing is learned from them, and the next step
        draws other prompts. Its figures.
        """
        LOG.warning("the step was left out (stage.on_nonfinite=skip): %s", error)
        self.draws += 1
        self.sync(self.step + 1)
        return {"train/skipped": 1.0, "time/step_s": time.perf_counter() - began}

    def _rewind(self, error: BadStep) -> None:
        """Back to the newest checkpoint, with prompts that come after those of the step that
        failed. A collective; raises `error` where it can't.
        """
        found = distributed.broadcast(
            checkpoints.newest(self.ctx.checkpoint_dir)[0] if distributed.is_main() else None
        )
        self.rewinds += 1
        if found is None or self.rewinds > self.stage.rewinds:
            why = (
                "there is no whole checkpoint to go back to"
                if found is None
                else f"stage.rewinds={self.stage.rewinds} times it was tried already"
            )
            raise TrainingDiverged(f"{error} stage.on_nonfinite=rewind: {why}.") from error
        if distributed.is_main():
            LOG.warning(
                "back to %s, on with other prompts (rewind %d of %d): %s",
                found[0].name,
                self.rewinds,
                self.stage.rewinds,
                error,
            )
        draws = self.draws + 1
        checkpoint = resharding.adapt_on_all_ranks(found[0], self.cfg.engine)
        self._load(checkpoint)
        self.draws = max(draws, self.draws)
        self.ctx.tracker.rewind(self.step)
        self.sync(self.step)
        randomness.load(checkpoint, self._generator_seed())

    def _generator_seed(self) -> int:
        """Where the random generators start that no checkpoint has for this number of ranks."""
        return self.cfg.run.seed * 1_000_003 + self.step

    def _move_reference(self, step: int) -> None:
        """Every `stage.reference_every` steps the reference's weights become a mix with the
        policy's (Gorbatovski et al. 2024, arXiv:2404.09656).
        """
        if self.stage.reference_every and (step + 1) % self.stage.reference_every == 0:
            mix_weights(
                self.parts.reference.model, self.parts.policy.module.model, self.stage.reference_mix
            )

    def sync(self, version: int) -> float:
        """Send the weights and prove that they arrived. Returns the probe's largest gap in nats;
        raises SyncError.
        """
        parts = self.parts
        parts.generator.sync(parts.weights(), version)
        return verify_sync(
            parts.generator, parts.probe, self._probe_logprobs(), parts.tolerance, version
        )

    def _probe_logprobs(self) -> list[float]:
        """The trainer's logprobs of the probe's tokens after the first, at temperature 1."""
        probe, module = self.parts.probe, self.parts.policy.module
        batch: Batch = collate(
            [probe[:1]], [probe[1:]], self.parts.tokenizer.pad_token_id, distributed.device()
        )
        temperature, module.temperature = module.temperature, 1.0
        try:
            one = torch.zeros(1, dtype=torch.long, device=batch.lengths.device)
            logprobs, _ = policy_logprobs(
                self.parts.policy, batch, one, [0], Layout(self.cfg.engine.micro_tokens)
            )
        finally:
            module.temperature = temperature
        return [float(x) for x in logprobs[0]]

    def _check_gap(self, gap: float, step: int) -> None:
        """Sampler and trainer saw the same weights, so untruncated sampling must agree on every
        token.
        """
        sampling = self.cfg.rollout
        exact = sampling.top_p == 1.0 and sampling.top_k == 0
        if not math.isfinite(gap) or (exact and gap > self.parts.tolerance):
            raise BadStep(
                f"step {step + 1}: rollout/logprob_gap is {gap:.2e} nats, above "
                f"{self.parts.tolerance:.0e} (rollout.gap_tolerance): "
                "the sampler's logprobs are not the trainer's, so the update would train on "
                "another policy's samples."
            )

    def _metrics(
        self, collected: Collected, batch: TrainBatch, seconds: dict[str, float]
    ) -> dict[str, float]:
        """Means over all ranks: scores and lengths over every response, logprobs and KL over those
        that train; one reduction.
        """
        rollouts, scored, mask = collected.rollouts, collected.scores, batch.train_mask
        assert batch.old_logprobs is not None and batch.entropy is not None
        gap = torch.where(mask, (batch.rollout_logprobs - batch.old_logprobs).abs(), 0.0)
        total = torch.tensor(scored.total, dtype=torch.float64)
        groups = group_figures(collected)
        sums: dict[str, float] = {
            "responses": len(rollouts),
            "tokens": sum(len(r.token_ids) for r in rollouts),
            "scores": float(total.sum()),
            "scores_square": float(total.square().sum()),
            "finished": sum(r.finish_reason == "stop" for r in rollouts),
            "groups": groups["groups"],
            "equal": groups["equal"],
            "trained": float(batch.keep.sum()),
            "trained_tokens": float(mask.sum()),
            "rlhf_reward": float(batch.rewards[batch.keep].sum()),
            "entropy": float(torch.where(mask, batch.entropy, 0.0).sum()),
        }
        if batch.ref_logprobs is not None:
            kl = kl_per_token(batch.old_logprobs, batch.ref_logprobs, self.stage.kl_estimator)
            sums["kl"] = float(torch.where(mask, kl, 0.0).sum())
        if batch.returns is not None and batch.values is not None:
            returns, residual = (
                batch.returns[mask].double(),
                (batch.returns - batch.values)[mask].double(),
            )
            sums |= {
                "returns": float(returns.sum()),
                "returns_square": float(returns.square().sum()),
            }
            sums |= {
                "residual": float(residual.sum()),
                "residual_square": float(residual.square().sum()),
            }
        sums |= {
            f"term:{name}": math.fsum(values)
            for name, values in {**scored.terms, **scored.extras}.items()
        }
        s = dict(zip(sums, distributed.all_sum(list(sums.values())), strict=True))
        largest_gap, rollout_s, largest, smallest = distributed.all_max(
            [float(gap.max()), seconds["time/rollout_s"], groups["largest"], groups["smallest"]]
        )
        n, trained, tokens = s["responses"], max(s["trained"], 1.0), max(s["trained_tokens"], 1.0)
        metrics = {
            "objective/scores": s["scores"] / n,
            "objective/scores_std": math.sqrt(
                max(0.0, s["scores_square"] / n - (s["scores"] / n) ** 2)
            ),
            "rollout/response_length": s["tokens"] / n,
            "rollout/response_tokens": s["tokens"],
            "rollout/trained_responses": s["trained"],
            "rollout/trained_tokens": s["trained_tokens"],
            "rollout/finished": s["finished"] / n,
            "rollout/draws": float(collected.draws),
            "rollout/logprob_gap": largest_gap,
            "rollout/tokens_per_s": s["tokens"] / max(rollout_s, 1e-9),
            "group/equal": s["equal"] / s["groups"],
            "group/size_min": -smallest,
            "group/size_max": largest,
        }
        # no response was left to train: there is nothing to take a mean of, and 0 would look like a
        # collapse
        if not s["trained_tokens"]:
            s.pop("kl", None)
        else:
            metrics |= {
                "objective/rlhf_reward": s["rlhf_reward"] / trained,
                "objective/entropy": s["entropy"] / tokens,
            }
        if "kl" in s:
            metrics |= {
                "objective/kl": s["kl"] / trained,
                "objective/kl_per_token": s["kl"] / tokens,
            }
        if "returns" in s:
            spread = s["returns_square"] / tokens - (s["returns"] / tokens) ** 2
            left = s["residual_square"] / tokens - (s["residual"] / tokens) ** 2
            metrics["value/explained_variance"] = 1.0 - left / spread if spread > 1e-12 else 0.0
        return metrics | {
            f"reward/{name.removeprefix('term:')}": value / n
            for name, value in s.items()
            if name.startswith("term:")
        }

    def _sample_rows(
        self, collected: Collected, batch: TrainBatch, step: int
    ) -> list[dict[str, object]]:
        place = {row: i for i, row in enumerate(collected.rows)}
        kl: dict[int, float] = {}
        if batch.ref_logprobs is not None and batch.old_logprobs is not None:
            summed = torch.where(
                batch.train_mask,
                kl_per_token(batch.old_logprobs, batch.ref_logprobs, self.stage.kl_estimator),
                0.0,
            ).sum(1)
            kl = {row: float(summed[i]) for row, i in place.items()}
        rows: list[dict[str, object]] = []
        for i, rollout in enumerate(collected.rollouts[: self.stage.samples_kept]):
            terms = {
                name: values[i]
                for name, values in {**collected.scores.terms, **collected.scores.extras}.items()
            }
            rows.append(
                {
                    "step": step + 1,
                    "prompt": rollout.prompt.text,
                    "response": rollout.text,
                    "score": collected.scores.total[i],
                    **terms,
                }
                | {
                    "kl": kl.get(i),
                    "response_length": len(rollout.token_ids),
                    "finish_reason": rollout.finish_reason,
                }
            )
        return rows

    def _dump(
        self,
        rollouts: list[Rollout],
        scores: list[float] | None,
        batch: TrainBatch | None,
        step: int,
    ) -> Path:
        """Write the batch that must not be applied, one in place of another once there are `_DUMPS`
        of them; returns where.
        """
        place = self.ctx.dir / f"diverged-step-{step + 1}-rank-{distributed.rank()}"
        self.dumps += 1
        if self.dumps > _DUMPS:
            place = self.ctx.dir / f"diverged-last-rank-{distributed.rank()}"
        place.mkdir(parents=True, exist_ok=True)
        with (place / "rollouts.jsonl").open("w", encoding="utf-8") as file:
            for i, r in enumerate(rollouts):
                row = {
                    "prompt": r.prompt.text,
                    "response": r.text,
                    "token_ids": r.token_ids,
                    "rollout_logprobs": r.rollout_logprobs,
                }
                file.write(
                    json.dumps(
                        row
                        | {
                            "finish_reason": r.finish_reason,
                            "score": None if scores is None else scores[i],
                        }
                    )
                    + "\n"
                )
        if batch is not None:
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in batch.tensors().items()},
                str(place / "batch.safetensors"),
            )
        return place

    def _save(self, step: int) -> None:
        """Resume state of all ranks. A collective."""
        with checkpoints.written(
            self._checkpoint(step), keep=self.cfg.run.keep_checkpoints
        ) as side:
            self.parts.policy.save(side / "policy")
            if self.parts.critic is not None:
                self.parts.critic.save(side / "critic")
            randomness.save(side)
            if not distributed.is_main():
                return
            state = {
                "step": step,
                "draws": self.draws,
                "kl": self.parts.kl.state_dict(),
                "moments": self.moments.state_dict(),
            }
            state |= {"brake": self.brake.state_dict(), "rewinds": self.rewinds}
            state |= {
                "scorer": self.parts.scorer.state_dict(),
                "history": self.history,
                "watching": self.watching.state_dict(),
            }
            if self.stage.reference_every:
                torch.save(self.parts.reference.model.state_dict(), side / "reference.pt")
            resharding.record(side, self.cfg.engine)
            (side / "loop.json").write_text(json.dumps(state), encoding="utf-8")

    def _load(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / "loop.json").read_text(encoding="utf-8"))
        self.parts.policy.load(checkpoint / "policy")
        if self.parts.critic is not None:
            self.parts.critic.load(checkpoint / "critic")
        if self.stage.reference_every:
            self.parts.reference.model.load_state_dict(
                torch.load(checkpoint / "reference.pt", weights_only=True, map_location="cpu")
            )
        self.parts.scorer.load_state_dict(state["scorer"])
        self.step, self.draws = state["step"], state["draws"]
        self.brake.load_state_dict(state["brake"])
        self.rewinds = max(self.rewinds, state["rewinds"])
        self.history = state["history"]
        self.parts.kl.load_state_dict(state["kl"])
        self.moments.load_state_dict(state["moments"])
        self.watching.load_state_dict(state["watching"])

    def _save_weights(self, directory: Path) -> None:
        """model/ and, for LoRA, adapter/ in `directory`."""
        parts = self.parts
        save_model(
            parts.policy.module.model, parts.tokenizer, directory / "model", parts.policy.gather
        )
        if parts.adapter:
            save_adapter(parts.policy.module.model, directory / "adapter", parts.policy.gather)

    def _finish(self) -> None:
        ctx = self.ctx
        if self.watching.keeps_best:
            self.watching.keeper.restore(ctx.dir)
        else:
            self._save_weights(ctx.dir)
        if ctx.enabled:
            checkpoints.clear_universal(ctx.checkpoint_dir)
            ctx.tracker.images(self.watching.plot(ctx.dir / "plots"))
        window = max(1, min(5, len(self.history) // 2))
        metrics = {}
        for name in sorted(set().union(*self.history)):
            for key, part in (
                (f"{name}_first", self.history[:window]),
                (name, self.history[-window:]),
            ):
                # a step without an update has no figures of it
                values = [h[name] for h in part if name in h]
                if values:
                    metrics[key] = sum(values) / len(values)
        if "objective/scores" not in metrics:
            raise TrainingDiverged(
                f"none of the {len(self.history)} steps had finite scores: each was left out "
                "(stage.on_nonfinite=skip)."
            )
        metrics["rollout/logprob_gap_max"] = max(
            h["rollout/logprob_gap"] for h in self.history if "rollout/logprob_gap" in h
        )
        metrics["train/skipped_total"] = sum(
            h.get("train/skipped", 0.0) + h.get("policy/skipped", 0.0) for h in self.history
        )
        metrics["train/rewinds"] = float(self.rewinds)
        ctx.finish(
            steps=len(self.history),
            metrics=metrics | self.watching.summary(),
            model="model",
            figures={
                f"score, first {window} steps": f"{metrics['objective/scores_first']:.3f}",
                f"score, last {window} steps": f"{metrics['objective/scores']:.3f}",
                **(
                    {"KL per response (nats)": f"{metrics['objective/kl']:.2f}"}
                    if "objective/kl" in metrics
                    else {}
                ),
                "largest sampler-trainer gap (nats)": f"{metrics['rollout/logprob_gap_max']:.1e}",
                **self.watching.figures(),
            },
            next_command=f"python -m rlhf stage=eval run.name={ctx.cfg.run.name} "
            f"stage.before={ctx.cfg.model.path} stage.after={ctx.dir / 'model'}",
        )
