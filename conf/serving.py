"""The options of stages that use a finished model: chat, serve, serve_rollout, registry and
gateway.
"""

from dataclasses import dataclass
from enum import Enum

from conf.options import check, check_options, option

_NAME = "Name of the preset; stage=NAME sets it."


@dataclass(slots=True, kw_only=True)
class ChatStage:
    """A conversation with a model in the terminal; two answers can be compared, and what is said
    becomes rows for training.
    """

    name: str = option("chat", _NAME)
    system: str | None = option(
        None, "System message; null: what the chat template says by itself.", filled=True
    )
    compare: str | None = option(
        None,
        "Model whose answer /compare shows beside the first's; null: a second answer of the same "
        "model.",
        filled=True,
    )
    greedy: bool = option(False, "Take the most likely token each time instead of sampling.")

    def __post_init__(self) -> None:
        check_options(self, "stage")
        check(
            not self.greedy or self.compare is not None,
            "stage.greedy",
            self.greedy,
            "false without stage.compare: one model's most likely answers are all the same",
        )


@dataclass(slots=True, kw_only=True)
class ServeStage:
    """Serves a run's model, or a model with several adapters by name, over vLLM's OpenAI-compatible
    API; rollout and data say how long prompts and answers may be.
    """

    name: str = option("serve", _NAME)
    model_name: str | None = option(
        None, "Name of the model in requests; null: run.name.", filled=True
    )
    adapters: dict[str, str] = option(
        {}, "Directories of LoRA adapters of the model, by the names that requests give as model."
    )
    host: str = option(
        "127.0.0.1",
        "Address to listen on; any other than this machine's own needs token_env.",
        filled=True,
    )
    port: int = option(8000, "Port; 0: any free one.", at_least=0, at_most=65535)
    token_env: str | None = option(
        None, "Environment variable with the key that requests need; null: a new key, printed once."
    )
    grace_s: int = option(
        10, "Time that the server gets to end after SIGTERM or Ctrl-C.", unit="s", at_least=1
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")


@dataclass(slots=True, kw_only=True)
class ServeRolloutStage:
    """Serves the policy of model.path by vLLM, for runs with rollout=server that name its URL in
    rollout.servers.
    """

    name: str = option("serve_rollout", _NAME)
    host: str = option(
        "127.0.0.1",
        "Address to listen on; any other than this machine's own needs rollout.server.token_env.",
        filled=True,
    )
    port: int = option(8200, "Port; 0: any free one.", at_least=0, at_most=65535)
    grace_s: int = option(
        30, "Time that the server gets to end after SIGTERM or Ctrl-C.", unit="s", at_least=1
    )
    servers_of: str | None = option(
        None,
        "The run in run.dir whose servers/ gets the server's log and description; null: this run.",
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")


class RegistryAction(Enum):
    """What stage=registry does."""

    list = "list"  # the names, their versions and who holds which alias
    show = "show"  # one version, and its history
    register = "register"  # the model of model.path or run.name becomes a version
    measure = "measure"  # further figures of a version, from summaries
    promote = "promote"  # an alias goes to a version, if the gate lets it
    rollback = "rollback"  # an alias goes back to the version that held it before
    compare = "compare"  # the figures of two versions side by side
    verify = "verify"  # files against their digest, and the history against its chain
    export = "export"  # a version for W&B or MLflow


class RegistryTarget(Enum):
    """Where a version is exported to."""

    wandb = "wandb"  # an artifact, by the run's tracker
    mlflow = "mlflow"  # a model directory with MLflow's MLmodel file


@dataclass(slots=True, kw_only=True)
class RegistryStage:
    """Versions of models in one SQLite file, without a server: register, promote, roll back,
    compare. What happened is kept and can't be changed.
    """

    name: str = option("registry", _NAME)
    action: RegistryAction = option(RegistryAction.list, "What is done.")
    file: str | None = option(
        None, "The registry's SQLite file; null: registry.sqlite in run.dir.", filled=True
    )
    model: str | None = option(
        None, "Name of the model in the registry; null: run.name.", filled=True
    )
    version: str | None = option(
        None, "Number or alias of the version; null: the newest.", filled=True
    )
    other: str = option(
        "production", "compare: number or alias of the version beside it.", filled=True
    )
    alias: str = option(
        "production", "promote, rollback: the alias, such as staging; any name.", filled=True
    )
    reason: str | None = option(
        None, "Why, for the history; promote, rollback and register need it.", filled=True
    )
    who: str | None = option(
        None, "Who, for the history; null: the name of this account.", filled=True
    )
    summaries: list[str] = option(
        [],
        "register, measure: run directories or JSON files whose `metrics` belong to the version, "
        "beside those of the run that made it.",
    )
    rules: list[str] = option(
        [],
        "promote: what the version's figures must fulfil, such as 'eval/score_shift_sd >= 0.2'.",
        section="the gate",
    )
    largest_drop: dict[str, float] = option(
        {}, "promote: how far a figure may lie below that of the version that holds the alias."
    )
    largest_rise: dict[str, float] = option(
        {}, "promote: how far a figure may lie above it, where less is better, such as toxicity."
    )
    force: bool = option(
        False, "promote: in spite of the gate; the history says so, with the reason."
    )
    to: RegistryTarget = option(RegistryTarget.mlflow, "export: for what.", section="export")
    folder: str | None = option(
        None,
        "export to mlflow: the new directory; null: mlflow/NAME-VERSION in run.dir.",
        filled=True,
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")
        plain = self.model is None or not set(self.model) & set("@:/\\ \n")
        check(plain, "stage.model", self.model, "a name without @, :, slashes and blanks")
        check(
            not set(self.alias) & set("@:/\\ \n") and not self.alias.isdigit(),
            "stage.alias",
            self.alias,
            "a name without @, :, slashes and blanks that is no number",
        )
        needs = (RegistryAction.register, RegistryAction.promote, RegistryAction.rollback)
        check(
            self.action not in needs or self.reason is not None,
            "stage.reason",
            self.reason,
            f"a sentence with stage.action={self.action.value}: the history keeps why",
        )
        for key in ("largest_drop", "largest_rise"):
            for name, most in getattr(self, key).items():
                check(most >= 0, f"stage.{key}.{name}", most, "at least 0")


class GatewayAction(Enum):
    """What stage=gateway does."""

    serve = "serve"  # the proxy, until it is stopped
    export = "export"  # feedback as rows for training
    forget = "forget"  # all that is kept of one user is deleted


@dataclass(slots=True, kw_only=True)
class ArmConfig:
    """A served model that some of the users talk to."""

    url: str = option(
        "",
        "Address of its OpenAI-compatible server, without /v1; {version} stands for the number of "
        "the registry's version.",
        filled=True,
    )
    model: str = option(
        "", "The name that its server knows it by; {version} as in url.", filled=True
    )
    weight: float = option(1.0, "Its share of new users, beside the other arms'.", at_least=0)
    token_env: str | None = option(
        None, "Environment variable with its server's key; null: none is sent."
    )
    version: str | None = option(
        None,
        "Its version in the registry, NAME@ALIAS or NAME@NUMBER; an alias is followed while the "
        "gateway runs; null: not in a registry.",
        filled=True,
    )

    def __post_init__(self) -> None:
        check_options(self, "stage.arms")


@dataclass(slots=True, kw_only=True)
class GatewayStage:
    """An OpenAI-compatible server before one or more served models: each user stays with one of
    them, and what users say of the answers is kept and becomes rows for training.
    """

    name: str = option("gateway", _NAME)
    action: GatewayAction = option(GatewayAction.serve, "What is done.")
    arms: dict[str, ArmConfig] = option(
        {}, "The served models by names that only the operator sees.", section="the arms"
    )
    failover: bool = option(
        False,
        "Let another arm answer where a user's own does not; such a user leaves the test. false: "
        "an error.",
    )
    registry: str | None = option(
        None, "The registry's SQLite file; null: registry.sqlite in run.dir.", filled=True
    )
    poll_s: float = option(
        2.0, "Time between two looks at the registry's aliases.", unit="s", above=0
    )
    timeout_s: float = option(
        120.0, "Longest silence of an arm before it counts as dead.", unit="s", above=0
    )
    model_name: str | None = option(
        None, "Name of the model in requests and answers; null: run.name.", filled=True
    )
    host: str = option(
        "127.0.0.1",
        "Address to listen on; any other than this machine's own needs both tokens.",
        filled=True,
        section="the door",
    )
    port: int = option(8080, "Port; 0: any free one.", at_least=0, at_most=65535)
    token_env: str | None = option(
        None,
        "Environment variable with the key that clients need; null: a new key, printed once.",
    )
    operator_env: str | None = option(
        None,
        "Environment variable with the key of the operator's page; null: a new key, printed once.",
    )
    user_header: str = option(
        "x-user", "Header with the user's name; without it the field `user` counts.", filled=True
    )
    body_kib: int = option(1024, "Longest request.", unit="KiB", at_least=1)
    answer_mib: int = option(16, "Longest answer of an arm.", unit="MiB", at_least=1)
    at_once: int = option(256, "Requests at a time; further ones are told to wait.", at_least=1)
    alpha: float = option(
        0.05,
        "Probability that the test names a better arm where there is none, however often one "
        "looks.",
        above=0,
        below=1,
        section="the test",
    )
    votes: int = option(
        3, "Thumbs of a user, the first ones, whose mean is that user's outcome.", at_least=1
    )
    retention_days: float = option(
        30.0,
        "Days after which texts and votes are deleted; their outcomes in the test have no user.",
        unit="days",
        above=0,
        section="feedback",
    )
    answer_minutes: float = option(
        60.0,
        "How long an answer's text waits in memory for a user's consent.",
        unit="min",
        above=0,
    )
    names: str | None = option(
        None,
        "Text file with names a line, which are removed from texts beside e-mail addresses, "
        "telephone and card numbers, IBANs and IP addresses.",
        filled=True,
    )
    user: str | None = option(None, "forget: the user's name.", filled=True)

    def __post_init__(self) -> None:
        check_options(self, "stage")
        total = sum(arm.weight for arm in self.arms.values())
        check(not self.arms or total > 0, "stage.arms", total, "weights of which one is above 0")
        forgets = self.action is GatewayAction.forget
        check(
            not forgets or self.user is not None,
            "stage.user",
            self.user,
            "the user's name with stage.action=forget",
        )
