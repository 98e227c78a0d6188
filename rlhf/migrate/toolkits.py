"""The toolkits whose files are read, by the names of ``migrate.toolkit``."""

from rlhf.migrate import axolotl, llama_factory, openrlhf, swift, trl
from rlhf.migrate.tables import Toolkit

TOOLKITS: dict[str, Toolkit] = {
    toolkit.name: toolkit
    for toolkit in (
        llama_factory.TOOLKIT,
        swift.TOOLKIT,
        axolotl.TOOLKIT,
        trl.TOOLKIT,
        openrlhf.TOOLKIT,
    )
}
