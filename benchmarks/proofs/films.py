"""The proof of the demo that reads as English: the chain on questions about films, every figure
held against its bound, and how likely the untouched chat model finds the answers.

python -m benchmarks.proofs.films                        runs and checks (about 15 minutes a seed on
two idle cores) python -m benchmarks.proofs.films --check-only --seeds 0        checks the run that
is there
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.proofs.common import Check, MissingRun, prove_seeds, read_run
from conf.choices import Dtype
from conf.schema import ModelConfig
from rlhf.data.recipes.smollm2 import MODEL_FOLDER
from rlhf.models.loading import load_causal_lm, load_tokenizer

EXPERIMENT = "films"
STAGES = ("sft", "reward", "grpo", "eval")
MAX_WALL_S = 15 * 60
MAX_RSS_MB = 8 * 1024
MAX_GAP = 1e-3  # nats between vLLM and the trainer
ENGLISH = 0.3  # nats a token by which the untouched model may find the answers less likely
_BATCH = 16  # answers of one pass


def check_run(folder: Path) -> list[Check]:
    """Every bound of the demo on the run directories of one seed. Raises MissingRun for a stage
    that has not finished.
    """
    chain = read_run(folder / "chain")
    runs = {stage: read_run(folder / stage) for stage in STAGES}
    reward, grpo, evaluation = runs["reward"], runs["grpo"], runs["eval"]
    before, after = english(folder)
    return [
        Check("reward model's accuracy on held-out pairs", reward.metric("eval/accuracy"), low=0.8),
        Check(
            "held-out score up, in standard deviations of SFT's",
            evaluation.metric("eval/score_shift_sd"),
            low=0.5,
        ),
        Check(
            "lexicon judge's difference, lower bound",
            evaluation.metric("eval/lexicon_low"),
            low=0.0,
            strict=True,
        ),
        Check(
            "classifier judge's difference, lower bound",
            evaluation.metric("eval/classifier_low"),
            low=0.0,
            strict=True,
        ),
        Check(
            "answers that name what was asked, difference",
            evaluation.metric("eval/function_delta"),
            low=-0.1,
        ),
        Check("KL, nats per response token", evaluation.metric("eval/kl_per_token"), high=1.0),
        Check("distinct-2, share of SFT's", evaluation.metric("eval/distinct_2_ratio"), low=0.7),
        Check(
            "logprob by the untouched model, nats a token, difference",
            after - before,
            low=-ENGLISH,
        ),
        Check(
            "largest rollout/logprob_gap of all steps, nats",
            max(grpo.series("rollout/logprob_gap")),
            high=MAX_GAP,
            strict=True,
        ),
        Check(
            "peak memory of any stage, MiB",
            max(float(run.summary["peak_rss_mb"]) for run in runs.values()),
            high=MAX_RSS_MB,
            strict=True,
        ),
        Check("wall time of the chain, s", float(chain.summary["wall_s"]), high=MAX_WALL_S),
    ]


def english(folder: Path) -> tuple[float, float]:
    """Mean log-probability of a token of the answers before and after, nats, by the chat model as
    it came out of its package. A repetition is likely to a model too, so this stands beside the
    diversity and never alone. Raises MissingRun.
    """
    samples = folder / "eval" / "samples.jsonl"
    if not samples.is_file():
        raise MissingRun(f"{samples}: no such file, so stage=eval has not finished")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    source = ModelConfig(path=str(folder / "recipe" / MODEL_FOLDER), dtype=Dtype.float32)
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, tokenizer).eval()
    return (
        mean_logprob(model, tokenizer, [(row["prompt"], row["response_before"]) for row in rows]),
        mean_logprob(model, tokenizer, [(row["prompt"], row["response"]) for row in rows]),
    )


@torch.inference_mode()
def mean_logprob(
    model: torch.nn.Module, tokenizer: object, texts: Sequence[tuple[str, str]]
) -> float:
    """Mean log-probability of a token of the answers, nats, over all tokens of all answers;
    `texts` are prompts and answers. NaN where no answer has a token.
    """
    total, count = 0.0, 0
    for start in range(0, len(texts), _BATCH):
        for logprobs in _answer_logprobs(model, tokenizer, texts[start : start + _BATCH]):
            total += float(logprobs.sum())
            count += len(logprobs)
    return total / count if count else math.nan


def _answer_logprobs(
    model: torch.nn.Module, tokenizer: object, texts: Sequence[tuple[str, str]]
) -> Iterator[Tensor]:
    """The log-probabilities of each answer's tokens [T], nats."""
    assert callable(tokenizer)
    sides = [
        (
            tokenizer(prompt, add_special_tokens=False)["input_ids"],
            tokenizer(answer, add_special_tokens=False)["input_ids"],
        )
        for prompt, answer in texts
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in sides)
    ids = torch.zeros(len(sides), longest, dtype=torch.long)  # [B, L], padded on the right
    for row, (prompt, answer) in enumerate(sides):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    logits = model(input_ids=ids).logits  # [B, L, V]; causal, so padding behind changes nothing
    for row, (prompt, answer) in enumerate(sides):
        first, end = len(prompt) - 1, len(prompt) + len(answer) - 1
        logprobs = torch.log_softmax(logits[row, first:end].float(), dim=-1)  # [T, V]
        yield logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]


def main(arguments: Sequence[str] | None = None) -> int:
    return prove_seeds(EXPERIMENT, check_run, arguments, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
