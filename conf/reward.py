"""The groups ``reward`` and ``environment``: what scores a response, and what answers it; and the
stages that compare policies and serve a reward model.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from conf.choices import Combine, FormatStyle, Isolation, Judge, LengthUnit, TermKind
from conf.judging import LLMJudgeConfig
from conf.options import MISSING, check, check_options, nested, option

# A term's name becomes a column of samples.jsonl and a metric, so it can't be one of theirs.
_TAKEN = (
    "step",
    "prompt",
    "response",
    "score",
    "kl",
    "response_length",
    "finish_reason",
    "clipped",
    "turns",
    "success",
)


@dataclass(slots=True, kw_only=True)
class RewardTerm:
    """One term of a composed reward: a kind, how it counts, and what the kind needs. To set an
    option that only other kinds read is an error (reward/terms.py).
    """

    kind: TermKind = option(MISSING, "What the term looks at.")
    weight: float = option(
        1.0,
        "Factor of the value after clip and normalise; 0: the term is logged, but trains nothing.",
    )
    clip: float | None = option(
        None,
        "Cut the raw value to [-clip, clip], before any statistics; null: do not cut it.",
        above=0,
    )
    normalise: bool = option(
        False,
        "In training, normalise by a running mean and standard deviation of the cut values, over "
        "all ranks.",
    )
    paths: list[str] = option(
        [],
        "Directories that stage=reward wrote; several are an ensemble, each put on the scale of "
        "its held-out scores first.",
        section="kind=model",
    )
    combine: Combine = option(Combine.mean, "How the scores of an ensemble become one.")
    spread_coef: float = option(
        1.0,
        "combine=pessimistic: standard deviations that are subtracted from the mean.",
        at_least=0,
    )
    function: str | None = option(
        None, "pkg.module:function with TRL's reward signature.", section="kind=function"
    )
    column: str | None = option(
        None,
        "Data column that a response is compared with; null: answer, schema, constraints, tests or "
        "metadata, by the kind.",
        section="kinds that compare a response with its row",
    )
    marker: str | None = option(
        None,
        "Where in the response the answer is: \\boxed{} takes its content, <tag> what follows up "
        "to </tag>, another text the rest of its line; null: by the kind.",
    )
    ignore_case: bool = option(True, "kind=exact: upper and lower case are equal.")
    ignore_punctuation: bool = option(True, "kind=exact: punctuation makes no difference.")
    tolerance: float = option(
        1e-6,
        "kind=numeric: largest difference, absolute and relative to the answer.",
        at_least=0,
    )
    letters: str = option("ABCDE", "kind=choice: the letters that an answer can be.")
    pattern: str | None = option(
        None,
        "Regular expression of Python; null with kind=regex: each row's own from column.",
        section="kind=regex, kind=format, kind=json_schema",
    )
    style: FormatStyle | None = option(None, "kind=format: a pattern by its name.")
    schema_file: str | None = option(
        None, "kind=json_schema: a JSON file; null: each row's own schema from column."
    )
    all_or_nothing: bool = option(
        False,
        "1 when all constraints or tests pass, else 0; false: the share that pass.",
        section="kind=instructions, kind=code",
    )
    time_limit_s: float = option(
        5.0,
        "kind=code: CPU time of each test; all tests of a response together have four times as "
        "much wall time.",
        unit="s",
        above=0,
    )
    memory_mb: int = option(
        512,
        "kind=code: address space of a process; Python itself needs 64 MB.",
        unit="MB",
        at_least=64,
    )
    isolation: Isolation = option(
        Isolation.auto, "kind=code: how the code is kept apart from the machine."
    )
    low: int | None = option(
        None,
        "Shortest length without a penalty, in units; null: no lower limit.",
        at_least=0,
        section="kind=length",
    )
    high: int | None = option(
        None, "Longest length without a penalty, in units; null: no upper limit."
    )
    ramp: int = option(
        32, "Units outside of low and high at which the value has fallen to -1.", at_least=1
    )
    unit: LengthUnit = option(LengthUnit.tokens, "What lengths are counted in.")
    url: str | None = option(
        None, "Address of a server such as stage=serve_reward.", section="kind=remote"
    )
    token_env: str | None = option(
        None, "Environment variable that holds the bearer token; null: no token is sent."
    )
    timeout_s: float = option(30.0, "Longest time that a request may take.", unit="s", above=0)
    retries: int = option(3, "Further attempts after a request that failed.", at_least=0)
    batch_size: int = option(64, "Responses in one request.", unit="responses", at_least=1)

    def check(self, key: str) -> None:
        """Check ranges; `key` is the term's dotted name, which it doesn't know by itself."""
        check_options(self, key)
        letters = (
            len(set(self.letters)) == len(self.letters) >= 2
            and self.letters.isalnum()
            and self.letters == self.letters.upper()
        )
        check(
            letters,
            f"{key}.letters",
            self.letters,
            "at least two different capital letters or digits",
        )
        low = self.low or 0
        check(
            self.high is None or self.high >= low, f"{key}.high", self.high, f"at least low={low}"
        )


@dataclass(slots=True, kw_only=True)
class RewardConfig:
    """What scores a response: a reward model's directory, a function with TRL's reward signature,
    or a weighted sum of terms.
    """

    path: str | None = option(None, "Directory of a reward model that stage=reward wrote.")
    function: str | None = option(
        None,
        "pkg.module:function, called as f(prompts=..., completions=...), that returns a list of "
        "numbers.",
    )
    terms: dict[str, RewardTerm] = option(
        {}, "Weighted terms by name; the name becomes the metric reward/<name>."
    )
    batch_tokens: int = option(8192, "Tokens that are scored together.", unit="tokens", at_least=1)

    def __post_init__(self) -> None:
        check_options(self, "reward")
        for name, term in self.terms.items():
            check(
                re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None,
                "reward.terms",
                name,
                "names of letters, digits and _",
            )
            check(
                name not in _TAKEN,
                "reward.terms",
                name,
                f"a name beside those of samples.jsonl and the metrics ({', '.join(_TAKEN)})",
            )
            term.check(f"reward.terms.{name}")


class EnvironmentKind(Enum):
    """What answers the policy."""

    none = "none"  # nothing: a response is one turn
    python = "python"  # a class of one's own
    tools = "tools"  # functions that the policy calls
    reasoning_gym = "reasoning_gym"
    textarena = "textarena"
    gymnasium = "gymnasium"
    http = "http"  # a server


class OnTimeout(Enum):
    """What follows where an environment takes longer than its limit."""

    end = "end"  # the episode ends as truncated, and is counted
    stop = "stop"  # the run stops


class TurnCredit(Enum):
    """Where the rewards of an episode's turns stand."""

    episode = "episode"  # their sum at the last token that the policy wrote
    turn = "turn"  # each at its own turn's last token


