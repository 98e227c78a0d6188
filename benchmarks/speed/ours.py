"""Worker: this project's online loop, one step per request (`python -m benchmarks.speed.ours CASE
READ WRITE`).
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.shared import descendants, peak_mib
from benchmarks.speed.cases import Case
from benchmarks.speed.protocol import Figures, serve
from policy.model import base_of
from rlhf.cli import config
from rlhf.online.loop import Loop
from rlhf.online.setup import Parts, build
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.stages import methods
from rlhf.stages import rows as stage_rows


def overrides(case: Case, folder: Path) -> list[str]:
    """The case as command line options."""
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in case.prompts), encoding="utf-8"
    )
    return [
        "stage=grpo",
        *generator_options(case),
        "tracking=none",
        f"run.dir={folder}",
        f"model.path={case.model}",
        f"data.path={folder}/prompts.jsonl",
        f"data.eval_path={folder}/prompts.jsonl",
        "reward.function=benchmarks.speed.cases:distinct_words",
        f"stage.prompts_per_step={len(case.prompts)}",
        f"stage.samples_per_prompt={case.samples}",
        f"stage.learning_rate={case.learning_rate}",
        "stage.kl_coef=0.0",
        "stage.save_steps=0",  # as TRL's save_strategy="no"
        "stage.reference=false",
        f"rollout.max_response_length={case.max_response}",
        f"rollout.kv_cache_gib={case.kv_cache_gib}",
        f"rollout.max_num_seqs={len(case.prompts) * case.samples}",
        f"data.max_prompt_length={case.max_prompt}",
        f"engine.micro_tokens={case.micro_tokens}",
        *(
            ["adapter=lora", f"adapter.rank={case.rank}", f"adapter.alpha={2 * case.rank}"]
            if case.lora
            else []
        ),
    ]


def generator_options(case: Case) -> list[str]:
    """Who writes the responses, and when."""
    if case.way == "turns":
        return ["rollout=vllm"]
    if case.way == "here":  # a thread for each side
        return ["rollout=vllm", "stage.ahead=1", "engine.threads=1"]
    cores = ",".join(f"'{cores}'" for cores in case.server_cores)
    return [
        "rollout=server",
        f"rollout.server.count={len(case.server_cores)}",
        f"rollout.server.cores=[{cores}]",
        "rollout.server.threads=1",
        "engine.threads=1",
        f"stage.ahead={int(case.way == 'ahead')}",
    ]


def bare_pass(
    module: Any, rows: int, prompt_tokens: int, response_tokens: int, *, budget: int
) -> float:
    """Seconds of forward and backward alone over as many real tokens: no padding, no optimizer, the
    head at response tokens only, cross-entropy.

    The tokens of all `rows` are laid out as rectangles of the mean row, at most `budget` tokens at
    a time.
    """
    lm = base_of(module.model)
    backbone, device = getattr(lm, lm.base_model_prefix), distributed.device()
    total = prompt_tokens + response_tokens
    length = max(2, round(total / rows))
    module.train()
    seconds, left = 0.0, total
    while left > 0:
        tokens = min(left, max(1, budget // length) * length)
        ids = torch.randint(
            0, lm.config.vocab_size, (max(1, round(tokens / length)), length), device=device
        )
        answered = min(ids.numel(), round(ids.numel() * response_tokens / total))
        labels = torch.randint(0, lm.config.vocab_size, (answered,), device=device)
        began = time.perf_counter()
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[:answered]
        F.cross_entropy(
            lm.get_output_embeddings()(hidden).float(), labels, reduction="sum"
        ).backward()
        seconds += time.perf_counter() - began
        left -= tokens
    for parameter in module.parameters():
        parameter.grad = None
    return seconds


def main() -> None:
    methods.register()
    case, folder = Case.load(sys.argv[1]), Path(tempfile.mkdtemp(prefix="bench-"))
    cfg = config.compose(overrides(case, folder))
    distributed.set_threads(cfg.engine.threads)
    ctx = RunContext.open(cfg, ())
    parts = build(ctx, stage_rows)
    with contextlib.closing(parts.generator):
        if case.trainer_core is not None:
            pin(case.trainer_core)
        loop = Loop(ctx, parts)
        parts.sync.send(0)
        numbers = itertools.count()
        # one ahead, a step ends when the next one's responses are there
        serve(lambda: measured(case, parts, loop.one_step(next(numbers))[0]))


def pin(core: int) -> None:
    """Keep every thread of this process on a core; those that it starts later, too."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), [core])


def measured(case: Case, parts: Parts, metrics: Mapping[str, float]) -> Figures:
    """The figures of a step, and of a bare pass over as many tokens."""
    prompt_tokens = sum(len(p.token_ids) for p in parts.prompts) * case.samples
    response_tokens = round(metrics["rollout/response_tokens"])
    rows = len(case.prompts) * case.samples
    bare = bare_pass(
        parts.models.policy.module,
        rows,
        prompt_tokens,
        response_tokens,
        budget=case.micro_tokens,
    )
    return {
        "step_s": metrics["time/step_s"],
        # one ahead, time/rollout_s is the wait for what was written meanwhile
        "rollout_s": response_tokens / metrics["rollout/tokens_per_s"],
        "update_s": metrics["time/prepare_s"] + metrics["time/update_s"],
        "sync_s": metrics["time/sync_s"],
        "response_tokens": float(response_tokens),
        "update_tokens": float(prompt_tokens + response_tokens),
        "bare_s": bare,
        # one ahead, no token is of the newest weights
        "gap": metrics.get("rollout/logprob_gap", metrics["rollout/probe_gap"]),
        "servers_mb": sum(map(peak_mib, descendants(os.getpid()))),
    }


if __name__ == "__main__":
    main()
