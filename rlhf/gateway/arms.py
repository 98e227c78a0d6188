"""The arms as they stand: who serves, with which weight, and which version of the registry."""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from rlhf.gateway import keeping
from rlhf.gateway.records import Arm, Refused
from rlhf.gateway.split import arm_of
from rlhf.gateway.store import Store
from rlhf.process.http import checked_url
from rlhf.registry.names import split_name, version_of
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.gateway")
_LOOK_S = 5.0  # for a server's list of models
_FIELDS: dict[str, Any] = {
    "url": str,
    "model": str,
    "weight": (int, float),
    "token_env": str,
    "version": str,
}


def made(name: str, given: Mapping[str, Any]) -> Arm:
    """An arm out of options or of an operator's request. Raises UserError, naming the option."""
    key = f"stage.arms.{name}"
    for field, value in given.items():
        if field not in _FIELDS:
            raise UserError(f"{key}.{field}: expected one of {', '.join(_FIELDS)}.")
        if value is not None and (not isinstance(value, _FIELDS[field]) or value is True):
            raise UserError(f"{key}.{field}={value!r}: expected {_FIELDS[field]}.")
    url, model = given.get("url"), given.get("model")
    if not url or not model:
        raise UserError(f"{key}: expected a url and a model.")
    checked_url(url.replace("{version}", "1"), f"{key}.url")
    variable = given.get("token_env")
    token = None
    if variable is not None:
        token = os.environ.get(variable, "").strip()
        if not token:
            raise UserError(f"{key}.token_env={variable}: this environment variable is not set.")
    version = given.get("version")
    if version is not None:
        split_name(version, f"{key}.version")
    elif "{version}" in url + model:
        raise UserError(f"{key}: {{version}} needs {key}.version=NAME@ALIAS.")
    weight = float(given.get("weight") or 0.0)
    if not 0 <= weight < float("inf"):
        raise UserError(f"{key}.weight={weight}: expected a number of at least 0.")
    return Arm(name, url.rstrip("/"), model, weight, token, version)


class Arms:
    """The arms of a running gateway, and the users' assignments."""

    def __init__(
        self, arms: Mapping[str, Arm], store: Store, registry: Path, client: httpx.AsyncClient
    ) -> None:
        """Raises UserError for a version that the registry does not know."""
        self._store, self._registry, self._client = store, registry, client
        self.arms = {name: self._looked_up(arm) for name, arm in arms.items()}
        self.epoch = store.submit(self._beginning(self.arms)).result()
        self._told = ""
        self._pins: dict[str, str] = store.read(keeping.pins)
        self._waiting: dict[str, Future[Any]] = {}  # assignments on their way to the disk

    def _looked_up(self, arm: Arm) -> Arm:
        if arm.version is None:
            return arm
        found = version_of(arm.version, f"stage.arms.{arm.name}.version", self._registry)
        return replace(arm, number=found.number)

    def _beginning(self, arms: Mapping[str, Arm]) -> Callable[[keeping.Db], int]:
        labels = {name: arm.label for name, arm in arms.items()}
        return lambda db: keeping.begin_epoch(db, labels)

    # ---- who talks to whom ----

    @property
    def shares(self) -> dict[str, float]:
        """The arms' shares of new users."""
        total = sum(arm.weight for arm in self.arms.values())
        return {name: arm.weight / total for name, arm in self.arms.items()}

    async def of(self, key: bytes, user: str) -> Arm:
        """The arm of a user, given by the pseudonym: that of the first time, on the disk before
        anything is answered, so that no change of weights moves anybody.
        """
        name = self._pins.get(user)
        if name is None or name not in self.arms:
            shares = self.shares
            name = arm_of(key, user, shares)
            self._pins[user] = name
            chosen = name
            self._waiting[user] = self._store.submit(
                lambda db: keeping.pin(db, user, chosen, shares)
            )
        waiting = self._waiting.get(user)
        if waiting is not None:
            try:
                await asyncio.wrap_future(waiting)
            except sqlite3.Error:  # not on the disk: the user is assigned anew, by the same hash
                self._pins.pop(user, None)
                raise
            finally:
                self._waiting.pop(user, None)
        return self.arms[name]

    def forget(self, user: str) -> None:
        """A user whose assignment is deleted."""
        self._pins.pop(user, None)

    def others(self, arm: Arm) -> list[Arm]:
        """The other arms that take users, the heaviest first."""
        rest = [other for other in self.arms.values() if other.name != arm.name]
        return sorted((other for other in rest if other.weight > 0), key=lambda o: -o.weight)

    # ---- changes while it runs ----

    async def change(self, arms: Mapping[str, Arm]) -> None:
        """Other arms or weights from the next request on. Raises UserError where one of them can't
        be used, and then nothing changes.
        """
        if not arms or not sum(arm.weight for arm in arms.values()) > 0:
            raise UserError("expected arms, of which one has a weight above 0.")
        found = {}
        for name, arm in arms.items():
            looked_up = self._looked_up(arm)
            problem = await self._problem(looked_up)
            if problem is not None:
                raise UserError(f"arm {name}: {problem}.")
            found[name] = looked_up
        await self._use(found)

    async def refresh(self) -> None:
        """Follow the registry: an arm whose alias moved serves the new version once its server has
        it, and until then the old one, which the operator is told.
        """
        found = dict(self.arms)
        for name, arm in self.arms.items():
            try:
                looked_up = await asyncio.to_thread(self._looked_up, arm)
            except UserError as error:
                LOG.warning("arm %s stays at %s: %s", name, arm.label, error)
                continue
            if looked_up.number == arm.number:
                continue
            problem = await self._problem(looked_up)
            if problem is not None:
                self._tell(f"{name} stays at {arm.label}, not {looked_up.label}: {problem}")
                continue
            found[name] = looked_up
        if found != self.arms:
            await self._use(found)

    async def _use(self, found: dict[str, Arm]) -> None:
        before = {name: arm.label for name, arm in self.arms.items()}
        epoch = await asyncio.wrap_future(self._store.submit(self._beginning(found)))
        self.arms, self.epoch = found, epoch  # together: a request sees both as they were, or new
        after = {name: arm.label for name, arm in found.items()}
        weights = {name: round(share, 4) for name, share in self.shares.items()}
        text = f"arms {after}, shares {weights}; before {before}"
        self._tell(text)

    def _tell(self, text: str) -> None:
        if text == self._told:
            return
        self._told = text
        LOG.info("gateway: %s", text)
        self._store.submit(lambda db: keeping.note(db, text))

    async def _problem(self, arm: Arm) -> str | None:
        """Why an arm can't be used now; None where its server has its model."""
        headers = {} if arm.token is None else {"authorization": f"Bearer {arm.token}"}
        try:
            answer = await self._client.get(
                f"{arm.address}/v1/models", headers=headers, timeout=_LOOK_S
            )
            names = [model["id"] for model in answer.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            return f"{arm.address} does not list its models ({type(error).__name__})"
        if arm.served not in names:
            return f"{arm.address} has no model {arm.served!r}, but {', '.join(map(str, names))}"
        return None


def arms_of(given: Any) -> dict[str, Arm]:
    """The arms in an operator's JSON: {name: {url, model, weight, token_env, version}}. Raises
    Refused.
    """
    if not isinstance(given, dict) or not all(isinstance(each, dict) for each in given.values()):
        raise Refused(400, "expected {NAME: {url, model, weight, token_env, version}}")
    try:
        return {str(name): made(str(name), each) for name, each in given.items()}
    except UserError as error:
        raise Refused(400, str(error)) from error
