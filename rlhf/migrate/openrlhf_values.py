"""Computations of OpenRLHF's options that need several of them."""

from typing import Any

from rlhf.migrate.shared import computed, impossible
from rlhf.migrate.tables import Answer, Settings, flag, number, whole


def reward(s: Settings, value: Any) -> Answer:
    """A reward by its address or its file."""
    text = str(value)
    if text.endswith(".py"):
        return impossible(
            f"{text}: its signature is another one; give pkg.module:function in reward.function"
        )
    note = "stage=serve_reward has another protocol than theirs"
    return computed({"reward.terms": {"remote": {"kind": "remote", "url": text}}}, note)


def correction(s: Settings) -> Answer:
    """The correction of what sampler and trainer differ by."""
    if not flag(s.get("algo.advantage.is_correction_enable") or False):
        return computed({"stage.importance_cap": None})
    kind = str(s.get("algo.advantage.is_correction_type") or "tis")
    low, high = s.get("algo.advantage.is_correction_threshold") or (0.5, 5.0)
    options: dict[str, Any] = {"stage.importance_cap": number(high)}
    options["stage.importance_mode"] = "truncate" if kind == "tis" else "mask"
    if kind != "tis":
        options["stage.importance_floor"] = number(low)
    options["stage.importance_level"] = "sequence" if kind.startswith("seq") else "token"
    return computed(options)


def schedule(s: Settings) -> Answer:
    """lr_scheduler with min_lr_ratio."""
    name = str(s.get("lr_scheduler"))
    if name not in ("cosine_with_min_lr", "cosine", "linear", "constant_with_warmup"):
        return impossible("the schedules are cosine, linear and constant, or our own")
    short = {"cosine_with_min_lr": "cosine", "constant_with_warmup": "constant"}.get(name, name)
    options: dict[str, Any] = {"stage.scheduler": short}
    if name == "cosine_with_min_lr":
        options["stage.min_rate"] = number(s.get("min_lr_ratio"))
    return computed(options)


def backend(s: Settings, value: Any) -> Answer:
    """Engines in the trainer's processes, or servers."""
    if flag(s.get("train.colocate_all") or False):
        return computed({"rollout": "vllm"}, "in the trainer's processes")
    return computed({"rollout": "server", "rollout.server.count": whole(value)})


def in_flight(s: Settings) -> Answer:
    """Weights that change while responses are written."""
    if flag(s.get("train.colocate_all") or False):
        return impossible("engines in the trainer's processes take turns with it")
    return computed({"rollout.in_flight": True})