@dataclass(slots=True, kw_only=True)
class EnvironmentConfig:
    """What a policy acts in, turn by turn, and the limits of an episode."""

    kind: EnvironmentKind = option(
        EnvironmentKind.none, "What answers the policy; none: a response is one turn."
    )
    max_turns: int = option(8, "Most turns of the policy in an episode.", unit="turns", at_least=1)
    max_tokens: int = option(
        2048,
        "Most tokens of an episode behind its prompt, those of the environment included.",
        unit="tokens",
        at_least=1,
    )
    step_limit_s: float = option(
        30.0, "Longest time that the environment may take for one answer.", unit="s", above=0
    )
    on_timeout: OnTimeout = option(
        OnTimeout.end, "What follows where the environment takes longer."
    )
    workers: int = option(
        16,
        "Environments that answer at the same time.",
        unit="environments",
        at_least=1,
    )
    path: str | None = option(
        None, "pkg.module:Class of an environment of one's own.", filled=True, section="kind=python"
    )
    options: dict[str, Any] = option(
        {},
        "Arguments of the environment's class or of the game, by name; of kind=tools: answer, the "
        "column of the answer that an episode has to end with.",
    )
    tools: list[str] = option(
        [],
        "What the policy may call: calculator, python, lookup, shell, or pkg.module:function.",
        section="kind=tools",
    )
    files: str | None = option(
        None, "Directory that lookup reads and shell starts in.", filled=True
    )
    tool_limit_s: float = option(5.0, "CPU time of one call.", unit="s", above=0)
    tool_output: int = option(
        2000, "Most characters of one call's result; more is cut.", unit="characters", at_least=16
    )
    game: str | None = option(
        None,
        "The game's or the dataset's name.",
        filled=True,
        section="kind=reasoning_gym, kind=textarena, kind=gymnasium",
    )
    url: str | None = option(None, "Address of the server.", filled=True, section="kind=http")
    token_env: str | None = option(
        None, "Environment variable that holds the bearer token; null: no token is sent."
    )
    retries: int = option(3, "Further attempts after a request that failed.", at_least=0)

    def __post_init__(self) -> None:
        check_options(self, "environment")

    def most_written(self, response: int) -> int:
        """The most tokens that a policy writes in an episode whose turns have at most `response`
        tokens each; those of one turn with kind=none.
        """
        if self.kind is EnvironmentKind.none:
            return response
        return min(self.max_tokens, self.max_turns * response)

    def longest(self, turn: int) -> int:
        """Most tokens behind a prompt, where `turn` is the most that a policy writes at once."""
        return turn if self.kind is EnvironmentKind.none else self.max_tokens

    @property
    def longest_option(self) -> str:
        """The option that gives `longest`."""
        if self.kind is EnvironmentKind.none:
            return "rollout.max_response_length"
        return "environment.max_tokens"

    def check_complete(self) -> None:
        """What the kind needs is there. Raises ValueError."""
        needs = {
            EnvironmentKind.python: ("path", self.path),
            EnvironmentKind.tools: ("tools", self.tools or None),
            EnvironmentKind.textarena: ("game", self.game),
            EnvironmentKind.reasoning_gym: ("game", self.game),
            EnvironmentKind.gymnasium: ("game", self.game),
            EnvironmentKind.http: ("url", self.url),
        }
        if self.kind in needs:
            name, value = needs[self.kind]
            expected = f"a value with environment.kind={self.kind.value}"
            check(value is not None, f"environment.{name}", value, expected)


