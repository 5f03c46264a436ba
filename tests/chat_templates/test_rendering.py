from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from ptfix import hosts
from ptfix.chat_templates import rendering
from ptfix.chat_templates.rendering import (
    EndlessError,
    Job,
    NotRenderedError,
    RenderError,
    render_all,
    strip_generation_tags,
)
from tests.chat_templates import real

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Où est le café <b>?"}
ANSWER = {"role": "assistant", "content": "Là-bas."}
GOOD = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def host() -> Any:
    """A tokenizer of the host; what it knows does not matter, only how it renders."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    if not hosts.satisfies(Version(transformers.__version__), ">=4.45"):
        pytest.skip("transformers before 4.45 gives templates less: no loopcontrols, no documents, another tojson")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def render_one(template: str, **job: Any) -> str:
    (answer,) = render_all([Job(template, job.pop("messages", [USER, ANSWER]), **job)], TOKENS)
    assert isinstance(answer, str), answer
    return answer


def error_of(template: str) -> str:
    (answer,) = render_all([Job(template, [USER])], TOKENS)
    assert isinstance(answer, RenderError), answer
    return str(answer)


@pytest.mark.parametrize(
    "template",
    [
        GOOD,
        "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}",
        "{{ messages | tojson(indent=2) }}{{ messages[0].content | e }}",
        "  {% if true %}\n    kept\n  {% endif %}\n  {{- 'x' }}\n\n",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ tools is none }}{{ documents is none }}{{ unknown is defined }}{{ pad_token is defined }}",
        "{{ add_generation_prompt }}{{ dict(a=1) }}{{ messages[-1]['content'].strip('.') }}",
    ],
)
@pytest.mark.parametrize("prompt", [False, True])
def test_renders_what_the_host_renders(host: Any, template: str, prompt: bool) -> None:
    messages = [USER, ANSWER]
    wanted = host.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    assert render_one(template, messages=messages, add_generation_prompt=prompt) == wanted


def test_renders_what_the_host_renders_of_real_templates(host: Any) -> None:
    templates = real.trl()
    jobs = [Job(text, [USER, ANSWER, USER], True) for text in templates.values()]
    compared = 0
    for (name, text), answer in zip(templates.items(), render_all(jobs, TOKENS), strict=True):
        if "strftime_now" in text:
            continue  # the host's clock goes on
        try:
            wanted = host.apply_chat_template(
                jobs[0].messages, chat_template=text, tokenize=False, add_generation_prompt=True
            )
        except Exception:
            assert isinstance(answer, RenderError), name
        else:
            assert answer == wanted, name
            compared += 1
    assert compared > len(templates) / 2


def test_extra_variables_and_a_frozen_clock() -> None:
    assert render_one("{{ enable_thinking }}", extra={"enable_thinking": False}) == "False"
    assert render_one("{{ strftime_now('%Y-%m-%d') }}", now="1999-12-31T00:00:00") == "1999-12-31"
    assert render_one("{{ strftime_now('%c') }}") == render_one("{{ strftime_now('%c') }}")


def test_the_generation_tag_is_transparent_and_can_be_marked() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render_one(template) == USER["content"] + ANSWER["content"]
    assert render_one(template, extra={"mark_generation": "|"}) == f"|{USER['content']}|{ANSWER['content']}"


def test_what_is_not_json_becomes_a_word_for_its_type() -> None:
    image = {"role": "user", "content": [{"type": "image", "image": object()}]}
    assert render_one("{{ messages[0].content[0].image }}", messages=[image]) == "<object>"


HOSTILE = {
    # By its processor time, or on a busy machine by the clock.
    "endless loop": ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "it takes more than"),
    "a number": ("{{ 9 ** (9 ** 9) }}", "it takes more than"),
    "a long text": ("{{ 'a' * 10 ** 9 }}", "memory"),
    "a long output": ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 1,000,000 characters"),
    "a huge range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "deep nesting": ("{% if true %}" * 3000 + "{% endif %}" * 3000, "not render"),
    "deep brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not render"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests too deeply"),
    "a size": ("a" * 600_000, "600,000 characters"),
    "a refusal": ("{{ raise_exception('No\x1b[31m\nway.') }}", "refuses the conversation: No [31m way."),
    "a syntax error": ("{{ 'a' }}\n{% if %}", "line 2 is not valid Jinja"),
    "an undefined token": ("{{ mask_token + 'a' }}", "'mask_token' is undefined"),
    "a way out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a way out by attr": ("{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}", "unsafe"),
    "a change": ("{{ messages.append(1) }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "not render"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_clear_sentence(name: str) -> None:
    template, wanted = HOSTILE[name]
    started = time.monotonic()
    said = error_of(template)
    assert wanted in said
    assert said.endswith(".")
    assert not said.endswith("..")
    assert said.isprintable()
    assert time.monotonic() - started < rendering.CALL_LIMIT + 5


def test_one_fault_does_not_lose_the_other_results() -> None:
    loop, allocation = HOSTILE["endless loop"][0], HOSTILE["a long text"][0]
    jobs = [Job(template, [USER]) for template in (GOOD, loop, GOOD + "1", allocation, loop, GOOD + "2", "{{")]
    answers = render_all(jobs, TOKENS)
    text = USER["content"]
    assert [answer if isinstance(answer, str) else None for answer in answers] == [
        text,
        None,
        text + "1",
        None,
        None,
        text + "2",
        None,
    ]


def test_the_child_has_a_clock_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the platform cannot bound processor time the clock must do.
    monkeypatch.setattr(rendering, "CPU_LIMIT", 1000)
    monkeypatch.setattr(rendering, "CHILD_LIMIT", 1.0)
    answers = render_all([Job(HOSTILE["endless loop"][0], [USER]), Job(GOOD, [USER])], TOKENS)
    assert "takes more than 3 s" in str(answers[0])
    assert answers[1] == USER["content"]


def test_no_process_to_render_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "no process can be started" in error_of(GOOD)


class Refuses:
    """subprocess.Popen that the system refuses so many times."""

    def __init__(self, times: int) -> None:
        self.times, self.started, self.real = times, 0, subprocess.Popen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.times:
            self.times -= 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.started += 1
        return self.real(*args, **kwargs)


def test_a_child_that_is_refused_is_started_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = Refuses(1)
    monkeypatch.setattr(subprocess, "Popen", popen)
    assert render_one(GOOD, messages=[USER]) == USER["content"]
    popen.times = 2
    assert isinstance(render_all([Job(GOOD, [USER])], TOKENS)[0], NotRenderedError)
    assert popen.started == 1


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_a_child_that_is_killed_says_nothing_of_its_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def killed(*args: Any, **kwargs: Any) -> Any:
        child = real(*args, **kwargs)
        child.send_signal(getattr(signal, name))
        return child

    monkeypatch.setattr(subprocess, "Popen", killed)
    answer = render_all([Job(GOOD, [USER])], TOKENS)[0]
    assert isinstance(answer, NotRenderedError)
    assert f"was ended by {name}" in str(answer)


def test_a_template_without_time_left_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CPU_LIMIT", 1000)
    monkeypatch.setattr(rendering, "CHILD_LIMIT", 2.0)
    monkeypatch.setattr(rendering, "CALL_LIMIT", 2.5)
    loops = [Job(HOSTILE["endless loop"][0] + str(number), [USER]) for number in range(2)]
    first, second = render_all(loops, TOKENS)
    assert isinstance(first, EndlessError)
    assert isinstance(second, NotRenderedError), "it had less time than a template may take"


@pytest.mark.parametrize("name", ["endless loop", "a long text", "a syntax error", "a size"])
def test_what_a_template_does_wrong_is_its_own_fault(name: str) -> None:
    assert not isinstance(render_all([Job(HOSTILE[name][0], [USER])], TOKENS)[0], NotRenderedError)


def test_nothing_to_render() -> None:
    assert render_all([], TOKENS) == []


@pytest.mark.parametrize(
    ("installed", "wanted"), [("3.1.5", "pip install 'jinja2>=3.1.6'"), (None, "pip install 'jinja2>=3.1.6'")]
)
def test_an_old_jinja2_renders_nothing(monkeypatch: pytest.MonkeyPatch, installed: str | None, wanted: str) -> None:
    monkeypatch.setattr(hosts, "installed", lambda name: Version(installed) if installed else None)
    assert wanted in error_of(GOOD)


def test_the_room_needs_no_host() -> None:
    code = (
        "import sys, ptfix.chat_templates.diagnosis\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'jinja2') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- generation tags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{{ 'a' }}{%- generation -%}\n b {%- endgeneration +%}c", "{{ 'a' }}bc"),
        (
            "{% if x %}\n  {% generation %}\n  {{ x }}\n  {% endgeneration %}\n{% endif %}",
            "{% if x %}\n  {{ x }}\n{% endif %}",
        ),
        ("{# {% generation %} #}{{ '{% generation %}' }}", "{# {% generation %} #}{{ '{% generation %}' }}"),
        ("{% raw %}{% generation %}{% endraw %}", "{% raw %}{% generation %}{% endraw %}"),
        ("x {% generation %}{{- 'y' }}{% endgeneration %}", "x {% if true %}{{- 'y' }}{% endif %}"),
        ("{% generation", "{% generation"),
        ("", ""),
    ],
)
def test_strip_generation_tags(template: str, wanted: str) -> None:
    assert strip_generation_tags(template) == wanted


def test_strip_generation_tags_of_real_templates() -> None:
    pairs = [(text, strip_generation_tags(text)) for text in real.trl().values()]
    pairs = [(text, stripped) for text, stripped in pairs if stripped != text]
    assert pairs
    for messages, prompt in itertools.product(([USER], [USER, ANSWER]), (False, True)):
        answers = render_all([Job(text, messages, prompt) for text in itertools.chain(*pairs)], TOKENS)
        for (text, _), before, after in zip(pairs, answers[::2], answers[1::2], strict=True):
            assert str(after) == str(before), text


_SIGNS = st.sampled_from(["", "-", "+"])
_TEXT = st.text(alphabet=" \n\tab", max_size=4)


@st.composite
def _templates(draw: st.DrawFn, depth: int = 2) -> str:
    """Texts with much white space, tags of every kind, and generation tags in every dash variant."""
    parts = [draw(_TEXT)]
    for _ in range(draw(st.integers(0, 3))):
        one, two, three, four = (draw(_SIGNS) for _ in range(4))
        inner = draw(_templates(depth - 1)) if depth else draw(_TEXT)
        parts += [
            draw(
                st.sampled_from(
                    [
                        f"{{%{one} generation {two}%}}{inner}{{%{three}endgeneration {four}%}}",
                        f"{{%{one} if true {two}%}}{inner}{{%{three} endif {four}%}}",
                        f"{{{{{one.strip('+')} {{'a': {{}}}}['a'] or '%}}' {two.strip('+')}}}}}",
                        f"{{#{one} {{% generation %}} {two}#}}",
                        f"{{%{one} raw {two.strip('+')}%}}{{% generation %}}{{%{three} endraw {four}%}}",
                    ]
                )
            ),
            draw(_TEXT),
        ]
    return "".join(parts)


@settings(max_examples=12, deadline=None)
@given(st.lists(_templates(), min_size=40, max_size=40))
def test_stripped_templates_render_the_same(templates: list[str]) -> None:
    pairs = [(template, strip_generation_tags(template)) for template in templates]
    answers = render_all([Job(text, []) for text in itertools.chain(*pairs)], {})
    for (template, stripped), before, after in zip(pairs, answers[::2], answers[1::2], strict=True):
        assert isinstance(before, str), (template, before)
        assert after == before, (template, stripped)
