"""A Label Studio server: tasks go to a project of their own, labels come back as the file of its
JSON export. Only this module imports label_studio_sdk.

The access token is neither stored nor logged, and it is removed from a server's answers before they
are shown. A personal access token is a JSON Web Token that the SDK exchanges, again and again, for
one that lasts some minutes; anything else it sends as a legacy token, which servers refuse unless
their administrator allows them.
"""

import html
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.labels.ledger import SERVER_FILE
from rlhf.labels.records import Export
from rlhf.labels.targets import label_studio
from rlhf.labels.targets.shared import check_texts
from rlhf.process.files import write_json
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.labels")
_BATCH = 200  # tasks of a request; servers take at most 250,000 and 200 MB
_TITLE = 50  # characters of a project's title
_TIMEOUT = 120.0  # seconds without an answer
_IMPORT = 600.0  # seconds for a server that imports or exports in the background
_WHERE = "Label Studio has personal access tokens under Account & Settings."


def pushed_to(folder: Path) -> dict[str, Any] | None:
    """{"url", "project"} of the server that the export in `folder` was pushed to; None before
    that.
    """
    path = folder / SERVER_FILE
    if not path.is_file():
        return None
    server: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return server


def push_once(export: Export, folder: Path, *, url: str, token: str) -> dict[str, Any]:
    """Push the export in `folder`, unless that is done already; {"url", "project"}.

    Raises UserError as `push`, and for another server than the one that it was pushed to.
    """
    server = pushed_to(folder)
    if server is None:
        try:
            project = push(export, url=url, token=token)
        except UserError as error:
            raise UserError(
                f"{error} Nothing is lost: the export is in {folder}. Push it again with the same "
                "options and run.resume=true."
            ) from error
        server = {"url": url, "project": project}
        write_json(folder / SERVER_FILE, server)
        return server
    if server["url"] != url:
        raise UserError(
            f"{folder / SERVER_FILE}: this export is project {server['project']} of "
            f"{server['url']} already, so "
            f"it can't go to {url} too. Make another."
        )
    LOG.info("resume: the tasks are in project %s of %s already.", server["project"], server["url"])
    return server


def push(export: Export, *, url: str, token: str) -> int:
    """Create a project with the export's tasks; returns its number. A project that could not be
    filled is deleted.

    Raises UserError for a server that can't be reached or refuses the token, and for what it
    refuses of configuration or tasks.
    """
    check_texts(export)
    config, rows = label_studio.config_xml(export), label_studio.task_rows(export)
    with _session(url, token) as client:
        project = client.projects.create(
            title=f"{export.title[: _TITLE - len(export.id) - 3]} ({export.id})",
            description=export.title,
            label_config=config,
            # Label Studio shows it as HTML
            expert_instruction=html.escape(export.instructions).replace("\n", "<br>"),
            show_instruction=bool(export.instructions),
            maximum_annotations=export.overlap,
            enable_empty_annotation=False,
            show_skip_button=True,
            show_collab_predictions=export.prelabel,
        )
        number = int(project.id)
        try:
            for start in range(0, len(rows), _BATCH):
                client.projects.import_tasks(id=number, request=rows[start : start + _BATCH])
            _await_tasks(
                lambda: int(client.projects.get(id=number).task_number or 0), len(rows), url
            )
        except BaseException:
            client.projects.delete(id=number)
            raise
    return number


def _await_tasks(count: Callable[[], int], expected: int, url: str) -> None:
    """Wait until the project has its tasks, which some servers import in the background. Raises
    UserError when it does not get them in time.
    """
    end = time.monotonic() + _IMPORT
    while (tasks := count()) != expected:
        if tasks > expected or time.monotonic() > end:
            raise UserError(
                f"label.url={url}: the server has {tasks} tasks, expected the {expected} that "
                "were sent."
            )
        time.sleep(2)


def pull(*, url: str, token: str, project: int, folder: Path) -> Path:
    """Write the project's JSON export, with all tasks and annotations, also those skipped, to a
    file in `folder`; returns its path.

    Raises UserError for a server that can't be reached or refuses the token, and for a project that
    does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"label_studio_project_{project}.json"
    with _session(url, token) as client:
        # asks before the export does, which answers 404 for other reasons too
        client.projects.get(id=project)
        content = client.projects.exports.as_binary(
            project, export_type="JSON", timeout=int(_IMPORT)
        )
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise UserError(
            f"label.url={url}: the export of project {project} is no JSON ({error})."
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"label.url={url}: the export of project {project} is no list of tasks.")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path


@contextmanager
def _session(url: str, token: str) -> Iterator[Any]:
    """A client of the server at `url`. Its errors become UserErrors that don't hold the token."""
    if not token.strip():
        raise UserError(
            f"label.url={url}: no access token. Put one into the environment variable that "
            f"label.token_env names. {_WHERE}"
        )
    try:
        import httpx
        from label_studio_sdk import LabelStudio
        from label_studio_sdk.core.api_error import ApiError
    except ImportError as error:
        raise UserError(
            "label.push and label.pull need the package label-studio-sdk: pip install --no-deps "
            '"label-studio-sdk==2.1.2".'
        ) from error
    try:
        with httpx.Client(timeout=_TIMEOUT, follow_redirects=True) as http:
            # the slash keeps a path in the address when the SDK joins its own to it
            yield LabelStudio(
                base_url=url.rstrip("/") + "/", api_key=token.strip(), httpx_client=http
            )
    except ApiError as error:
        # the error's own text may hold what was sent
        answer = _answer_text(error.body, token)
        raise UserError(_refusal(url, error.status_code, answer)) from None
    except httpx.InvalidURL as error:
        raise UserError(
            f"label.url={url}: no address ({error}). Expected one such as http://localhost:8080."
        ) from None
    except httpx.HTTPError as error:
        reason = _answer_text(str(error) or type(error).__name__, token)
        raise UserError(
            f"label.url={url}: the server can't be reached ({reason}). Is it running, and is the "
            "address right?"
        ) from None
    except json.JSONDecodeError:
        raise UserError(
            f"label.url={url}: the answer is no JSON. Expected the address of a Label Studio "
            "server."
        ) from None


def _answer_text(body: Any, token: str) -> str:
    """A server's answer, short and without the token."""
    if isinstance(body, dict):
        reasons = [str(body[key]) for key in ("detail", "validation_errors") if body.get(key)]
        body = "; ".join(reasons) or json.dumps(body, default=str)
    return str(body).replace(token.strip(), "[token]")[:500]


def _refusal(url: str, status: int | None, answer: str) -> str:
    """The message for a server's `answer` with an HTTP status of an error."""
    if status == 401:
        return (
            f"label.url={url}: the server refuses the access token ({answer}). Expected a "
            f"personal access token that is still valid. {_WHERE}"
        )
    if status == 403:
        return f"label.url={url}: the token's user may not do this ({answer})."
    if status == 404:
        return (
            f"label.url={url}: no such project, or no Label Studio server ({answer}). Check "
            "label.project, and that the token's user can open it."
        )
    if status is None or status < 400:  # an answer that the SDK can't read
        return (
            f"label.url={url}: expected the address of a Label Studio server, but it "
            f"answers: {answer}."
        )
    return f"label.url={url}: the server answers {status}: {answer}."
