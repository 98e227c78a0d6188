"""Checks that the games of other people's libraries share."""

import difflib
from collections.abc import Sequence

from conf.reward import EnvironmentConfig
from rlhf.environments.apart import Apart, GameError
from rlhf.types import UserError


def check_known(game: str, games: Sequence[str], library: str) -> None:
    """Raises UserError for a game that the library doesn't know, with the nearest names."""
    if game not in games:
        near = difflib.get_close_matches(game, games, n=3, cutoff=0.0)
        raise UserError(f"{library} does not know it; the nearest names are {', '.join(near)}")


def check_game(trial: Apart, environment: EnvironmentConfig) -> None:
    """An episode begins. Raises UserError."""
    try:
        trial.reset({}, seed=0)
    except (GameError, TimeoutError) as error:
        options = f" with environment.options={environment.options}" if environment.options else ""
        raise UserError(
            f"environment.game={environment.game}{options} (kind={environment.kind.value}): {error}"
        ) from error
    finally:
        trial.close()
