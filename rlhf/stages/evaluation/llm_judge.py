"""The judge ``llm`` of ``stage=eval``: a language model, here or behind a server, reads every two
policies' answers in both orders.
"""

import dataclasses
import gc
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from conf.judging import LLMJudgeConfig
from conf.schema import AdapterConfig, Config, EnvironmentConfig, ModelConfig
from eval.pairwise.asking import Judge, Wording, judge_pairs, pairs_of
from eval.pairwise.kept import KeptReplies
from eval.pairwise.rates import Bounds
from eval.pairwise.server import Address, ServerJudge
from eval.pairwise.summary import judgement, rows_of, section
from eval.pairwise.verdicts import Pair
from eval.sections import Section
from rlhf.checks import inputs
from rlhf.models.directories import check_model_path, contents
from rlhf.models.encoding import prompt_ids, require_template
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.process.files import fingerprint
from rlhf.process.http import bearer_token, checked_url
from rlhf.types import Generator, Message, Prompt, Rollout, UserError
from rollout import make_generator

LOG = logging.getLogger("rlhf.stages.eval")
NAME = "llm"  # of the judge in metrics
KEY = "stage.llm_judge"
REPLIES_FILE, JUDGEMENTS_FILE = "judge_replies.jsonl", "judgements.jsonl"


class HasRun(Protocol):
    """What judging takes of a run."""

    cfg: Config
    dir: Path


def check_llm_judge(options: LLMJudgeConfig) -> None:
    """There is a judge, here or behind a server, and it can be asked. Raises UserError."""
    if options.path is None and options.url is None:
        raise UserError(
            f"stage.judges holds llm, but neither {KEY}.path nor {KEY}.url is set: expected a "
            "model's directory, or an OpenAI-compatible server and its model's name."
        )
    if options.url is not None:
        checked_url(options.url, f"{KEY}.url")
        if options.token_env is not None:
            bearer_token(options.token_env, f"{KEY}.token_env")
        return
    assert options.path is not None
    check_model_path(options.path, f"{KEY}.path")
    tokenizer = load_tokenizer(ModelConfig(path=options.path))
    require_template(tokenizer, f"{KEY}.path={options.path}")
    (_, limit), *_ = inputs.directory_positions([("", options.path)])
    longest = options.max_prompt_length + options.max_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"{KEY}.max_prompt_length={options.max_prompt_length} + {KEY}.max_tokens="
            f"{options.max_tokens} = {longest} tokens are more than {options.path} reads "
            f"({limit}): lower one of them."
        )
    probe = Pair("", "?", ("", ""), ("one", "another"))
    try:
        prompt_ids(tokenizer, wording(options).messages(probe, swapped=False))
    except ValueError as error:
        raise UserError(
            f"{KEY}.path={options.path}: its chat template refuses the question: {error}. "
            f"Leave {KEY}.system out, if it is that."
        ) from error


def wording(options: LLMJudgeConfig) -> Wording:
    return Wording(options.question, options.criteria, options.system)


def server_judge(options: LLMJudgeConfig) -> ServerJudge:
    """The judge of ``url``. Raises UserError."""
    token = None
    if options.token_env is not None:
        token = bearer_token(options.token_env, f"{KEY}.token_env")
    assert options.model is not None
    address = Address(
        url=checked_url(options.url, f"{KEY}.url"),
        key=f"{KEY}.url",
        model=options.model,
        token=token,
        timeout_s=options.timeout_s,
        retries=options.retries,
        in_flight=options.in_flight,
        max_tokens=options.max_tokens,
        temperature=0.0,
    )
    return ServerJudge(address)


