"""Run by torchrun (tests/online/test_zero_online.py): stage=ppo under several engines and adapters
in one launch; metrics are left in the run directories.

arguments: folder, start model directory, then one `engine:adapter` and more each.
"""

import sys

from rlhf.cli import config
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.stages import methods
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from tests import drawing

SETTINGS = [
    "stage=ppo",
    "model=tiny",
    "rollout=hf",
    "data.max_prompt_length=32",
    "tracking=none",
    "stage.critic_init=policy",
    "reward.function=tests.toys:even_first_token",
    "rollout.max_response_length=6",
    "stage.prompts_per_step=8",
    "stage.steps=3",
    "stage.epochs=2",
    "stage.kl_coef=0.1",
    "stage.learning_rate=3e-3",
    "stage.critic_learning_rate=3e-3",
    "stage.save_steps=2",
    "engine.micro_tokens=40",
    "engine.logits_chunk=7",
    "adapter.rank=4",
    "stage.watch.judge_function=tests.toys:mostly_even",
    "stage.watch.judge_every=2",
    "stage.watch.judge_prompts=3",
]


def run(folder: str, start: str, described: str) -> None:
    """One run, `engine:adapter` and further overrides, in this process. Among them `family=F` for a
    start in the folder's F.
    """
    engine, adapter, *extra = described.split(":")
    family = next((e for e in extra if e.startswith("family=")), None)
    if family is not None:
        extra.remove(family)
        start = f"{folder}/{family.removeprefix('family=')}"
    name = described.replace(":", "-").replace("=", "_")
    overrides = [
        f"run.dir={folder}",
        f"run.name={name}",
        f"model.path={start}",
        f"data.path={folder}/prompts.jsonl",
        f"data.eval_path={folder}/held_out.jsonl",
        f"engine={engine}",
    ]
    preset = [e for e in extra if e.startswith("stage=")]
    settings = [*preset, *SETTINGS[1:]] if preset else SETTINGS
    cfg = config.compose(
        [*settings, *overrides, f"adapter={adapter}", *(e for e in extra if e not in preset)]
    )
    online_stage.run(RunContext.open(cfg, ()), stage_rows)


def main() -> None:
    methods.register()
    drawing.off()
    folder, start, *runs = sys.argv[1:]
    distributed.initialise()
    distributed.set_threads(1)
    for described in runs:
        run(folder, start, described)
    distributed.shutdown()


if __name__ == "__main__":
    main()
