"""The operator's page: plain HTML, made here, without scripts and without requests to anywhere."""

import base64
import datetime
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from rlhf.gateway.state import State
from rlhf.gateway.trial import Comparison

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #d5d5d5; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #161616; }
  th, td { border-color: #444; } }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
_EXPLAINED = (
    "One outcome for each user: the mean of the first thumbs. The test may be looked at any time: "
    "it names a better arm where there is none with probability alpha at most. The intervals of "
    "the means hold at any time, for users who are independent and alike."
)


def html(model: str, state: State) -> str:
    """The page."""
    title = escape(f"Gateway: {model}")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        f"<p>Test {state.epoch}. {escape(_verdict(state))}</p>",
        _arms(state),
        _tests(state),
        f"<p>{escape(_EXPLAINED)}</p>",
        _counts(state),
        _decisions(state),
        _events(state),
        "</body></html>",
    ]
    return "\n".join(parts)


def _verdict(state: State) -> str:
    if not state.comparisons:
        return "There is one arm, so nothing is compared."
    decided = [found for found in state.comparisons if found.stopped is not None]
    if not decided:
        return "Nothing is decided yet."
    return " ".join(_decided(found) for found in decided)


def _decided(found: Comparison) -> str:
    better, worse = found.b, found.a
    if found.decision.startswith("a"):
        better, worse = found.a, found.b
    return f"{better} is better than {worse}."


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts, which are shown as they are."""
    lines = [f"<table><caption>{escape(caption)}</caption><thead><tr>"]
    lines += [f'<th scope="col">{escape(name)}</th>' for name in head]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    lines.append("</tbody></table>")
    return "".join(lines)


def _arms(state: State) -> str:
    rows = []
    for standing in state.standings:
        arm = state.arms[standing.arm]
        low, high = standing.interval
        mean = "-" if standing.mean is None else f"{standing.mean:.3f}"
        figures = state.figures
        rows.append(
            (
                standing.arm,
                arm["version"],
                arm["address"],
                f"{100 * arm['share']:.1f} %",
                figures["assigned"].get(standing.arm, 0),
                figures["answers"].get(standing.arm, 0),
                figures["feedback"].get(standing.arm, 0),
                figures["with consent"].get(standing.arm, 0),
                standing.users,
                f"{mean} ({low:.3f} to {high:.3f})",
            )
        )
    head = ("arm", "version", "server", "share", "users", "answers", "feedback", "with consent")
    return _table("Arms", (*head, "complete users", "mean outcome"), rows)


def _tests(state: State) -> str:
    rows = []
    for found in state.comparisons:
        rows.append(
            (
                f"{found.b} against {found.a}",
                found.users,
                f"{found.e_value:.3g}",
                f"{1 / found.alpha:.3g}",
                "not decided" if found.stopped is None else _decided(found),
            )
        )
    return _table("Test", ("arms", "users", "e-value", "decides at", "decision"), rows)


def _counts(state: State) -> str:
    rows = [(name, arm or "-", number) for name, arm, number in state.figures["counts"]]
    away = state.figures["users away"].get("away", 0)
    rows.append(("users who left the test (answered by another arm)", "-", away))
    return _table("Counted since the beginning", ("what", "arm", "how often"), rows)


def _decisions(state: State) -> str:
    rows = [(epoch, text, _time(at)) for epoch, _, text, at in state.figures["decisions"]]
    return _table("Decisions", ("test", "decision", "when"), rows)


def _events(state: State) -> str:
    rows = [(_time(at), text) for at, text in state.figures["events"]]
    return _table("Changes", ("when", "what"), rows)


def _time(seconds: float) -> str:
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return when.isoformat(sep=" ", timespec="seconds")
