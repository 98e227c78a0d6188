"""Which user talks to which arm: a keyed hash of the user's name, so that nobody outside can work
out or choose an arm, and nobody changes arms by asking again.
"""

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from rlhf.types import UserError

KEY_FILE = "key"
_KEY_BYTES = 32
_POINTS = 2**64


def load_key(folder: Path) -> bytes:
    """The gateway's secret key, made at its first start; only its user can read the file.

    Raises UserError for a file that others can read, or that is no key.
    """
    path = folder / KEY_FILE
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_key(path)
    with os.fdopen(made, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(_KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(
            f"{path} can be read by others, who could work out every user's arm. "
            f"Remedy: chmod 600 {path}."
        )
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise UserError(
            f"{path} holds no key of {_KEY_BYTES} bytes in hexadecimal digits. Restore it: with "
            "another key users change arms, and what is kept of them is not found any more."
        )
    return key


def pseudonym(key: bytes, user: str) -> str:
    """What is kept in place of a user's name: 32 hexadecimal digits."""
    return _keyed(key, f"user:{user}").hexdigest()[:32]


def arm_of(key: bytes, user: str, weights: Mapping[str, float]) -> str:
    """The arm of a new user, given by the pseudonym, among arms with those weights; in the order of
    their names, so that the order of an option changes nothing.
    """
    point = int.from_bytes(_keyed(key, f"arm:{user}").digest()[:8], "big") / _POINTS
    total = sum(weights.values())
    reached = 0.0
    names = sorted(name for name, weight in weights.items() if weight > 0)
    for name in names:
        reached += weights[name] / total
        if point < reached:
            return name
    return names[-1]  # rounding


def _keyed(key: bytes, text: str) -> "hmac.HMAC":
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256)
