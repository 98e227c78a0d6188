"""kind=gymnasium: environments of the package gymnasium (1.4.0) that a text can play.

Observations: a space of texts as it is, else what the environment draws as text (render_mode=ansi),
else the observation's own words. Actions: a space of texts takes the turn; a discrete one the first
of its names (environment.options.actions) or numbers that stands in the turn.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conf.reward import EnvironmentConfig
from rlhf.environments import names
from rlhf.environments.apart import Apart, prepare
from rlhf.process.libraries import check_installed
from rlhf.types import Environment, Step, UserError

# Of environment.options: what the adapter reads; the rest are gymnasium's.
_ACTIONS, _SUCCESS = "actions", "success_at"
_COLOURED = re.compile(r"\x1b\[[\d;]+m(.*?)\x1b\[0m", re.DOTALL)


def make(environment: EnvironmentConfig, tokenizer: Any = None) -> Callable[[], Environment]:
    """What makes an episode of ``environment.game``. Raises UserError for one that is not known, or
    that a text can't play.
    """
    check_installed("gymnasium", "games")
    game = environment.game
    assert game is not None  # EnvironmentConfig.check_complete
    prepare("gymnasium")
    build = functools.partial(Game, game, dict(environment.options))
    names.check_game(Apart(build, environment.step_limit_s), environment)
    return lambda: Apart(build, environment.step_limit_s)


class Game:
    """One episode, in a process of its own."""

    def __init__(self, game: str, options: Mapping[str, Any]) -> None:
        """Raises UserError."""
        import gymnasium

        self._spaces = gymnasium.spaces
        names.check_known(game, list(gymnasium.registry), "gymnasium")
        given = dict(options)
        self.names: Sequence[str] = [str(name) for name in given.pop(_ACTIONS, [])]
        least = given.pop(_SUCCESS, None)
        self.success_at = None if least is None else float(least)
        modes = gymnasium.registry[game].kwargs.get("render_modes") or _modes(gymnasium, game)
        if "ansi" in modes:
            given.setdefault("render_mode", "ansi")
        self._game = gymnasium.make(game, **given)
        self._total = 0.0
        self._check_actions()

    def _check_actions(self) -> None:
        space = self._game.action_space
        if isinstance(space, self._spaces.Text):
            return
        if not isinstance(space, self._spaces.Discrete):
            raise UserError(f"its actions are {space}, which a text can't name")
        if self.names and len(self.names) != space.n:
            raise UserError(f"environment.options.{_ACTIONS} names {len(self.names)} of {space}")

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        self._total = 0.0
        observation, _ = self._game.reset(seed=seed)
        self._game.action_space.seed(seed)
        return self._text(observation)

    def step(self, text: str) -> Step:
        action = self._action(text)
        if action is None:
            complaint = f"no action; expected {self._expected()}"
            info: dict[str, object] = {"invalid": 1.0}
            if self.success_at is not None:
                info["success"] = self._total >= self.success_at
            return Step(complaint, info=info)
        observation, reward, terminated, truncated, told = self._game.step(action)
        self._total += float(reward)
        done = bool(terminated or truncated)
        info = {"invalid": 0.0}
        success = self._success(told)
        if success is not None:
            info["success"] = success
        return Step("" if done else self._text(observation), float(reward), done, info)

    def _success(self, told: Mapping[str, Any]) -> bool | None:
        if self.success_at is not None:
            return self._total >= self.success_at
        for key in ("success", "is_success"):
            if key in told:
                return bool(told[key])
        return None

    def _action(self, text: str) -> Any:
        """None where the turn names none."""
        space = self._game.action_space
        if isinstance(space, self._spaces.Text):
            return text
        if self.names:
            alternatives = sorted(self.names, key=len, reverse=True)
            pattern = r"\b(?:" + "|".join(map(re.escape, alternatives)) + r")\b"
            match = re.search(pattern, text, re.IGNORECASE)
            known = [name.casefold() for name in self.names]
            return None if match is None else known.index(match[0].casefold()) + int(space.start)
        match = re.search(r"-?\d+", text)
        if match is None or not space.contains(int(match[0][:9])):
            return None
        return int(match[0][:9])

    def _expected(self) -> str:
        if self.names:
            return ", ".join(self.names)
        space = self._game.action_space
        return f"a number from {space.start} to {space.start + space.n - 1}"

    def _text(self, observation: object) -> str:
        if isinstance(observation, str):
            return observation
        if self._game.render_mode == "ansi":
            # the colour says where the player is
            return _COLOURED.sub(r"[\1]", str(self._game.render())).strip("\n")
        return str(observation)

    def close(self) -> None:
        self._game.close()


def _modes(gymnasium: Any, game: str) -> Sequence[str]:
    """In which forms the environment draws itself."""
    entry = gymnasium.registry[game].entry_point
    creator = entry if callable(entry) else gymnasium.envs.registration.load_env_creator(entry)
    return getattr(creator, "metadata", {}).get("render_modes", [])
