"""An engine of one policy, and what it does for tasks: answers that end at texts, and the
log-probabilities of texts behind their prompts.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig
from eval.tasks.prompts import Scored
from policy.agreement import check_agreement
from policy.model import PolicyModule
from rlhf.models.directories import check_model_path
from rlhf.models.loading import load_causal_lm, starts_whole, write_whole
from rlhf.models.turns import response_text
from rlhf.stages.evaluation.policies import sequence_logprobs
from rlhf.types import Generator, Prompt
from rollout.sampling import Sampling

# Tokens between two looks for the texts that end an answer: vLLM keeps what it has computed of a
# prompt, so that a look costs little.
_LOOK = 32


@contextlib.contextmanager
def engine_of(
    model: ModelConfig, tokenizer: Any, make: Callable[..., Generator], start: Path
) -> Iterator[Generator]:
    """An engine of a policy, and its end. An adapter or a GGUF file is first written to `start` as
    a whole model, which engines need. make: `rollout.make_generator` for its lengths.
    """
    folder = Path(str(model.path)).expanduser()
    held = check_model_path(model.path)
    if held.is_native:
        path = held.weights
    elif starts_whole(model):
        path = str(folder) if folder.is_dir() else str(model.path)
    else:
        path = write_whole(load_causal_lm(model, tokenizer), tokenizer, start)
        model = dataclasses.replace(
            model,
            path=path,
            gguf_file=None,
        )
    try:
        generator = make(
            model_path=path,
            tokenizer=tokenizer,
            model_factory=lambda: load_causal_lm(
                model,
                tokenizer,
                native=True,
            ),
            native=held.is_native,
        )
        try:
            yield generator
        finally:
            generator.close()
    finally:
        shutil.rmtree(start, ignore_errors=True)


# ---- answers ----


@dataclass(frozen=True, slots=True)
class Wanted:
    """An answer to write."""

    name: str  # of its task, row and sample: its random numbers hang on it
    prompt: tuple[int, ...]  # token ids
    limit: int  # tokens
    stops: tuple[str, ...]  # texts that end it
    chat: bool


@dataclass(slots=True)
class Written:
    """An answer, while it is written and when it is done."""

    text: str = ""  # without the text that stopped it
    ids: list[int] = field(default_factory=list)
    finished: bool = False  # no limit cut it


def write_answers(
    generator: Any,
    tokenizer: Any,
    wanted: Sequence[Wanted],
    sampling: Sampling | None,
    seed: int,
) -> list[Written]:
    """The answers, in order. `sampling` None: greedy.

    Where texts end an answer the engine is asked for a few tokens at a time.
    """
    if sampling is not None:
        generator.sampling = sampling
    written = [Written() for _ in wanted]
    live = list(range(len(wanted)))
    while live:
        prompts = [_prompt(wanted[number], written[number]) for number in live]
        found = generator.generate(
            prompts,
            n=1,
            seed=seed,
            greedy=sampling is None,
        )
        still = []
        for number, rollout in zip(
            live,
            found,
            strict=True,
        ):
            one, asked = written[number], wanted[number]
            one.ids += rollout.token_ids
            one.text = response_text(
                tokenizer,
                one.ids,
                chat=asked.chat,
            )
            text = up_to(one.text, asked.stops)
            one.finished = rollout.finish_reason == "stop" or text is not None
            one.text = one.text if text is None else text
            if not one.finished and len(one.ids) < asked.limit:
                still.append(number)
        live = still
    return written


def _prompt(asked: Wanted, written: Written) -> Prompt:
    """What the engine goes on from."""
    left = asked.limit - len(written.ids)
    limit = min(left, _LOOK) if asked.stops else left
    ids = (*asked.prompt, *written.ids)
    source: Any = [] if asked.chat else ""
    return Prompt(
        f"{asked.name}/{len(written.ids)}",
        "",
        ids,
        source,
        limit=limit,
    )


def up_to(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the `stops` in it; None where it holds none."""
    places = [text.find(stop) for stop in stops]
    found = [place for place in places if place >= 0]
    return text[: min(found)] if found else None


# ---- log-probabilities ----


Likelihoods = Callable[[Sequence[Scored]], list[float]]


def likelihoods_by(
    generator: Any, *, pad_id: int, micro_tokens: int, logits_chunk: int, key: str
) -> Likelihoods:
    """What gives log p(ids | context) in nats of each text, in order, at temperature 1. `key`: what
    names the policy in errors. Raises UserError for a model that can't be read in batches.
    """
    if hasattr(generator, "logprobs_behind"):
        return lambda scored: _by_vllm(generator, scored)
    model = generator.model
    if hasattr(model, "peft_config"):  # stands beside its base, which batches would leave bare
        return lambda scored: [_alone(generator, one) for one in scored]
    module = PolicyModule(model, chunk=logits_chunk)
    check_agreement(module, micro_tokens, key)

    def in_batches(scored: Sequence[Scored]) -> list[float]:
        prompts = [one.context for one in scored]
        texts = [one.ids for one in scored]
        found = sequence_logprobs(
            module,
            prompts,
            texts,
            pad_id=pad_id,
            micro_tokens=micro_tokens,
        )
        return [float(values.double().sum()) for values in found]

    return in_batches


def _alone(generator: Generator, one: Scored) -> float:
    return sum(generator.logprobs([*one.context, *one.ids])[-len(one.ids) :])


def _by_vllm(generator: Any, scored: Sequence[Scored]) -> list[float]:
    """Texts of one token behind the same context are asked for at once, without the logprobs of
    the context itself, which vLLM can't share among prompts.
    """
    short: dict[tuple[int, ...], list[int]] = {}
    for one in scored:
        if len(one.ids) == 1:
            short.setdefault(one.context, []).append(one.ids[0])
    next_ids = [list(dict.fromkeys(ids)) for ids in short.values()]
    found = generator.logprobs_behind(
        list(short),
        next_ids,
        whole=False,
    )
    known: dict[tuple[tuple[int, ...], int], float] = {}
    for context, ids, values in zip(
        short,
        next_ids,
        found,
        strict=True,
    ):
        known |= {
            (context, token): value
            for token, value in zip(
                ids,
                values,
                strict=True,
            )
        }
    long = [one for one in scored if len(one.ids) > 1]
    sequences = [[*one.context, *one.ids] for one in long]
    whole = generator.logprobs_behind(
        [ids[:-1] for ids in sequences], [ids[-1:] for ids in sequences]
    )
    sums = iter(
        sum(v[-len(one.ids) :])
        for one, v in zip(
            long,
            whole,
            strict=True,
        )
    )
    return [known[one.context, one.ids[0]] if len(one.ids) == 1 else next(sums) for one in scored]
