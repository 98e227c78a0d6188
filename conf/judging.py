"""Options of what judges answers, ``stage.llm_judge`` of ``stage=eval``, and of what looks at
reward models, ``stage=eval_reward``.
"""

import re
from dataclasses import dataclass

from conf.options import check, check_options, option

TEMPLATE = """Compare two answers to the same prompt.

{criteria}

The order in which the answers stand says nothing about them.

[Prompt]
{prompt}
[End of the prompt]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Which answer is better? Reply with [[A]], [[B]], or [[tie]] if they are equally good, and nothing \
else."""
CRITERIA = (
    "Prefer the answer that does what the prompt asks for, is correct, and leaves out what nobody "
    "asked for. A longer answer is not better for its length."
)
# what the template has to hold, beside {criteria}
_NEEDED = ("{prompt}", "{first}", "{second}")


@dataclass(slots=True, kw_only=True)
class LLMJudgeConfig:
    """A language model that reads two answers in both orders and names the better one."""

    path: str | None = option(
        None,
        "Model directory of a judge that runs here, by rollout.backend; null: url.",
        filled=True,
    )
    url: str | None = option(
        None,
        "Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; null: path.",
        filled=True,
    )
    model: str | None = option(None, "url: the model's name at the server.", filled=True)
    token_env: str | None = option(
        None, "url: environment variable that holds the bearer token; null: no token is sent."
    )
    timeout_s: float = option(120.0, "url: longest time for one reply.", unit="s", above=0)
    retries: int = option(3, "url: further attempts after a request that failed.", at_least=0)
    in_flight: int = option(
        8, "url: requests at the same time.", unit="requests", at_least=1, at_most=1024
    )
    template: str | None = option(
        None,
        "The question, with the fields {prompt}, {first}, {second} and {criteria}; the verdict is "
        "read from [[A]], [[B]] and [[tie]], or from a reply of that one word; null: that of "
        "docs/tasks/evaluation.md.",
        filled=True,
    )
    criteria: str = option(CRITERIA, "What makes an answer the better one.", filled=True)
    system: str | None = option(None, "System message before the question; null: none.")
    max_tokens: int = option(
        32,
        "Longest reply; a judge that reasons before its verdict needs more.",
        unit="tokens",
        at_least=1,
    )
    max_prompt_length: int = option(
        2048, "path: longest question; longer ones are counted.", unit="tokens", at_least=16
    )
    least_consistency: float = option(
        0.6,
        "Share of pairs with the same winner in both orders below which the judge ranks nobody; a "
        "coin reaches 0.5.",
        at_least=0,
        at_most=1,
    )
    most_unread: float = option(
        0.1,
        "Share of pairs without a clear verdict above which the judge ranks nobody.",
        at_least=0,
        at_most=1,
    )

    @property
    def question(self) -> str:
        """The template that is asked by."""
        return TEMPLATE if self.template is None else self.template

    def __post_init__(self) -> None:
        check_options(self, "stage.llm_judge")
        for field in _NEEDED:
            check(
                field in self.question,
                "stage.llm_judge.template",
                self.template,
                f"a question that holds {field}",
            )
        check(
            self.path is None or self.url is None,
            "stage.llm_judge.url",
            self.url,
            "null with stage.llm_judge.path: one judge, here or behind a server",
        )
        check(
            self.url is None or self.model is not None,
            "stage.llm_judge.model",
            self.model,
            "the model's name at the server with stage.llm_judge.url",
        )


# words of the report's tables that a model's name would stand beside
_TAKEN = ("section", "subset", "pairs", "length")


@dataclass(slots=True, kw_only=True)
class EvalRewardStage:
    """Looks at reward models: accuracy by subset, calibration, best-of-n, over-optimisation, and
    how far several agree.
    """

    name: str = option("eval_reward", "Name of the preset; stage=NAME sets it.")
    models: dict[str, str] = option(
        {}, "Reward models by name: directories that stage=reward wrote; empty: reward.path."
    )
    pairs: str | None = option(
        None,
        "Pairs that people judged (prompt, chosen, rejected, and where there is one subset); null: "
        "no accuracy, calibration and agreement.",
        filled=True,
    )
    bins: int = option(10, "Bins of confidence.", unit="bins", at_least=2, at_most=100)
    samples: str | None = option(
        None,
        "Several answers to each prompt (prompt, response), such as the samples.jsonl of "
        "stage=eval; null: no best-of-n.",
        filled=True,
        section="best of n",
    )
    proxy: str | None = option(
        None,
        "What the best is chosen by: one of the models, or a column of samples; null: the first "
        "model.",
        filled=True,
    )
    judge: str | None = option(
        None,
        "What values the best and never trained anything: another model, or a column of samples.",
        filled=True,
    )
    curve: str | None = option(
        None,
        "Rows of scores along a run, such as its metrics.jsonl; null: no over-optimisation.",
        filled=True,
        section="over-optimisation",
    )
    curve_kl: str = option(
        "objective/kl", "Column of curve: nats from the start.", unit="nats", filled=True
    )
    curve_proxy: str = option(
        "judge/proxy", "Column of curve: the score that trained the policy.", filled=True
    )
    curve_judge: str = option("judge/score", "Column of curve: the judge's score.", filled=True)
    bootstrap: int = option(1000, "Resamples for 95 % intervals.", unit="resamples", at_least=1)

    def __post_init__(self) -> None:
        check_options(self, "stage")
        for name in self.models:
            check(
                re.fullmatch(r"[A-Za-z0-9_.-]+", name) is not None and name not in _TAKEN,
                "stage.models",
                name,
                f"names of letters, digits and _.- other than {', '.join(_TAKEN)}",
            )
        check(
            self.samples is None or self.judge is not None,
            "stage.judge",
            self.judge,
            "a column of stage.samples, or one of stage.models, with stage.samples",
        )
        check(
            self.judge is None or self.judge != self.proxy,
            "stage.judge",
            self.judge,
            "another scorer than stage.proxy",
        )
