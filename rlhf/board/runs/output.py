"""What a job printed, as a page shows it: its last lines, without the codes of a terminal."""

import re

from rlhf.board.jobs.store import Job, Jobs

_BYTES, _LINES = 1 << 16, 200
_CODES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_ERROR = "error: "


def readable(content: bytes) -> str:
    """Output as text: of a line that was written over, as progress bars do, its last form."""
    lines = []
    for line in _CODES.sub("", content.decode("utf-8", errors="replace")).split("\n"):
        forms = [form for form in line.split("\r") if form.strip()]
        lines.append(forms[-1] if forms else "")
    return "\n".join(lines)


def tail(jobs: Jobs, job: Job) -> str:
    """The last lines of a job's output."""
    content, end = jobs.output(job.id, -_BYTES)
    lines = readable(content).split("\n")
    if end > _BYTES:
        lines = lines[1:]  # the first one may lack its beginning
    return "\n".join(lines[-_LINES:]).strip("\n")


def problem(text: str) -> str:
    """The last error that a run told, with what follows it; "" where it told none."""
    at = text.rfind("\n" + _ERROR)
    if at >= 0:
        return text[at + 1 + len(_ERROR) :].strip()
    return text[len(_ERROR) :].strip() if text.startswith(_ERROR) else ""
