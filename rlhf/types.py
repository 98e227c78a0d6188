"""Records that stages pass around and the protocols that backends fulfil. Shapes: B responses, T
response tokens.
"""

import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Required, TypedDict, runtime_checkable

if TYPE_CHECKING:  # for annotations only: the command line's list and help need no torch
    import datasets
    import torch

    from conf.schema import Config


class UserError(Exception):
    """Bad input: the message names the place and the remedy. The command line prints it without a
    traceback.
    """


class RowError(ValueError):
    """Why a row doesn't fit: the key, what was expected, and what the row holds instead."""


class TrainingDiverged(UserError):
    """NaN or infinity in a loss, a reward or a gradient; the message names the file that holds the
    batch.
    """


class NonFiniteScore(UserError):
    """A score is no finite number; the message names the reward and the prompt."""


class Interrupted(Exception):
    """A signal ended the run after a whole step, which is saved; `code` is the process's exit code
    (130 after Ctrl-C, 143 after SIGTERM).
    """

    def __init__(
        self, number: int, step: int, checkpoint: Path, go_on: str = "Go on with run.resume=true."
    ) -> None:
        self.code = 128 + number
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} after step {step}, which is saved in {checkpoint}. {go_on}"
        )


class SyncError(UserError):
    """The generator's weights are not the trainer's; the message names the parameter or the
    probe.
    """


# Where a picture stands in the text of a message: U+FFFC, Unicode's "object replacement". One for
# each of the message's `images`, in their order. A text that holds the character itself can't stand
# beside pictures.
PICTURE_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


class Picture(TypedDict):
    """A picture of a row: a file that was opened and measured when the row was read."""

    path: str  # absolute
    sha256: str  # of the file's bytes
    width: int  # pixels
    height: int  # pixels


class Message(TypedDict, total=False):
    """One turn of a conversation. Keys beside these are kept too: the tokenizer's chat template
    gets the whole message.
    """

    role: Required[str]  # system, developer, user, assistant or tool
    content: Required[str]  # "" where a turn holds calls alone
    tool_calls: list[dict[str, Any]]  # as OpenAI has them; arguments as an object
    tool_call_id: str  # which call a tool's message answers
    name: str  # of the tool that answers, or of the speaker
    reasoning_content: str  # what the assistant thought before it answered
    train: bool  # false: this assistant's turn is context only
    images: list[Picture]  # where `content` holds a PICTURE_MARK


# Columns of encoded rows that reach the loss: what a row weighs, and the probability that a pair's
# chosen answer is the better one.
WEIGHT, SOFT_LABEL = "weight", "soft_label"
# Column of encoded rows of a picture model: the row's pictures in the order of their tokens, as
# JSON. TRL takes a row with a column "images" for one of its own.
PICTURES = "pictures"

# What a template shows of the functions that may be called: JSON schemas, as OpenAI has them.
Tools = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, already tokenised with the policy's template."""

    id: str  # groups the responses to one prompt
    text: str  # what the tokens say (template applied)
    token_ids: tuple[int, ...]  # [P]
    source: object = None  # the row's own prompt: a string, or a list of messages
    # the row's other columns, for reward functions
    fields: dict[str, object] = field(default_factory=dict)
    tools: Tools | None = None  # that its template showed
    # most tokens of its response, where that is less than rollout.max_response_length
    limit: int | None = None
    images: tuple[Picture, ...] = ()  # in the order of their tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of an episode: what the policy wrote, and what its environment made of it."""

    start: int  # index into the response's tokens of the turn's first written token
    end: int  # behind its last one; up to the next turn's start the environment wrote
    text: str  # that the policy wrote, as `Rollout.text`
    reward: float  # that the environment gave for it
    observation: str  # the environment's answer as the tokens say it; "" where the episode ended
    said: str = ""  # the same in the environment's own words, without what the template adds
    # seconds that the environment took for it; no two runs agree, so turns are equal without it
    took_s: float = field(default=0.0, compare=False)


@dataclass(slots=True)
class Rollout:
    """One response as the sampler wrote it; of an episode, all turns after the first prompt."""

    prompt: Prompt
    # without the tokens that end, pad or begin it; others, such as <think>, stay; of an episode the
    # last turn's
    text: str
    token_ids: list[int]  # [T], with the token that ended it where the policy wrote one
    # [T] nats, under the sampling distribution; 0 at tokens that an environment wrote
    rollout_logprobs: list[float]
    # "stop": the policy ended it, or the episode is done; "length": it hit the limit of tokens;
    # "turns" and "time": an episode hit its limit of turns, or its environment that of time
    finish_reason: str
    version: int  # weight version that wrote it; of several the oldest
    # [T] the version of each token, where weights changed in the middle; None: all of `version`
    versions: list[int] | None = None
    turns: tuple[Turn, ...] = ()  # of an episode; empty: one answer, all of it written
    success: bool | None = None  # what the environment says of the episode; None: it doesn't
    # what the environment counted, such as broken calls: sums over the turns, by name
    info: dict[str, float] = field(default_factory=dict)
    # what scorers have begun to find out about it, each its own (`Scorer.begin`)
    begun: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def truncated(self) -> bool:
        """Whether a limit ended it."""
        return self.finish_reason != "stop"

    @property
    def written(self) -> list[bool]:
        """[T]: whether the policy wrote the token, rather than an environment."""
        if not self.turns:
            return [True] * len(self.token_ids)
        out = [False] * len(self.token_ids)
        for turn in self.turns:
            out[turn.start : turn.end] = [True] * (turn.end - turn.start)
        return out

    @property
    def length(self) -> int:
        """How many tokens the policy wrote."""
        if not self.turns:
            return len(self.token_ids)
        return sum(turn.end - turn.start for turn in self.turns)