class LocalJudge:
    """A model of this machine; it loads with the first question, and takes the likeliest token each
    time.
    """

    def __init__(self, run: HasRun, options: LLMJudgeConfig) -> None:
        assert options.path is not None
        self._limit = options.max_prompt_length
        cfg = run.cfg
        model = dataclasses.replace(cfg.model, path=options.path, gguf_file=None)
        self._cfg = dataclasses.replace(
            cfg,
            model=model,
            adapter=AdapterConfig(),
            environment=EnvironmentConfig(),
            data=dataclasses.replace(cfg.data, max_prompt_length=options.max_prompt_length),
            rollout=dataclasses.replace(cfg.rollout, max_response_length=options.max_tokens),
        )
        self._tokenizer: Any = load_tokenizer(model)
        self._generator: Generator | None = None

    def _load(self) -> Generator:
        gc.collect()  # the policies are gone
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        path, model = str(self._cfg.model.path), self._cfg.model
        return make_generator(
            self._cfg,
            model_path=contents(path).weights,
            tokenizer=self._tokenizer,
            model_factory=lambda: load_causal_lm(model, self._tokenizer, native=True),
            native=not contents(path).loads_as_it_is,
        )

    def ask(self, questions: Sequence[list[Message]]) -> list[str | None]:
        """Replies; None to a question of more than max_prompt_length tokens."""
        prompts = []
        for number, question in enumerate(questions):
            ids = tuple(prompt_ids(self._tokenizer, question))
            prompts.append(Prompt(str(number), str(question[-1]["content"]), ids, source=question))
        readable = [prompt for prompt in prompts if len(prompt.token_ids) <= self._limit]
        replies: dict[str, str] = {}
        if readable:
            if self._generator is None:
                self._generator = self._load()
            written = self._generator.generate(readable, seed=0, greedy=True)
            replies = {rollout.prompt.id: rollout.text for rollout in written}
        return [replies.get(prompt.id) for prompt in prompts]

    def close(self) -> None:
        """Free the model's memory."""
        if self._generator is not None:
            self._generator.close()
        self._generator = None


def judge_policies(
    run: HasRun, answers: Mapping[str, Sequence[Rollout]]
) -> tuple[Section, dict[str, float]]:
    """The part of the report about who wins, and its metrics. `answers`: by policy, two or more, of
    the same prompts. Replies stand in judge_replies.jsonl, where a resumed run finds them, and
    verdicts in judgements.jsonl.
    """
    stage, seed = run.cfg.stage, run.cfg.run.seed
    options: LLMJudgeConfig = stage.llm_judge
    try:
        pairs = pairs_of(answers)
    except ValueError as error:
        raise UserError(
            f"stage.judges=[llm]: {error}: a tokenizer of theirs finds some prompts too long. "
            "Raise data.max_prompt_length, or leave longer prompts out."
        ) from error
    judge: Judge
    if options.url is not None:
        judge, identity = server_judge(options), [options.url, options.model]
    else:
        files = sorted(path for path in Path(str(options.path)).glob("*") if path.is_file())
        judge, identity = LocalJudge(run, options), [options.path, fingerprint(files)]
    kept = KeptReplies(judge, run.dir / REPLIES_FILE, [*identity, options.max_tokens])
    try:
        judged = judge_pairs(pairs, kept, wording(options))
    finally:
        if isinstance(judge, LocalJudge):
            judge.close()
    lines = [json.dumps(row) + "\n" for row in rows_of(judged)]
    (run.dir / JUDGEMENTS_FILE).write_text("".join(lines), encoding="utf-8")
    bounds = Bounds(options.least_consistency, options.most_unread)
    found = judgement(NAME, list(answers), judged, bounds, resamples=stage.bootstrap, seed=seed)
    if found.reasons:
        LOG.warning("The judge %s ranks nobody: %s.", NAME, "; ".join(found.reasons))
    about = f"{_named(options)} compared {len(pairs):,} pairs of answers, each in both orders."
    return section(found, judged, about, max(1, stage.shown)), found.metrics()


def _named(options: LLMJudgeConfig) -> str:
    if options.url is not None:
        return f"{options.model} at {options.url}"
    return str(options.path)
