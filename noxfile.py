"""The compatibility matrix: one environment for each cell of compat_matrix.yaml, made from its exact pins.

nox -s "matrix(transformers='4.44.2', peft='0.11.1')"   # one pair
nox -s matrix-all -- --jobs 2                           # all that are not measured yet; --fresh: all
nox -s matrix-quick                                     # a few pairs, the central modes, nothing written
nox -s soft-prompts                                     # the same pairs: checks, probes, all architectures
nox -s chat-templates                                   # what each release saves, every other loads
nox -s sequence-length                                  # guard, warmup and retention where the Trainer's hooks differ
nox -s mutants                                          # changes to ptfix that no test notices; hours
nox -s newest                                           # the newest hosts on the index, whatever they are; -- --pre
"""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nox
import yaml

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["matrix-quick"]

MATRIX = Path(__file__).with_name("compat_matrix.yaml")
CELLS = yaml.safe_load(MATRIX.read_text(encoding="utf-8"))["cells"]
PINS = {(cell["pins"]["transformers"], cell["pins"]["peft"]): cell["pins"] for cell in CELLS}
#: the oldest, the seeds (KeyError, silent no-op twice), the first of transformers 5; the newest runs in the test suite
QUICK = [
    ("4.36.2", "0.7.1"),
    ("4.44.2", "0.11.1"),
    ("4.45.2", "0.12.0"),
    ("4.54.1", "0.16.0"),
    ("4.57.6", "0.13.2"),
    ("5.0.0", "0.18.1"),
]

#: on both sides of each change in how a release saves or loads chat templates
SAVERS = [
    ("4.36.2", "0.7.1"),
    ("4.43.4", "0.11.1"),
    ("4.46.3", "0.13.2"),
    ("4.51.3", "0.15.2"),
    ("4.52.4", "0.15.2"),
    ("4.57.6", "0.17.1"),
    ("5.0.0", "0.18.1"),
    ("5.24.0", "0.21.2"),
]
SAVING = ("tests/chat_templates/test_saving.py", "tests/chat_templates/test_parity.py")

#: on both sides of each change in how a Trainer takes its batches
TRAINERS = [
    ("4.36.2", "0.7.1"),
    ("4.46.3", "0.13.2"),
    ("4.51.3", "0.15.2"),
    ("4.57.6", "0.17.1"),
    ("5.0.0", "0.18.1"),
    ("5.24.0", "0.21.2"),
]

#: generate() and forward() in every mode, and the tutorial
CENTRAL = (
    "tests/matrix/test_exact.py",
    "tests/matrix/test_stories.py",
    "tests/soft_prompts/test_architectures.py",
    "tests/soft_prompts/test_generation.py",
    "tests/soft_prompts/test_padding_and_windows.py",
    "tests/soft_prompts/test_padding_on_the_right.py",
    "tests/test_tutorial.py",
)

#: what `newest` asks of a pair that nobody has seen
NEWEST = {
    "modes": (
        "python",
        "-m",
        "tests.matrix.run",
        "--runners",
        "ptfix",
        "--architectures",
        "llama,qwen2,gemma2,gpt2",
        "--methods",
        "prompt_tuning,prefix_tuning",
    ),
    "forward": ("python", "-m", "tests.matrix.forward_unchanged", "llama", "gemma3_text", "gpt2", "roberta"),
    "stories": ("pytest", "-q", "tests/matrix/test_stories.py", "tests/test_tutorial.py"),
    "templates": ("pytest", "-q", "tests/chat_templates/test_readers.py", *SAVING),
    "lengths": ("pytest", "-q", "tests/sequence_length/test_guard.py", "tests/sequence_length/test_warmup_callback.py"),
}
# Without trl, whose own bounds would choose the hosts.
NEWEST_TOOLS = ("accelerate", "gguf", "hypothesis", "jinja2", "packaging", "pytest", "pyyaml", "tqdm")
FLOORS = {"transformers": "4.36", "peft": "0.6"}
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
MUTMUT = "mutmut==3.8.1"
WHICH = "import ptfix; print(*map(' '.join, ptfix.status().hosts.items()), sep=', ', end='')"

INTERPRETERS = Path(__file__).with_name(".nox") / "interpreters"

for ours, theirs in (("UV_FIND_LINKS", "PIP_FIND_LINKS"), ("SSL_CERT_FILE", "PIP_CERT")):
    if theirs in os.environ:  # pip's own settings hold for uv, which names them otherwise
        os.environ.setdefault(ours, os.environ[theirs])


def _environment(session: nox.Session, transformers: str, peft: str) -> None:
    pins = [f"{name}=={version}" for name, version in PINS[transformers, peft].items()]
    session.install(*pins, "pytest", "packaging", "pyyaml")
    session.install("--no-deps", "-e", ".")
    session.env.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


@nox.session(name="matrix")
@nox.parametrize("transformers,peft", list(PINS))
def matrix(session: nox.Session, transformers: str, peft: str) -> None:
    """Measure one pair in full and write its cell."""
    _environment(session, transformers, peft)
    session.run("python", "-m", "tests.matrix.run", "--record", *session.posargs, success_codes=[0, 1])
    if _cell(transformers, peft).get("imports", True):
        session.run("pytest", "-q", "tests/matrix/test_stories.py", "tests/test_tutorial.py")


