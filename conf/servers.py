"""The options of vLLM servers that write the responses (rollout=server), and of
``stage=serve_rollout``, which starts one. Standard library only.
"""

from dataclasses import dataclass
from enum import Enum

from conf.options import check, check_options, option


class Transfer(Enum):
    """How weights go from the trainer to servers."""

    auto = "auto"  # nccl between devices, else file
    file = "file"  # safetensors in memory or on a disk that both see
    gloo = "gloo"  # over the network, from host memory
    nccl = "nccl"  # between devices of their own
    ipc = "ipc"  # within a device that both share


@dataclass(slots=True, kw_only=True)
class ServerConfig:
    """One vLLM server: its size, its place, and when it counts as lost."""

    count: int = option(
        1,
        "Servers that a run starts itself where rollout.servers names none.",
        unit="servers",
        at_least=1,
    )
    tensor_parallel: int = option(
        1, "Devices that share each layer of one copy of the model.", at_least=1
    )
    data_parallel: int = option(1, "Copies of the model in one server.", at_least=1)
    transfer: Transfer = option(Transfer.auto, "How weights go from the trainer to servers.")
    token_env: str | None = option(
        None,
        "Environment variable with the servers' bearer token; null: a token is made for servers "
        "that the run starts itself, and servers of rollout.servers get none.",
        filled=True,
    )
    cores: list[str] | None = option(
        None,
        "Cores of each server that the run starts, such as [0-3, 4-7]; null: any.",
        filled=True,
    )
    devices: list[str] | None = option(
        None,
        "CUDA devices of each server that the run starts, such as ['0,1', '2,3']; null: all that "
        "the run sees.",
        filled=True,
    )
    python: str | None = option(
        None,
        "Interpreter of the environment that servers run in; null: the trainer's.",
        filled=True,
    )
    start_limit_s: float = option(
        600.0, "Longest start of a server, weights loaded.", unit="s", above=0
    )
    request_limit_s: float = option(
        600.0,
        "Longest wait for a request's answer before its server counts as hung.",
        unit="s",
        above=0,
    )
    restarts: int = option(
        3, "Restarts of each server that the run starts itself.", unit="restarts", at_least=0
    )
    threads: int | None = option(
        None,
        "Threads of each server on a CPU; null: one for each of its cores.",
        unit="threads",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_options(self, "rollout.server")
        for name, lists in (("cores", self.cores), ("devices", self.devices)):
            check(
                lists is None or len(lists) == self.count,
                f"rollout.server.{name}",
                lists,
                f"one entry for each of rollout.server.count={self.count} servers, or null",
            )


@dataclass(slots=True, kw_only=True)
class ServeRolloutStage:
    """Serves the policy of model.path by vLLM, for runs with rollout=server that name its URL in
    rollout.servers.
    """

    name: str = option("serve_rollout", "Name of the preset; stage=NAME sets it.")
    host: str = option(
        "127.0.0.1",
        "Address to listen on; any other than this machine's own needs rollout.server.token_env.",
        filled=True,
    )
    port: int = option(8200, "Port; 0: any free one.", at_least=0, at_most=65535)
    grace_s: int = option(
        30, "Time that the server gets to end after SIGTERM or Ctrl-C.", unit="s", at_least=1
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")
