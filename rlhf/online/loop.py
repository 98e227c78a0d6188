"""The online loop of every algorithm (stage=ppo, grpo, ...): rollouts, scores, a KL-penalised
update, and a verified weight sync.
"""

import contextlib
import logging
import time
from pathlib import Path

from conf.choices import OnNonFinite
from conf.stages import OnlineStage
from policy import adapters
from policy.engines import resharding
from policy.engines.base import Brake, NonFinite, Plateau
from policy.prepare import TrainBatch, prepare
from policy.saving import mix_weights
from policy.update import update
from reward.base import environment_weight
from rlhf.online.ahead import Place, make_writer
from rlhf.online.collect import Collected, Collector, on_device
from rlhf.online.judging import BEST, Keeper, Watching, make_judge
from rlhf.online.metrics import (
    closing_figures,
    run_metrics,
    sample_rows,
    stale_metrics,
    step_metrics,
    window,
)
from rlhf.online.recovery import (
    BadStep,
    RunState,
    noise_of,
    read_state,
    write_bad_batch,
    write_state,
)
from rlhf.online.setup import Parts
from rlhf.online.sync import Bounds, gap_fault
from rlhf.online.watch import response_statistics
from rlhf.process import checkpoints, distributed, randomness
from rlhf.process.supervision import Clock, Resident, Stopping
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.run.directory import BadBatches
from rlhf.types import Interrupted, NonFiniteScore, Rollout, Scores, TrainingDiverged, UserError

LOG = logging.getLogger("rlhf.online.loop")
Metrics = dict[str, float]
SampleRows = list[dict[str, object]]


