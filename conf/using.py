"""The options of the stages that use a model: export, chat, serve, serve_rollout."""

from dataclasses import dataclass
from enum import Enum

from conf.choices import Dtype
from conf.options import check, check_options, option

_NAME = "Name of the preset; stage=NAME sets it."


class GGUFType(Enum):
    """Number formats of a GGUF file's matrices; vectors are float32 in all of them."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"  # 8 bits, a float16 scale for every 32 numbers


@dataclass(slots=True, kw_only=True)
class ExportStage:
    """Writes a model for other programs: adapters merged in, safetensors, GGUF, an Ollama
    Modelfile, a model card. Each file is loaded again and answers 20 questions.
    """

    name: str = option("export", _NAME)
    safetensors: bool = option(True, "Write safetensors, which most programs load.")
    dtype: Dtype = option(
        Dtype.auto, "Number format of the safetensors; auto: that of the model's own files."
    )
    gguf: list[GGUFType] = option([], "GGUF files to write, for llama.cpp and Ollama.")
    modelfile: bool = option(
        False,
        "Write a Modelfile for Ollama beside each GGUF file; refused where no template of Ollama "
        "gives what the model's chat template gives.",
    )
    title: str | None = option(
        None, "Name in the card and of the GGUF files; null: run.name.", filled=True
    )
    license: str | None = option(
        None, "Licence of the exported model; null: what its base's files say.", filled=True
    )
    answer_tokens: int = option(
        32, "Longest answer to a question of the check.", unit="tokens", at_least=1
    )
    least_agreement: float = option(
        0.9,
        "Share of answers below which an export in bf16 or q8_0 is warned of.",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")
        check(
            self.safetensors or bool(self.gguf),
            "stage.gguf",
            [],
            "at least one type with stage.safetensors=false, or nothing is written",
        )
        check(
            not self.modelfile or bool(self.gguf),
            "stage.modelfile",
            self.modelfile,
            "false without stage.gguf: Ollama reads GGUF files",
        )
        plain = self.title is None or not set(self.title) & set('/\\\n"')
        check(plain, "stage.title", self.title, "a file's name, without slashes and quotes")


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
