"""kind=textarena: single-player games of the package textarena (0.7.4)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from conf.reward import EnvironmentConfig
from rlhf.environments import names
from rlhf.environments.apart import Apart, prepare
from rlhf.process.libraries import check_installed
from rlhf.types import Environment, Step, UserError

# What the game says of what the player wrote is what the policy wrote itself.
_ECHO = "PLAYER_ACTION"


def make(environment: EnvironmentConfig, tokenizer: Any = None) -> Callable[[], Environment]:
    """What makes an episode of ``environment.game``. Raises UserError for a game that is not known,
    or can't be played alone.
    """
    check_installed("textarena", "games")
    game = environment.game
    assert game is not None  # EnvironmentConfig.check_complete
    prepare("textarena")
    build = functools.partial(Game, game, dict(environment.options))
    names.check_game(Apart(build, environment.step_limit_s), environment)
    return lambda: Apart(build, environment.step_limit_s)


class Game:
    """One episode, in a process of its own."""

    def __init__(self, game: str, options: Mapping[str, Any]) -> None:
        """Raises UserError, also for options that the game doesn't take."""
        import textarena
        from textarena.envs.registration import ENV_REGISTRY

        names.check_known(game, list(ENV_REGISTRY), "textarena")
        # Without wrappers, which repeat the whole game in every observation.
        raw = f"{game}-raw"
        made = textarena.make(raw if raw in ENV_REGISTRY else game, **options)
        while isinstance(made, textarena.Wrapper):
            made = made.env
        self._game, self._single = made, textarena.SinglePlayerState

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        try:
            self._game.reset(num_players=1, seed=seed)
        except (AssertionError, ValueError) as error:
            raise UserError(f"it can't be played alone ({error})") from error
        if not isinstance(self._game.state, self._single):
            raise UserError("it can't be played alone")
        return self._read()

    def step(self, text: str) -> Step:
        done, _ = self._game.step(action=text)
        if not done:
            return Step(self._read(), info={"success": False})
        rewards, info = self._game.close()
        reward = float(rewards[0])
        ended: dict[str, object] = {
            "success": reward >= 1.0,
            "invalid": float(info[0]["invalid_move"]),
        }
        return Step("", reward=reward, done=True, info=ended)

    def _read(self) -> str:
        """What the game says since the last turn."""
        _, messages = self._game.get_observation()
        return "\n".join(text for _, text, kind in messages if kind.name != _ECHO)

    def close(self) -> None:
        """Its process ends with it."""
