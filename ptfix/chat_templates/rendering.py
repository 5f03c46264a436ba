"""Render chat templates as transformers does, in a child process with bounds: a template is somebody else's program.

Jinja's sandbox keeps a template from reaching Python; it bounds neither its time nor its memory. The child does.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptfix import hosts
from ptfix.chat_templates.generation_tags import strip_generation_tags

__all__ = [
    "EndlessError",
    "Job",
    "NotRenderedError",
    "RenderError",
    "render_all",
    "strip_generation_tags",
    "unavailable",
]

#: Characters. The longest template known to us has about 30,000.
TEMPLATE_LIMIT = 500_000
OUTPUT_LIMIT = 1_000_000
#: Bytes that the child may map, and seconds of processor time that one render may take.
MEMORY_LIMIT = 512 * 2**20
CPU_LIMIT = 4
#: Seconds by the clock, and one more for each template: what one child may take, and what one call may take.
CHILD_LIMIT, CALL_LIMIT = 15.0, 30.0
#: Seconds until a child that could not be started is tried once more: memory and process tables fill up for a moment.
_PAUSE = 0.2

_JINJA2 = ">=3.1.6"
_SANDBOX = Path(__file__).with_name("sandbox.py")
_TOO_LATE = "The template was not rendered: the ones before it took too long."
#: Signals that a template cannot cause: the system or a person ended the child.
_FROM_OUTSIDE = {getattr(signal, name, None) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}


class RenderError(Exception):
    """A template does not render; `str()` is one sentence that says why."""


class EndlessError(RenderError):
    """It did not stop by itself, or took the process that renders it with it: no other conversation will do better."""


class NotRenderedError(RenderError):
    """Nobody tried: no process could be started, it was killed, or the time was up. It says nothing of the template."""


class Job(NamedTuple):
    """One render: a template and what `apply_chat_template` would give it, plain JSON data only."""

    template: str
    messages: list[dict[str, Any]]
    add_generation_prompt: bool = False
    tools: list[dict[str, Any]] | None = None
    #: Further variables, such as `enable_thinking`. `mark_generation` is written where a `{% generation %}` begins.
    extra: dict[str, Any] | None = None
    #: What `strftime_now` takes for now, in ISO 8601: frozen, so that a render can be compared with another.
    now: str = "2024-02-03T12:00:00"


def unavailable() -> str | None:
    """Why nothing can be rendered here, in one sentence, or None."""
    version = hosts.installed("jinja2")
    if version is None:
        return "Rendering a chat template needs Jinja2: pip install 'jinja2>=3.1.6'."
    if not hosts.satisfies(version, _JINJA2):
        return (
            f"Jinja2 {version} lets a template out of its sandbox (CVE-2025-27516), so none is rendered: "
            "pip install 'jinja2>=3.1.6'."
        )
    if not sys.executable:
        return "This Python does not know its own executable (sys.executable), which renders chat templates."
    return None


def render_all(jobs: Sequence[Job], special_tokens: Mapping[str, str]) -> list[str | RenderError]:
    """Render every job in a child process with bounds on time, memory and output, in the same order.

    A template that breaks a bound takes its own other jobs with it, and nobody else's. Never raises.

    Args:
        special_tokens: `bos_token`, `eos_token` and so on; a template finds undefined what is not there.
    """
    answers: list[str | RenderError | None] = [_refused(job) for job in jobs]
    reason = unavailable()
    deadline = time.monotonic() + CALL_LIMIT + len({job.template for job in jobs})
    while waiting := [index for index, answer in enumerate(answers) if answer is None]:
        if reason is None and time.monotonic() > deadline:
            reason = _TOO_LATE
        if reason is not None:
            return [NotRenderedError(reason) if answer is None else answer for answer in answers]
        done, fault = _run([jobs[index] for index in waiting], special_tokens, deadline - time.monotonic())
        for index, answer in zip(waiting, done, strict=False):
            answers[index] = answer
        if len(done) < len(waiting):
            culprit = jobs[waiting[len(done)]].template
            for index in waiting[len(done) :]:
                if jobs[index].template == culprit:
                    answers[index] = fault
    return [answer for answer in answers if answer is not None]


def _refused(job: Job) -> RenderError | None:
    if len(job.template) > TEMPLATE_LIMIT:
        return RenderError(
            f"The template is not rendered: it has {len(job.template):,} characters, more than {TEMPLATE_LIMIT:,}."
        )
    return None


def _run(
    jobs: Sequence[Job], special_tokens: Mapping[str, str], left: float
) -> tuple[list[str | RenderError], RenderError]:
    """The answers one child gave, and why it gave no more; it stopped at the first job without an answer.

    Args:
        left: the seconds that are left to the call.
    """
    templates = list(dict.fromkeys(job.template for job in jobs))
    whole = CHILD_LIMIT + len(templates)
    seconds = min(whole, max(left, 1.0))
    number = {template: index for index, template in enumerate(templates)}
    request = {
        "memory": MEMORY_LIMIT,
        "seconds": CPU_LIMIT,
        "output": OUTPUT_LIMIT,
        "special_tokens": {name: str(token) for name, token in special_tokens.items()},  # some are AddedToken objects
        "templates": templates,
        "jobs": [{**job._asdict(), "template": number[job.template]} for job in jobs],
    }
    # As transformers does: what is not JSON, an image for one, becomes a word that names its type.
    stdin = json.dumps(request, default=lambda thing: f"<{type(thing).__name__}>").encode()
    try:
        child = _start()
    except OSError as error:
        return [], NotRenderedError(f"The template was not rendered: no process can be started for it ({error}).")
    with child:
        try:
            stdout, stderr = child.communicate(stdin, timeout=seconds)
            fault = _why_it_ended(child.returncode, stderr)
        except subprocess.TimeoutExpired:
            child.kill()
            stdout, _ = child.communicate()
            endless = EndlessError(_says_why(f"it takes more than {seconds:.0f} s"))
            fault = NotRenderedError(_TOO_LATE) if seconds < whole else endless
    whole_lines = stdout.split(b"\n")[:-1]
    return [_answer(json.loads(line)) for line in whole_lines], fault


def _start() -> subprocess.Popen[bytes]:
    """A child that waits for its request. Where the system refuses, it is asked once more.

    Raises:
        OSError: it refused again.
    """

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", str(_SANDBOX), *_jinja2_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )

    try:
        return start()
    except OSError:
        time.sleep(_PAUSE)
        return start()


def _answer(answer: dict[str, str]) -> str | RenderError:
    return answer["text"] if "text" in answer else RenderError(_says_why(answer["error"]))


def _says_why(fault: str) -> str:
    return f"The template does not render: {fault}{'' if fault.endswith(('.', '!', '?')) else '.'}"


def _why_it_ended(status: int, stderr: bytes) -> RenderError:
    if -status in _FROM_OUTSIDE:
        name = signal.Signals(-status).name
        return NotRenderedError(f"The template was not rendered: the process that renders it was ended by {name}.")
    if status == -getattr(signal, "SIGXCPU", 0):
        return EndlessError(_says_why(f"it takes more than {CPU_LIMIT} s of processor time"))
    last_words = stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return EndlessError(_says_why(f"the process that renders it ends with status {status} {last_words}".rstrip()))


def _jinja2_folders() -> Iterable[str]:
    specs = (importlib.util.find_spec(name) for name in ("jinja2", "markupsafe"))
    return dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin)
