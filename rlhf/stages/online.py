"""The online loop: rollouts -> scores -> KL-penalised update -> verified weight sync (stage=ppo)."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from conf.schema import OnlineStage
from rlhf.moments import RunningMoments
from policy.batching import Batch, collate
from policy.engine import NonFinite
from policy.prepare import TrainBatch, policy_logprobs, prepare
from policy.saving import save_adapter, save_model
from policy.update import update
from rlhf import console, distributed
from rlhf.run import RunContext
from rlhf.stages.online_setup import Parts, build
from rlhf.stages.sync import verify_sync
from rlhf.types import Prompt, Rollout, Scores, TrainingDiverged, UserError


@dataclass(slots=True)
class Clock:
    """Seconds per phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"time/{name}_s"] = self.seconds.get(f"time/{name}_s", 0.0) + time.perf_counter() - start


def step_prompts(prompts: Sequence[Prompt], step: int, per_step: int, seed: int) -> list[Prompt]:
    """This rank's prompts of `step` (from 0): consecutive slices of one shuffled pass after another, a function of the step alone."""
    chosen = []
    for index in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(index, len(prompts))
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        chosen.append(prompts[int(order[place])])
    share = per_step // distributed.world_size()
    return chosen[distributed.rank() * share : (distributed.rank() + 1) * share]


def final_scores(raw: Sequence[float], truncated: Sequence[bool], stage: OnlineStage, moments: RunningMoments) -> tuple[torch.Tensor, float]:
    """What the update sees [B], and the share of scores that were clipped: clip, then normalise, then the truncation penalty."""
    scores = torch.tensor(raw, dtype=torch.float32)
    clipped = 0.0
    if stage.reward_clip is not None:
        clipped = float((scores.abs() > stage.reward_clip).float().mean())
        scores = scores.clamp(-stage.reward_clip, stage.reward_clip)
    if stage.reward_normalise:
        moments.update(scores.tolist(), distributed.all_sum)
        scores = (scores - moments.mean) / max(moments.std, 1e-6)
    return scores - stage.truncation_penalty * torch.tensor(truncated, dtype=torch.float32), clipped


def run(ctx: RunContext) -> None:
    """Train a policy online. Reads model.path, reward.path (or reward.function) and data.path; writes the run directory of DESIGN."""
    with ctx.closing():
        parts = build(ctx)
        with contextlib.closing(parts.generator):
            Loop(ctx, parts).train()