@dataclass(slots=True)
class Scores:
    """Scores per response: the total that trains, and each term apart. All lists have length B."""

    total: list[float]
    terms: dict[str, list[float]]  # raw, before weights
    # what a scorer tells beside its score, such as <term>_spread of an ensemble
    extras: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One judgement: `chosen` is better than `rejected` as an answer to `prompt`."""

    prompt: object  # string or messages; "" when the texts are whole
    chosen: object
    rejected: object
    margin: float | None = None
    weight: float | None = None  # in the loss; None: like every other row
    soft_label: float | None = None  # probability that `chosen` is better; None: it is
    tools: Tools | None = None  # functions that both answers may call


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer judged by itself: `completion` is a good answer to `prompt`, or a bad one."""

    prompt: object  # string or messages; "" when the text is whole
    completion: object
    good: bool
    weight: float | None = None  # in the loss; None: like every other row
    tools: Tools | None = None  # functions that the answer may call


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """What a stage on TRL's trainers trains on: rows of token ids, and the tokenizer that made
    them.
    """

    tokenizer: Any
    train: "datasets.Dataset"
    held_out: "datasets.Dataset | None"  # None: data.eval_fraction=0 holds none out
    longest: int  # tokens of the longest sequence that a trainer builds of these rows
    files: tuple[Path, ...]  # that were read
    contexts: tuple[list[int], ...] = ()  # token ids that the trained policy's samples go on from
    conversational: bool = False  # conversations rather than texts
    shown: tuple[list[Picture], ...] = ()  # the pictures of each of `contexts`; empty: none


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """What an online stage samples responses to, and the tokenizer of its policy."""

    tokenizer: Any
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]  # for the watch's judge; empty where it has none
    files: tuple[Path, ...]  # that were read


class RowReader(Protocol):
    """Reads a stage's files and encodes their rows, before the stage loads any weights. The one
    there is: rlhf/stages/rows.py. So nothing that trains depends on formats of files.
    """

    def read_rows(self, cfg: "Config", micro: int) -> EncodedRows:
        """Rows for a stage on TRL's trainers, `micro` of them in a forward pass. Raises
        UserError.
        """
        ...

    def read_prompts(self, cfg: "Config") -> EncodedPrompts:
        """Prompts for an online stage. Raises UserError."""
        ...


@dataclass(frozen=True, slots=True)
class FullWeights:
    """All weights, one at a time: a collective under ZeRO-3, so every rank consumes the whole
    iterator.
    """

    # transformers' state-dict names, tied tensors under each name
    tensors: "Iterable[tuple[str, torch.Tensor]]"
    # names of tensors that are not sent: they don't train, so a generator has them from its start
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter of whatever kind: PEFT's state dict (its save format's names), frozen parts of it
    too, and the fields of its adapter_config.json.
    """

    tensors: "dict[str, torch.Tensor]"
    config: dict[str, object]
    name: str = "policy"  # among several that a generator has


class Generator(Protocol):
    """Writes responses. Both backends start from a model directory and are updated by `sync`."""

    @property
    def version(self) -> int:
        """Of the weights that write."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        """`n` responses per prompt, in prompt order (all of a prompt's responses side by side)."""
        ...

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token_ids[i] | token_ids[:i]) in nats for i >= 1: length len(token_ids) - 1,
        temperature 1.
        """
        ...

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """Take over the trainer's weights."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Announcing(Protocol):
    """A generator that tells of each response as soon as it is whole."""

    arrived: Callable[[Rollout], None]


class Scorer(Protocol):
    """Scores responses; raises on anything that isn't a finite number and names the prompt."""

    def begin(self, rollout: Rollout) -> None:
        """This response is whole, others of its batch are still being written: a scorer may begin
        with it, in a thread of its own. What goes wrong is raised by `score`.
        """
        ...

    def score(self, rollouts: Sequence[Rollout]) -> Scores: ...

    def state_dict(self) -> dict[str, object]:
        """What a resumed run has to know, such as running statistics, as JSON can hold it."""
        ...

    def load_state_dict(self, state: dict[str, object]) -> None: ...


# What an environment answers: the text of a message, or messages of their own roles.
Observation = str | list[Message]


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment makes of one turn."""

    observation: Observation  # what the policy reads next; "" where the episode is done
    reward: float = 0.0
    done: bool = False
    # figures by name; "success" (true or false) says how the episode ended
    info: dict[str, object] = field(default_factory=dict)


class Environment(Protocol):
    """What a policy acts in for one episode. `reset` and `step` may be coroutines. What they raise
    stops the run: a reward of 0 would teach something.
    """

    def reset(self, row: Mapping[str, object], seed: int) -> "Observation | Awaitable[Observation]":
        """Begin an episode on the row of a prompt (its columns); returns what the policy reads
        after the prompt, "" where that is nothing. Episodes of one group get the same seed.
        """
        ...

    def step(self, text: str) -> "Step | Awaitable[Step]":
        """The policy wrote this turn."""
        ...

    def close(self) -> None:
        """The episode is over, or its limit ended it."""
        ...
