"""The groups ``model`` and ``adapter``: which weights a stage starts from, and which it trains."""

from dataclasses import dataclass

from conf.choices import AdapterKind, Dtype, ModelKind
from conf.options import check, check_options, nested, option


@dataclass(slots=True, kw_only=True)
class TinyConfig:
    """Shape of ``model=tiny``: a Llama with random weights and a byte-level BPE tokenizer that is
    trained on the stage's text.
    """

    vocab_size: int = option(
        2000,
        "Tokenizer entries; the smallest vocabulary is 256 bytes and the special tokens.",
        unit="entries",
        at_least=260,
    )
    hidden_size: int = option(128, "Width of the model, a multiple of heads.", at_least=1)
    intermediate_size: int = option(384, "Width of the feed-forward layers.", at_least=1)
    layers: int = option(4, "Number of layers.", at_least=1)
    heads: int = option(
        4,
        "Attention heads; hidden_size / heads should be a multiple of 32 for vLLM on CPU.",
        at_least=1,
    )
    max_positions: int = option(
        2048, "Longest sequence that the model can read.", unit="tokens", at_least=8
    )
    tie_embeddings: bool = option(True, "Use the input embeddings as the output layer, too.")

    def __post_init__(self) -> None:
        check_options(self, "model.tiny")
        check(
            self.hidden_size % self.heads == 0,
            "model.tiny.hidden_size",
            self.hidden_size,
            f"a multiple of heads={self.heads}",
        )


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The weights that a stage starts from: the policy's, or the reward model's backbone."""

    kind: ModelKind = option(
        ModelKind.pretrained, "Load a pretrained model, or build a tiny one from model.tiny."
    )
    path: str | None = option(
        None, "Local directory or hub name; null with kind=tiny builds one from model.tiny."
    )
    gguf_file: str | None = option(
        None, "Name of the GGUF file in model.path; null: the weights are no GGUF file."
    )
    dtype: Dtype = option(
        Dtype.auto, "Number format of the weights; auto: float32 on CPU, bfloat16 on CUDA."
    )
    attn_implementation: str | None = option(
        None, "Attention implementation of transformers; null: its own choice (sdpa)."
    )
    trust_remote_code: bool = option(False, "Run Python code that the model's directory holds.")
    params: float | None = option(
        None,
        "Size of the model whose memory stage=doctor plans, such as 7e9 or 7b; null: that of "
        "model.path.",
        unit="parameters",
        at_least=1e6,
        at_most=1e13,
    )
    tiny: TinyConfig = nested(TinyConfig)

    def __post_init__(self) -> None:
        check_options(self, "model")
        inside = self.gguf_file is None or (
            bool(self.gguf_file)
            and not self.gguf_file.startswith("/")
            and ".." not in self.gguf_file.split("/")
        )
        check(inside, "model.gguf_file", self.gguf_file, "a file's name inside model.path")


@dataclass(slots=True, kw_only=True)
class AdapterConfig:
    """Which weights are trained: all of them (``none``), or low-rank updates (``lora``, Hu et al.
    2021, arXiv:2106.09685).
    """

    kind: AdapterKind = option(AdapterKind.none, "Train all weights, or a LoRA adapter.")
    rank: int = option(16, "Rank of the low-rank updates.", at_least=1)
    alpha: float = option(32.0, "Scale of the updates: alpha / rank.", above=0)
    dropout: float = option(0.0, "Dropout probability of the adapter's input.", at_least=0, below=1)
    targets: list[str] = option(
        ["all-linear"], "Names of the modules that are adapted, or all-linear.", filled=True
    )
    rslora: bool = option(
        False, "Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."
    )
    dora: bool = option(False, "Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353).")
    merge_on_save: bool = option(
        False,
        "stage=sft: write merged weights to model/ instead of the adapter; every other stage "
        "always writes whole weights.",
    )

    def __post_init__(self) -> None:
        check_options(self, "adapter")