class Loop:
    """Trains one policy: `train` repeats `one_step` until the last step, or until a rule of the
    watch stops the run.
    """

    def __init__(self, ctx: RunContext, parts: Parts) -> None:
        cfg, stage = ctx.cfg, ctx.cfg.stage
        assert isinstance(stage, OnlineStage) and stage.steps is not None
        self.ctx, self.parts, self.stage = ctx, parts, stage
        self.seed = cfg.run.seed
        self.steps = stage.steps
        self.limit = cfg.environment.most_written(cfg.rollout.max_response_length)  # tokens
        self.exact_sampling = cfg.rollout.top_p == 1.0 and cfg.rollout.top_k == 0
        plateau = Plateau.of(stage, higher_is_better=True)
        self.state = RunState(
            Brake.from_stage(stage), stage.prompts_per_step, plateau, noise_of(parts, stage)
        )
        self.in_flight = cfg.rollout.in_flight
        begin = parts.scorer.begin
        self.writer = make_writer(parts.generator, parts.prompts, stage, self.seed, begin)
        weight = environment_weight(cfg.reward)
        self.collector = Collector(self.writer, stage, self.limit, self.state.moments, weight)
        self.bad_batches = BadBatches(ctx.dir)
        self.memory = Resident()
        self.watching = Watching(
            stage.watch,
            stage.steps,
            make_judge(
                stage.watch,
                cfg.reward,
                parts.tokenizer,
                parts.scorer,
                parts.held_out,
                cfg.run.seed,
                parts.holder,
            ),
            Keeper(ctx.dir / BEST, self._save_weights),
        )
        if ctx.resume_from is not None:
            read_state(ctx.resume_from, self.state, parts, self.watching)

    def train(self) -> None:
        """All steps of the run, from where it was resumed, and what the run leaves behind. Raises
        Interrupted, TrainingDiverged, SyncError. A collective.
        """
        self._begin()
        with (
            contextlib.closing(self.writer),
            console.progress(self.steps, self.stage.name) as bar,
            Stopping() as stopping,
        ):
            while self.state.step < self.steps and self.watching.stopped is None:
                done = self._try_step()
                if done is None:  # back to a checkpoint
                    continue
                metrics, rows = done
                self.state.step += 1
                self.state.history.append(metrics)
                self.state.look_for_plateau(metrics)
                self.ctx.watchdog.phase("judge")
                watched = self.watching.after(self.state.step, metrics, self.parts.generator)
                self.writer.resume()
                metrics["time/step_s"] += watched.get("time/judge_s", 0.0)
                self.ctx.tracker.log(self.state.step, metrics | watched)
                bar.update(self.state.step, metrics)
                self._show_samples(rows)
                self._save_if_due(stopping)
        self.ctx.watchdog.phase("finish")
        self._finish()

    def one_step(self, step: int) -> tuple[Metrics, SampleRows]:
        """Online step `step` (from 0); returns its metrics over all ranks and this rank's sample
        rows. Raises BadStep where it must not be applied. A collective.
        """
        stage, parts = self.stage, self.parts
        began, clock = time.perf_counter(), Clock(self.ctx.watchdog)
        place = Place(self.state.draws, self.state.prompts, stage.step_size(step), step)
        collected = self.collector.collect(
            lambda rollouts: self._score(rollouts, step), place, clock.phase
        )
        self.state.draw(collected.draws, place.size)
        with clock.phase("prepare"):
            batch = self._prepare(collected, step)
        with clock.phase("update"):
            figures = self._update(batch, collected, step)
        bounds = parts.sync.proof.bounds  # of the weights that wrote the responses
        if stage.ahead:  # else nothing is being written
            with clock.phase("rollout"):
                self._free_generator(step + 1)
        with clock.phase("sync"):
            proved = self._send(step + 1)
            self._move_reference(step + 1)
        with clock.phase("log"):
            metrics = step_metrics(collected, batch, stage.kl_estimator, bounds.tail)
            if batch.staleness is not None:
                metrics |= stale_metrics(batch, stage)
            told = response_statistics(collected.rollouts, collected.scores, stage.turn_discount)
            metrics |= figures | told | proved
            metrics["objective/kl_coef"] = parts.kl.coef
            self._check_gap(metrics, bounds, step)
            if "objective/kl" in metrics:
                parts.kl.update(metrics["objective/kl"], int(metrics["rollout/trained_responses"]))
            samples = sample_rows(
                collected, batch, stage.kl_estimator, step=step + 1, count=stage.samples_kept
            )
            metrics |= self._memory() | self.writer.idle()
            if self.state.noise is not None:
                metrics |= self.state.noise.figures()
        metrics |= {f"time/{name}_s": seconds for name, seconds in clock.seconds.items()}
        trained = metrics["rollout/trained_tokens"] * figures["policy/updates"] / stage.minibatches
        metrics["train/tokens_per_s"] = trained / max(clock.seconds["update"], 1e-9)
        metrics["time/step_s"] = time.perf_counter() - began
        return metrics, samples

    def _free_generator(self, version: int) -> None:
        """Wait for responses that are being written, unless they may go on with the weights of
        `version`, and no judge writes with these. A collective.
        """
        if self.watching.judges(version) or not self.in_flight:
            self.writer.pause()

    def _send(self, version: int) -> dict[str, float]:
        """As `WeightSync.send`. Then the generator may go on, but where it is the judge's turn."""
        self._free_generator(version)
        proved = self.parts.sync.send(version)
        if not self.watching.judges(version):
            self.writer.resume()
        return proved

    def _set_rates(self, step: int) -> None:
        """What multiplies the schedule's learning rates in step `step` (from 0)."""
        plateau = self.state.plateau
        scale = self.stage.batch_growth.rate_scale(self.stage.prompts_per_step, step)
        if plateau is not None:
            scale *= plateau.scale
        models = self.parts.models
        models.policy.scale = scale
        if models.critic is not None:
            models.critic.scale = scale

    def _begin(self) -> None:
        """Send the first weights, and judge the policy before its first update."""
        self.ctx.watchdog.phase("sync")
        self._send(self.state.step)
        if self.ctx.resume_from is not None:
            # last, so that nothing draws between here and the next step
            randomness.load(self.ctx.resume_from, self._generator_seed())
        if self.state.step == 0 and self.watching.judge is not None:
            self.ctx.watchdog.phase("judge")
            self.ctx.tracker.log(0, self.watching.begin(self.parts.generator))

    def _try_step(self) -> tuple[Metrics, SampleRows] | None:
        """The next step, and what stage.on_nonfinite does about a bad one: None where the run went
        back to a checkpoint.
        """
        began = time.perf_counter()
        try:
            return self.one_step(self.state.step)
        except BadStep as error:
            if self.stage.on_nonfinite is OnNonFinite.rewind:
                self._rewind(error)
                return None
            if not (error.scores and self.stage.on_nonfinite is OnNonFinite.skip):
                raise
            return self._leave_out(error, began), []

    def _leave_out(self, error: BadStep, began: float) -> Metrics:
        """The step's responses have no scores: nothing is learned from them, and the next step
        draws other prompts. Returns the step's figures.
        """
        LOG.warning("the step was left out (stage.on_nonfinite=skip): %s", error)
        self.state.draw(1, self.stage.step_size(self.state.step))
        self._send(self.state.step + 1)
        return {"train/skipped": 1.0, "time/step_s": time.perf_counter() - began}

    def _rewind(self, error: BadStep) -> None:
        """Back to the newest checkpoint, with prompts that come after those of the step that
        failed. A collective; raises TrainingDiverged where it can't.
        """
        state, allowed = self.state, self.stage.rewinds
        state.rewinds += 1
        folder = self.ctx.checkpoint_dir
        try:
            target = checkpoints.rewind_target(folder, state.rewinds, allowed, str(error))
        except TrainingDiverged as refused:
            raise refused from error
        if distributed.is_main():
            LOG.warning(
                "back to %s, on with other prompts (rewind %d of %d): %s",
                target.name,
                state.rewinds,
                allowed,
                error,
            )
        state.draw(1, self.stage.step_size(state.step))
        draws, prompts = state.draws, state.prompts
        checkpoint = resharding.adapt_on_all_ranks(target, self.ctx.cfg.engine)
        read_state(checkpoint, state, self.parts, self.watching)
        state.draws, state.prompts = max(draws, state.draws), max(prompts, state.prompts)
        self.ctx.tracker.rewind(state.step)
        self.writer.forget()
        self._send(state.step)
        randomness.load(checkpoint, self._generator_seed())

    def _generator_seed(self) -> int:
        """Where the random generators start that no checkpoint has for this number of ranks."""
        return self.seed * 1_000_003 + self.state.step

    def _score(self, rollouts: list[Rollout], step: int) -> Scores:
        """Raw scores of this rank's responses. Where one of them can't be scored every rank raises:
        BadStep where a score is no finite number, else TrainingDiverged. A collective.
        """
        wrong, scores = None, None
        try:
            scores = self.parts.scorer.score(rollouts)
        except UserError as error:
            path = self.bad_batches.next_path(step + 1)
            write_bad_batch(path, rollouts)
            wrong = (f"{error} The batch is in {path}.", isinstance(error, NonFiniteScore))
        failures = [failure for failure in distributed.gather(wrong) if failure is not None]
        if failures:
            message, nonfinite = failures[0]
            if nonfinite:
                raise BadStep(f"step {step + 1}: {message}", scores=True)
            raise TrainingDiverged(f"step {step + 1}: {message}")
        assert scores is not None
        return scores

    def _prepare(self, collected: Collected, step: int) -> TrainBatch:
        parts, stage = self.parts, self.stage
        version = step if stage.ahead else None
        batch = self.collector.batch(collected, parts.tokenizer, version)
        rows = collected.rows or [0]
        return prepare(
            batch,
            collected.finals[rows].to(batch.keep.device),
            on_device(collected.baselines, rows),
            parts.models,
            stage,
            kl_coef=parts.kl.coef,
            passes=parts.passes,
        )

    def _update(self, batch: TrainBatch, collected: Collected, step: int) -> Metrics:
        parts, stage = self.parts, self.stage
        raw = collected.scores.total
        self._set_rates(step)
        try:
            figures = update(
                batch,
                parts.models,
                stage,
                kl_coef=parts.kl.coef,
                constant_length=stage.constant_length or self.limit,
                seed=self.seed * 1_000_003 + step,
                train_policy=parts.models.critic is None or step >= stage.critic_warmup,
                brake=self.state.brake,
                noise=self.state.noise,
            )
        except NonFinite as error:
            path = self.bad_batches.next_path(step + 1)
            write_bad_batch(path, collected.rollouts, raw, batch)
            raise BadStep(f"step {step + 1}: {error}. The batch is in {path}.") from error
        if figures["policy/skipped"]:
            path = self.bad_batches.next_path(step + 1)
            write_bad_batch(path, collected.rollouts, raw, batch)
        return figures

    def _move_reference(self, step: int) -> None:
        """Every `stage.reference_every` updates the reference's weights become a mix with the
        policy's (Gorbatovski et al. 2024, arXiv:2404.09656).
        """
        if self.parts.moving_reference and step % self.stage.reference_every == 0:
            models = self.parts.models
            source = models.policy.module.model
            mix_weights(models.reference.model, source, self.stage.reference_mix)

    def _check_gap(self, metrics: Metrics, bounds: Bounds, step: int) -> None:
        """Sampler and trainer saw the same weights, so untruncated sampling must agree on every
        token that is not stale, to `bounds`. Raises BadStep.
        """
        fault = gap_fault(metrics, bounds, exact=self.exact_sampling)
        if fault is not None:
            raise BadStep(
                f"step {step + 1}: {fault} (rollout.gap_tolerance): the sampler's logprobs are not "
                "the trainer's, so the update would train on another policy's samples."
            )

    def _memory(self) -> Metrics:
        """Memory figures in MiB of the rank that has most. A collective."""
        figures = self.memory.figures()
        return dict(zip(figures, distributed.all_max(list(figures.values())), strict=True))

    def _show_samples(self, rows: SampleRows) -> None:
        if not rows:
            return
        self.ctx.tracker.samples(self.state.step, rows)
        every = self.ctx.cfg.tracking.samples_every
        if every and self.state.step % every == 0:
            console.samples_table(rows)

    def _save_if_due(self, stopping: Stopping) -> None:
        """Save every `stage.save_steps` updates, after the last one too (a run can be made longer),
        and where a signal stops the run, which raises Interrupted.
        """
        signal, every, step = stopping.agreed(), self.stage.save_steps, self.state.step
        due = bool(every) and (step % every == 0 or step == self.steps)
        if signal is not None or due:
            self.ctx.watchdog.phase("save")
            self._save(step)
        if signal is not None:
            raise Interrupted(signal, step, self._checkpoint(step))

    def _checkpoint(self, step: int) -> Path:
        return self.ctx.checkpoint_dir / f"step-{step}"

    def _save(self, step: int) -> None:
        """Resume state of all ranks. A collective."""
        keep = self.ctx.cfg.run.keep_checkpoints
        with checkpoints.written(self._checkpoint(step), keep=keep) as side:
            write_state(side, self.state, self.parts, self.watching)

    def _save_weights(self, directory: Path) -> None:
        """model/ and, with an adapter, adapter/ in `directory`. A collective."""
        policy, parts = self.parts.models.policy, self.parts
        adapters.save(policy.module.model, parts.adapter, parts.tokenizer, directory, policy.gather)

    def _finish(self) -> None:
        ctx, history = self.ctx, self.state.history
        if self.watching.keeps_best:
            self.watching.keeper.restore(ctx.dir)
        else:
            self._save_weights(ctx.dir)
        if ctx.enabled:
            checkpoints.clear_universal(ctx.checkpoint_dir)
            ctx.tracker.images(self.watching.plot(ctx.dir / "plots"))
        ctx.tell_found(self.parts.models.policy.module.model)
        metrics = run_metrics(history)
        metrics["train/rewinds"] = float(self.state.rewinds)
        ctx.finish(
            steps=len(history),
            metrics=metrics | self.watching.summary(),
            model="model",
            figures=closing_figures(metrics, window(len(history))) | self.watching.figures(),
            next_command=f"python -m rlhf stage=eval run.name={ctx.cfg.run.name} "
            f"stage.before={ctx.cfg.model.path} stage.after={ctx.dir / 'model'}",
        )
