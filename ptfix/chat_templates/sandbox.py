"""The child process of `rendering`: reads jobs as JSON on stdin, writes one JSON line for each as soon as it is done.

Run as a script, never imported: the standard library and jinja2 are all it may load, so that it starts at once and a
template has nothing to reach. Every global and filter is what `apply_chat_template` of transformers gives a template.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any


class Refusal(Exception):
    """The template called `raise_exception`."""


def main() -> None:
    """Answer every job of the request on stdin, in order."""
    sys.path.extend(sys.argv[1:])  # where the parent's jinja2 lies: `python -I` reads neither PYTHONPATH nor user site
    request = json.load(sys.stdin)
    environment = _environment()
    renew = _limits(request["memory"], request["seconds"])
    compiled: dict[int, Any] = {}
    for job in request["jobs"]:
        renew()
        try:
            number = job["template"]
            if number not in compiled:
                compiled[number] = environment.from_string(request["templates"][number])
            answer = {"text": _render(compiled[number], job, request["special_tokens"], request["output"])}
        except Exception as error:
            answer = {"error": _sentence(error, request)}
        print(json.dumps(answer), flush=True)


def _limits(memory: int, seconds: int) -> Callable[[], None]:
    """Bound this process where the platform can; the answer is to be called before each job, and renews its time."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock bounds this process
        return lambda: None

    def limit(what: int, value: int) -> None:
        hard = resource.getrlimit(what)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS knows RLIMIT_AS and refuses it
            resource.setrlimit(what, (value, hard))

    limit(resource.RLIMIT_AS, memory)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    # Processor time, not the clock: a busy machine must not make a good template look endless.
    return lambda: limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The `{% generation %}` tag; `mark_generation`, where a job has it, is written where its block begins."""

        tags = {"generation"}  # noqa: RUF012 the attribute jinja2 reads

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            mark = jinja2.nodes.ContextReference()
            return jinja2.nodes.CallBlock(self.call_method("_write", [mark]), [], [], body).set_lineno(line)

        def _write(self, context: Any, caller: Callable[[], str]) -> str:
            return str(context.get("mark_generation", "")) + caller()

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise Refusal(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _render(template: Any, job: Any, special_tokens: Any, output: int) -> str:
    now = datetime.datetime.fromisoformat(job["now"])
    variables = {
        "documents": None,
        "strftime_now": lambda format: now.strftime(format),
        **special_tokens,
        **(job["extra"] or {}),
        "messages": job["messages"],
        "tools": job["tools"],
        "add_generation_prompt": job["add_generation_prompt"],
    }
    parts, length = [], 0
    for part in template.generate(variables):
        parts.append(part)
        length += len(part)
        if length > output:
            raise OverflowError(f"it writes more than {output:,} characters")
    return "".join(parts)


def _sentence(error: Exception, request: Any) -> str:
    import jinja2

    said = " ".join("".join(letter if letter.isprintable() else " " for letter in str(error)).split())
    said = said if len(said) <= 200 else said[:200] + " ..."
    if isinstance(error, Refusal):
        return f"it refuses the conversation: {said}"
    if isinstance(error, MemoryError):
        return f"it needs more than {request['memory'] // 2**20} MB of memory"
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno} is not valid Jinja: {said}"
    if isinstance(error, (jinja2.TemplateError, OverflowError)):
        return said
    return f"{type(error).__name__}: {said}"


if __name__ == "__main__":
    main()