@nox.session(name="matrix-all", venv_backend="none")
def matrix_all(session: nox.Session) -> None:
    """Measure every pair without a result yet, several at once (--jobs N); --fresh measures all of them."""
    jobs = (
        int(session.posargs[session.posargs.index("--jobs") + 1])
        if "--jobs" in session.posargs
        else os.cpu_count() or 1
    )
    todo = [pair for pair in PINS if "--fresh" in session.posargs or "imports" not in _cell(*pair)]

    def run(pair: tuple[str, str]) -> int:
        name = "matrix(transformers='{}', peft='{}')".format(*pair)
        return subprocess.run([sys.executable, "-m", "nox", "-s", name], check=False).returncode

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        failed = [pair for pair, code in zip(todo, pool.map(run, todo), strict=True) if code]
    if failed:
        session.error(f"failed: {failed}")


@nox.session(name="matrix-quick")
@nox.parametrize("transformers,peft", QUICK)
def matrix_quick(session: nox.Session, transformers: str, peft: str) -> None:
    """The stories' pairs: the test suite's matrix folder, nothing written."""
    _environment(session, transformers, peft)
    session.run("pytest", "-q", *CENTRAL, *SAVING)


@nox.session(name="soft-prompts")
@nox.parametrize("transformers,peft", QUICK)
def soft_prompts(session: nox.Session, transformers: str, peft: str) -> None:
    """What takes longer on the stories' pairs: the first-use check, probes, the second line, every architecture."""
    _environment(session, transformers, peft)
    session.run("pytest", "-q", "tests/soft_prompts", "tests/matrix/test_forward_unchanged.py", *session.posargs)


@nox.session(name="savers")
@nox.parametrize("transformers,peft", SAVERS)
def savers(session: nox.Session, transformers: str, peft: str) -> None:
    """How the release of one pair saves and loads chat templates, and what ptfix makes of it."""
    _environment(session, transformers, peft)
    session.install("gguf")
    session.run("pytest", "-q", "tests/chat_templates/test_readers.py", *SAVING)
    (INTERPRETERS / transformers).write_text(f"{session.bin}/python", encoding="utf-8")


@nox.session(name="chat-templates", venv_backend="none")
def chat_templates(session: nox.Session) -> None:
    """Test every release of SAVERS, then let each load what every other has saved, and print the tables."""
    INTERPRETERS.mkdir(parents=True, exist_ok=True)
    for pair in SAVERS:
        session.run(sys.executable, "-m", "nox", "-s", "savers(transformers='{}', peft='{}')".format(*pair))
    pythons = [(INTERPRETERS / transformers).read_text(encoding="utf-8") for transformers, _ in SAVERS]
    with tempfile.TemporaryDirectory() as scratch:
        session.run(sys.executable, "-m", "tests.chat_templates.releases", *pythons)
        session.run(sys.executable, "-m", "tests.chat_templates.across", "all", scratch, *pythons)


@nox.session(name="sequence-length")
@nox.parametrize("transformers,peft", TRAINERS)
def sequence_length(session: nox.Session, transformers: str, peft: str) -> None:
    """Real training runs with the callbacks that watch and change the length of rows."""
    _environment(session, transformers, peft)
    session.install("hypothesis")
    session.run("pytest", "-q", "tests/sequence_length", "tests/test_report_command.py", *session.posargs)


@nox.session(name="newest")
def newest(session: nox.Session) -> None:
    """What the newest transformers and peft on the index make of ptfix, in a quarter of an hour; nothing is written.

    `-- --pre` takes their pre-releases too.
    """
    lowest = ".dev0" if "--pre" in session.posargs else ""  # names a pre-release, which lets these two have one
    hosts = [f"{name}>={floor}{lowest}" for name, floor in FLOORS.items()]
    torch = next(line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    session.install("--upgrade", torch, *hosts, *NEWEST_TOOLS)
    session.install("--no-deps", "-e", ".")
    session.env.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    short = [what for what, command in NEWEST.items() if not _passes(session, *command)]
    found = session.run("python", "-c", WHICH, silent=True)
    if short:
        session.error(f"{found}: falls short in {', '.join(short)}; what does is printed above")
    session.log(f"{found}: nothing falls short")


@nox.session(name="mutants")
def mutants(session: nox.Session) -> None:
    """Change ptfix in one place at a time and list the changes that no test notices (`mutmut show NAME` prints one).

    `-- "ptfix.patching*"` takes the mutants of one file, which take minutes; all of them take hours.
    """
    session.install("-c", str(CONSTRAINTS), "-e", ".[test]", MUTMUT)
    session.env.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    session.run("mutmut", "run", *session.posargs)
    session.run("mutmut", "results")


def _passes(session: nox.Session, *command: str) -> bool:
    try:
        session.run(*command)
    except nox.command.CommandFailed:
        return False
    return True


def _cell(transformers: str, peft: str) -> dict[str, object]:
    cells = yaml.safe_load(MATRIX.read_text(encoding="utf-8"))["cells"]
    return next(c for c in cells if (c["pins"]["transformers"], c["pins"]["peft"]) == (transformers, peft))
