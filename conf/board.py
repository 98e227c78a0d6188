"""The options of the web page (``stage=board``)."""

from dataclasses import dataclass

from conf.options import check_options, option


@dataclass(slots=True, kw_only=True)
class BoardStage:
    """A web page for all stages: start runs, follow them, look at data, label, chat, export. Runs
    that it starts go on when it ends.
    """

    name: str = option("board", "Name of the preset; stage=NAME sets it.")
    host: str = option(
        "127.0.0.1",
        "Address to listen on; any other than this machine's own needs token_env.",
        filled=True,
    )
    port: int = option(7860, "Port; 0: any free one.", at_least=0, at_most=65535)
    token_env: str | None = option(
        None,
        "Environment variable with the word that opens the page, as often as one likes; null: a "
        "link is printed that opens it once.",
    )
    hosts: list[str] = option(
        [], "Further names by which browsers reach the page, such as that of a proxy."
    )
    uploads: str | None = option(
        None, "Folder of uploaded files; null: .board/uploads in run.dir.", filled=True
    )
    upload_mib: int = option(
        256,
        "Largest uploaded file; all of them together may have 16 times that.",
        unit="MiB",
        at_least=1,
    )
    at_once: int = option(
        1, "Runs at once where there is no GPU; each GPU has one at a time.", at_least=1
    )
    trust_remote_code: bool = option(
        False, "Let the page set model.trust_remote_code, which runs code out of a model's files."
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")