class Loop:
    """State that lives as long as the run: step number, KL controller, score statistics."""

    def __init__(self, ctx: RunContext, parts: Parts) -> None:
        self.ctx, self.parts, self.cfg = ctx, parts, ctx.cfg
        stage = ctx.cfg.stage
        assert isinstance(stage, OnlineStage) and stage.steps is not None
        self.stage, self.steps = stage, stage.steps
        self.moments = RunningMoments()
        self.first = 0
        self.history: list[dict[str, float]] = []
        if ctx.resume_from is not None:
            self._load(ctx.resume_from)

    def train(self) -> None:
        clock = Clock()
        self._sync(0, clock)
        with console.progress(self.steps, self.stage.name) as bar:
            for step in range(self.first, self.steps):
                metrics, rows = self.one_step(step)
                self.history.append(metrics)
                self.ctx.tracker.log(step + 1, metrics)
                bar.update(step + 1, metrics)
                if rows:
                    self.ctx.tracker.samples(step + 1, rows)
                    every = self.cfg.tracking.samples_every
                    if every and (step + 1) % every == 0:
                        console.samples_table(rows)
                if self.stage.save_steps and (step + 1) % self.stage.save_steps == 0:
                    self._save(step + 1)
        self._finish()

    def one_step(self, step: int) -> tuple[dict[str, float], list[dict[str, object]]]:
        """One online step; returns its metrics over all ranks and this rank's sample rows."""
        stage, parts, seed = self.stage, self.parts, self.cfg.run.seed
        began, clock = time.perf_counter(), Clock()
        with clock.phase("rollout"):
            prompts = step_prompts(parts.prompts, step, stage.prompts_per_step, seed)
            rollouts = parts.generator.generate(prompts, n=stage.samples_per_prompt, seed=seed * 1_000_003 + step)
        with clock.phase("score"):
            scored = self._score(rollouts, step)
            finals, clipped = final_scores(scored.total, [r.finish_reason == "length" for r in rollouts], stage, self.moments)
        with clock.phase("prepare"):
            batch = self._prepare(rollouts, finals)
        with clock.phase("update"):
            try:
                figures = update(
                    batch,
                    policy=parts.policy,
                    critic=parts.critic,
                    stage=stage,
                    budget=self.cfg.engine.micro_tokens,
                    seed=seed * 1_000_003 + step,
                    train_policy=step >= stage.critic_warmup,
                )
            except NonFinite as error:
                raise TrainingDiverged(f"step {step + 1}: {error}. The batch is in {self._dump(rollouts, scored.total, batch, step)}.") from error
        with clock.phase("sync"):
            probe_gap = self._sync(step + 1, clock)
        with clock.phase("log"):
            metrics = self._metrics(rollouts, scored, batch, clock.seconds) | figures
            metrics |= {"reward/clipped": clipped, "rollout/probe_gap": probe_gap, "objective/kl_coef": parts.kl.coef}
            self._check_gap(metrics["rollout/logprob_gap"], step)
            parts.kl.update(metrics["objective/kl"], stage.prompts_per_step * stage.samples_per_prompt)
            rows = self._sample_rows(rollouts, scored, batch, step)
        trained = metrics["rollout/response_tokens"] * figures["policy/updates"] / stage.minibatches
        metrics |= clock.seconds
        metrics["train/tokens_per_s"] = trained / max(clock.seconds["time/update_s"], 1e-9)
        metrics["time/step_s"] = time.perf_counter() - began
        return metrics, rows

    def _score(self, rollouts: list[Rollout], step: int) -> Scores:
        try:
            return self.parts.scorer.score(rollouts)
        except UserError as error:
            raise TrainingDiverged(f"step {step + 1}: {error} The batch is in {self._dump(rollouts, None, None, step)}.") from error

    def _prepare(self, rollouts: list[Rollout], scores: torch.Tensor) -> TrainBatch:
        device = distributed.device()
        tokens = collate([r.prompt.token_ids for r in rollouts], [r.token_ids for r in rollouts], self.parts.tokenizer.pad_token_id, device)
        sampled = torch.zeros(tokens.response_mask.shape, dtype=torch.float32)
        for row, rollout in enumerate(rollouts):
            sampled[row, : len(rollout.rollout_logprobs)] = torch.tensor(rollout.rollout_logprobs)
        return prepare(
            tokens,
            sampled.to(device),
            scores.to(device),
            policy=self.parts.policy,
            reference=self.parts.reference,
            critic=self.parts.critic,
            stage=self.stage,
            kl_coef=self.parts.kl.coef,
            budget=self.cfg.engine.micro_tokens,
        )

    def _sync(self, version: int, clock: Clock) -> float:
        """Send the weights and prove that they arrived. Returns the probe's largest gap in nats; raises SyncError."""
        parts = self.parts
        parts.generator.sync(parts.weights(), version)
        return verify_sync(parts.generator, parts.probe, self._probe_logprobs(), parts.tolerance, version)

    def _probe_logprobs(self) -> list[float]:
        """The trainer's logprobs of the probe's tokens after the first, at temperature 1."""
        probe, module = self.parts.probe, self.parts.policy.module
        batch: Batch = collate([probe[:1]], [probe[1:]], self.parts.tokenizer.pad_token_id, distributed.device())
        temperature, module.temperature = module.temperature, 1.0
        try:
            logprobs, _ = policy_logprobs(self.parts.policy, batch, self.cfg.engine.micro_tokens)
        finally:
            module.temperature = temperature
        return [float(x) for x in logprobs[0]]

    def _check_gap(self, gap: float, step: int) -> None:
        """Sampler and trainer saw the same weights, so untruncated sampling must agree on every token."""
        sampling = self.cfg.rollout
        exact = sampling.top_p == 1.0 and sampling.top_k == 0
        if exact and gap > self.parts.tolerance:
            raise TrainingDiverged(
                f"step {step + 1}: rollout/logprob_gap is {gap:.2e} nats, above {self.parts.tolerance:.0e} (rollout.gap_tolerance): "
                "the sampler's logprobs are not the trainer's, so the update would train on another policy's samples."
            )

    def _metrics(self, rollouts: list[Rollout], scored: Scores, batch: TrainBatch, seconds: dict[str, float]) -> dict[str, float]:
        """Means over all ranks' responses or tokens; one reduction."""
        mask = batch.mask
        gap = torch.where(mask, (batch.rollout_logprobs - batch.old_logprobs).abs(), torch.zeros_like(batch.kl))
        kl = batch.kl.sum(1)
        total = torch.tensor(scored.total, dtype=torch.float64)
        sums: dict[str, float] = {
            "responses": len(rollouts),
            "tokens": float(mask.sum()),
            "scores": float(total.sum()),
            "scores_square": float(total.square().sum()),
            "kl": float(kl.sum()),
            "rlhf_reward": float(batch.rewards.sum()),
            "entropy": float(batch.entropy.sum()),
            "finished": sum(r.finish_reason == "stop" for r in rollouts),
            "returns": float(batch.returns[mask].double().sum()),
            "returns_square": float(batch.returns[mask].double().square().sum()),
            "residual": float((batch.returns - batch.values)[mask].double().sum()),
            "residual_square": float((batch.returns - batch.values)[mask].double().square().sum()),
        }
        sums |= {f"term:{name}": math.fsum(values) for name, values in scored.terms.items()}
        s = dict(zip(sums, distributed.all_sum(list(sums.values())), strict=True))
        n, tokens = s["responses"], max(s["tokens"], 1.0)
        spread = s["returns_square"] / tokens - (s["returns"] / tokens) ** 2
        residual = s["residual_square"] / tokens - (s["residual"] / tokens) ** 2
        largest_gap, rollout_s = distributed.all_max([float(gap.max()), seconds["time/rollout_s"]])
        metrics = {
            "objective/scores": s["scores"] / n,
            "objective/scores_std": math.sqrt(max(0.0, s["scores_square"] / n - (s["scores"] / n) ** 2)),
            "objective/kl": s["kl"] / n,
            "objective/kl_per_token": s["kl"] / tokens,
            "objective/rlhf_reward": s["rlhf_reward"] / n,
            "objective/entropy": s["entropy"] / tokens,
            "value/explained_variance": 1.0 - residual / spread if spread > 1e-12 else 0.0,
            "rollout/response_length": tokens / n,
            "rollout/response_tokens": s["tokens"],
            "rollout/finished": s["finished"] / n,
            "rollout/logprob_gap": largest_gap,
            "rollout/tokens_per_s": tokens / max(rollout_s, 1e-9),
        }
        return metrics | {f"reward/{name.removeprefix('term:')}": value / n for name, value in s.items() if name.startswith("term:")}

    def _sample_rows(self, rollouts: list[Rollout], scored: Scores, batch: TrainBatch, step: int) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for i, rollout in enumerate(rollouts[: self.stage.samples_kept]):
            terms = {name: values[i] for name, values in scored.terms.items()}
            rows.append(
                {"step": step + 1, "prompt": rollout.prompt.text, "response": rollout.text, "score": scored.total[i], **terms}
                | {"kl": float(batch.kl[i].sum()), "response_length": len(rollout.token_ids), "finish_reason": rollout.finish_reason}
            )
        return rows

    def _dump(self, rollouts: list[Rollout], scores: list[float] | None, batch: TrainBatch | None, step: int) -> Path:
        """Write the batch that stopped the run; returns where."""
        place = self.ctx.dir / f"diverged-step-{step + 1}-rank-{distributed.rank()}"
        place.mkdir(parents=True, exist_ok=True)
        with (place / "rollouts.jsonl").open("w", encoding="utf-8") as file:
            for i, r in enumerate(rollouts):
                row = {"prompt": r.prompt.text, "response": r.text, "token_ids": r.token_ids, "rollout_logprobs": r.rollout_logprobs}
                file.write(json.dumps(row | {"finish_reason": r.finish_reason, "score": None if scores is None else scores[i]}) + "\n")
        if batch is not None:
            save_file({n: t.detach().cpu().contiguous() for n, t in batch.tensors().items()}, str(place / "batch.safetensors"))
        return place

    def _save(self, step: int) -> None:
        """Resume state of all ranks, written to the side and renamed."""
        final = self.ctx.dir / "checkpoints" / f"step-{step}"
        side = final.with_name(final.name + ".part")
        self.parts.policy.save(side / "policy")
        self.parts.critic.save(side / "critic")
        if distributed.is_main():
            state = {"step": step, "kl": self.parts.kl.state_dict(), "moments": self.moments.state_dict(), "history": self.history}
            (side / "loop.json").write_text(json.dumps(state), encoding="utf-8")
            side.rename(final)
        distributed.barrier()

    def _load(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / "loop.json").read_text(encoding="utf-8"))
        self.parts.policy.load(checkpoint / "policy")
        self.parts.critic.load(checkpoint / "critic")
        self.first = state["step"]
        self.history = state["history"]
        self.parts.kl.load_state_dict(state["kl"])
        self.moments.load_state_dict(state["moments"])

    def _finish(self) -> None:
        parts, ctx = self.parts, self.ctx
        save_model(parts.policy.module.model, parts.tokenizer, ctx.dir / "model", parts.policy.gather)
        if parts.adapter:
            save_adapter(parts.policy.module.model, ctx.dir / "adapter", parts.policy.gather)
        window = max(1, min(5, len(self.history) // 2))
        metrics = {}
        for name in self.history[-1]:
            metrics[f"{name}_first"] = sum(h[name] for h in self.history[:window]) / window
            metrics[name] = sum(h[name] for h in self.history[-window:]) / window
        metrics["rollout/logprob_gap_max"] = max(h["rollout/logprob_gap"] for h in self.history)
        ctx.finish(
            steps=self.steps,
            metrics=metrics,
            model="model",
            figures={
                f"score, first {window} steps": f"{metrics['objective/scores_first']:.3f}",
                f"score, last {window} steps": f"{metrics['objective/scores']:.3f}",
                "KL per response (nats)": f"{metrics['objective/kl']:.2f}",
                "largest sampler-trainer gap (nats)": f"{metrics['rollout/logprob_gap_max']:.1e}",
            },
            next_command=f"python -m rlhf stage=eval run.name={ctx.cfg.run.name} stage.before={ctx.cfg.model.path} stage.after={ctx.dir / 'model'}",
        )