@dataclass(slots=True, kw_only=True)
class ServeRewardStage:
    """Serves the reward model of reward.path over HTTP, for reward terms of kind remote."""

    name: str = option("serve_reward", "Name of the preset; stage=NAME sets it.")
    host: str = option(
        "127.0.0.1",
        "Address to listen on; any other than this machine's own needs token_env.",
        filled=True,
    )
    port: int = option(8100, "Port; 0: any free one.", at_least=0, at_most=65535)
    token_env: str | None = option(
        None,
        "Environment variable that holds the bearer token; null: a token is made and printed at "
        "the start.",
    )
    max_batch: int = option(
        256,
        "Most items of one request, and of several requests that are scored together.",
        unit="items",
        at_least=1,
    )
    max_body_mib: float = option(16.0, "Largest request.", unit="MiB", above=0)
    max_waiting: int = option(
        64,
        "Requests that may wait for the model; more are answered with 503 and Retry-After.",
        unit="requests",
        at_least=1,
    )
    grace_s: int = option(
        30, "Time that open requests get after SIGTERM or Ctrl-C.", unit="s", at_least=1
    )
    log_every_s: float = option(10.0, "Time between lines of metrics.jsonl.", unit="s", above=0)

    def __post_init__(self) -> None:
        check_options(self, "stage")
        check(
            self.host in ("127.0.0.1", "localhost", "::1") or self.token_env is not None,
            "stage.token_env",
            self.token_env,
            f"the name of an environment variable with stage.host={self.host}",
        )


@dataclass(slots=True, kw_only=True)
class EvalStage:
    """Two policies on the same held-out prompts: reward model, outside judges, KL, length,
    diversity.
    """

    name: str = option("eval", "Name of the preset; stage=NAME sets it.")
    before: str | None = option(None, "Model directory of the starting policy.")
    after: str | None = option(None, "Model directory of the trained policy.")
    policies: dict[str, str] = option(
        {}, "Further model directories by name, for tasks and the judge llm."
    )
    lm_eval: bool = option(False, "Write the tasks for lm-eval into the run directory too.")
    prompts: int = option(256, "Held-out prompts.", unit="prompts", at_least=2)
    samples_per_prompt: int = option(
        1, "Responses of each policy to a prompt.", unit="responses", at_least=1
    )
    greedy: bool = option(
        False,
        "Take the most likely token each time instead of sampling; KL is then measured along these "
        "responses.",
    )
    judges: list[Judge] = option([], "Judges from outside, beside the reward model.")
    judge_path: str | None = option(
        None, "Labelled texts (text, label) that train the judge classifier."
    )
    judge_function: str | None = option(None, "pkg.module:function of the judge function.")
    llm_judge: LLMJudgeConfig = nested(LLMJudgeConfig)
    bootstrap: int = option(1000, "Resamples for 95 % intervals.", unit="resamples", at_least=1)
    shown: int = option(4, "Samples shown side by side.", unit="samples", at_least=0)

    def __post_init__(self) -> None:
        check_options(self, "stage")
        check(
            not self.greedy or self.samples_per_prompt == 1,
            "stage.samples_per_prompt",
            self.samples_per_prompt,
            "1 with greedy=true, whose responses are all the same",
        )
