"""ChatTemplateCallback and every fault: the run ends with the weights of stock, and what is wrong is said.

Each row of FAULTS is a real training; the fault is put into the folder, the operating system, or a function of ptfix.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ptfix
from ptfix.callbacks import chat_template
from ptfix.chat_templates import choosing, files, parity, readers, rendering, saving
from ptfix.chat_templates.readers import READERS, Folder, ReadError
from tests.chat_templates import stories
from tests.chat_templates.stale import STALE
from tests.chat_templates.stories import INFERENCE, TRAINING
from tests.chat_templates.test_saving import refuse

STEPS = (1, 2)


@dataclass(frozen=True)
class Fault:
    """What happens, what is said of it, and what the checkpoints hold all the same."""

    inject: Callable[[pytest.MonkeyPatch, Path], object]
    #: A part of each warning, in order; {} is a checkpoint's folder.
    said: tuple[str, ...]
    #: What the newest release loads from each checkpoint.
    left: tuple[str, str] = (INFERENCE, INFERENCE)
    #: Is it a fault that on_problem="raise" raises?
    raises: bool = True

    @property
    def of_a_save(self) -> bool:
        """Is it found when something is saved, and not before?"""
        return "checkpoints may get another chat template" not in self.said and "first batch" not in self.said[0]


def stale(name: str) -> Fault:
    def inject(patched: pytest.MonkeyPatch, out: Path) -> None:
        for step in STEPS:
            STALE[name][0](out / f"checkpoint-{step}")

    words = STALE[name][1]
    return Fault(inject, (words,) * (2 if words else 0), raises=bool(words))


def no_child(patched: pytest.MonkeyPatch, out: Path, until: str = "nowhere") -> None:
    """No process can be started, until there is a certain folder (tmp-NAME before transformers 4.39)."""
    real = subprocess.Popen

    def refuses(*args: Any, **kwargs: Any) -> Any:
        if not any(out.glob(f"*{until}")):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(*args, **kwargs)

    patched.setattr(subprocess, "Popen", refuses)
    patched.setattr(rendering, "_PAUSE", 0.0)


def killed_child(patched: pytest.MonkeyPatch, out: Path) -> None:
    real = subprocess.Popen

    def kills(*args: Any, **kwargs: Any) -> Any:
        child = real(*args, **kwargs)
        child.kill()
        return child

    patched.setattr(subprocess, "Popen", kills)


def broken(owner: Any, name: str, error: Exception) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    return lambda patched, out: patched.setattr(owner, name, fails)


MISTAKE = RuntimeError("a mistake in ptfix")
NOT_JUDGED = "could not be judged, so {} is saved with the one in memory"
FAULTS = {
    **{f"stale: {name}": stale(name) for name in STALE},
    "no child": Fault(no_child, (NOT_JUDGED,) * 2, (TRAINING, TRAINING)),
    "no child until the second checkpoint": Fault(
        lambda patched, out: no_child(patched, out, until="checkpoint-2"), (NOT_JUDGED,), (TRAINING, INFERENCE)
    ),
    "killed child": Fault(killed_child, (NOT_JUDGED,) * 2, (TRAINING, TRAINING)),
    "no disk": Fault(
        lambda patched, out: refuse(patched, errno.ENOSPC), ("No space left on device",) * 2, (INFERENCE, INFERENCE)
    ),
    "no permission": Fault(
        lambda patched, out: refuse(patched, errno.EACCES), ("Permission denied",) * 2, (INFERENCE, INFERENCE)
    ),
    "out of memory in the question": Fault(
        broken(transformers.LlamaForCausalLM, "generate", torch.cuda.OutOfMemoryError("CUDA out of memory")),
        ("the model could not be asked a question: OutOfMemoryError: CUDA out of memory",),
    ),
    "unreadable rows": Fault(
        broken(parity, "judge", ValueError("no such row")),
        ("the first batch could not be checked: ValueError: no such row",),
    ),
    "a mistake at the beginning": Fault(
        broken(saving, "at_train_begin", MISTAKE), ("checkpoints may get another chat template",)
    ),
    "a mistake in register": Fault(
        broken(saving, "register", MISTAKE), ("checkpoints may get another chat template",), (TRAINING, TRAINING)
    ),
    "a mistake in choice": Fault(
        broken(saving, "choice", MISTAKE),
        (
            "checkpoints may get another chat template",
            *("not in every place of {}", "{} could not be checked") * 2,
            "the model could not be asked a question",
        ),
        (TRAINING, TRAINING),
    ),
    "a mistake in write": Fault(
        broken(files, "write_where_possible", MISTAKE), ("{} could not be checked: RuntimeError: a mistake",) * 2
    ),
    "a mistake in publish": Fault(broken(files, "publish", MISTAKE), (), raises=False),
    "an unreadable base model": Fault(
        broken(readers.Reader, "read", ReadError("cannot be read: Input/output error")), (), raises=False
    ),
    "no home folder": Fault(
        broken(choosing, "base_folder", RuntimeError("Could not determine home directory.")),
        ("checkpoints may get another chat template",),
        (TRAINING, TRAINING),
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    stories.publish(folder)
    return folder


def tuned(base: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TRAINING
    return tokenizer


def trained(base: Path, out: Path, callbacks: list[Any]) -> torch.Tensor:
    """The weights that a run of two steps ends with."""
    trainer = stories.trainer(base, out, tuned(base), callbacks)
    trainer.train()
    assert trainer.state.global_step == 2
    return weights(trainer.model)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def stock(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run without ptfix ends with."""
    assert ptfix.status().rows[0].status is not ptfix.Status.APPLIED
    return trained(base, tmp_path_factory.mktemp("stock"), [])


@pytest.fixture
def _applied(stock: Any) -> Iterator[None]:
    """Stock runs first, and without ptfix; no judgement of another test is left."""
    ptfix.apply()
    for cache in (saving.warn, saving._loaded_from, choosing._judge, choosing._difference):
        cache.cache_clear()
    yield
    ptfix.revert()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "ptfix" and record.levelno >= logging.WARNING]


needs_posix = pytest.mark.skipif(os.name != "posix", reason="symbolic links need privileges elsewhere")


@needs_posix
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("_applied")
def test_a_fault_costs_no_run(
    name: str, base: Path, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fault = FAULTS[name]
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        fault.inject(patched, out)
        callback = ptfix.ChatTemplateCallback(smoke_tokens=2)
        assert torch.equal(trained(base, out, [callback]), stock)
    said = [sentence for sentence in warnings(caplog) if "the model answers nothing" not in sentence]
    assert len(said) == len(fault.said), said
    folders = [out / f"checkpoint-{step}" for step in STEPS]
    for sentence, words in zip(said, fault.said, strict=True):
        assert any(words.format(folder) in sentence for folder in folders), sentence
    for folder, template in zip(folders, fault.left, strict=True):
        found = transformers.AutoTokenizer.from_pretrained(folder).chat_template
        assert (found if isinstance(found, str) else found["default"]) == template
        assert not list(folder.rglob("*.ptfix-tmp"))
        saved = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.isfinite(weights(saved)).all()
    assert torch.equal(weights(saved), stock)


@needs_posix
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.raises])
@pytest.mark.usefixtures("_applied")
def test_a_fault_is_raised_where_that_was_asked_for(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the host has saved: what it saved is whole."""
    fault, out = FAULTS[name], tmp_path / "out"
    with monkeypatch.context() as patched:
        fault.inject(patched, out)
        callback = ptfix.ChatTemplateCallback(smoke_tokens=2, on_problem="raise")
        with pytest.raises(chat_template.ChatTemplateError):
            trained(base, out, [callback])
    saved = out / "checkpoint-1"
    assert saved.is_dir() or not fault.of_a_save
    if fault.of_a_save:
        transformers.AutoModelForCausalLM.from_pretrained(saved)
        transformers.AutoTokenizer.from_pretrained(saved)


@pytest.mark.usefixtures("_applied")
def test_an_error_of_the_host_stays_the_hosts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "_save_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(base, tmp_path / "out", [ptfix.ChatTemplateCallback()])


@pytest.mark.usefixtures("_applied")
def test_the_hosts_error_in_a_save_that_stock_would_not_make_is_ours(
    base: Path, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer has no tokenizer, so that it is this callback that saves one."""
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "_save_pretrained", lambda *a, **k: 1 / 0)
    trainer = stories.trainer(base, tmp_path / "out", tuned(base), [ptfix.ChatTemplateCallback()], given=False)
    trainer.data_collator = transformers.default_data_collator
    trainer.train_dataset = [
        {name: values[:12] for name, values in row.items()} for row in stories.rows(tuned(base))
    ]  # all of one length: this collator has no tokenizer, and does not pad
    trainer.train()
    assert trainer.state.global_step == 2
    *_, one, other = warnings(caplog)  # the first is of these short rows
    assert all("could not be checked: ZeroDivisionError" in sentence for sentence in (one, other))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("sharded", [False, True], ids=["two ranks", "sharded model"])
def test_a_fault_costs_no_run_of_two_ranks(sharded: bool, base: Path, tmp_path: Path) -> None:
    from tests.ranks.test_ranks import SHARDING

    if sharded and not _has_fsdp2():
        pytest.skip("this accelerate has no FSDP2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*command, "-m", "tests.callbacks.ranks", str(base), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(SHARDING if sharded else {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    stock, ours = (torch.load(tmp_path / f"{who}.pt") for who in ("stock", "ptfix"))
    assert stock.keys() == ours.keys()
    assert stock
    assert all(torch.equal(tensor, ours[name]) for name, tensor in stock.items())
    for step in STEPS:
        folder = tmp_path / "ptfix" / f"checkpoint-{step}"
        place, found = Folder(folder), set()
        for reader in READERS:
            with contextlib.suppress(ReadError):
                found |= {reader.read(place).default} if reader.reads(place) and reader.loads != "nothing" else set()
        assert found == {INFERENCE}
        sentence = f"not in every place of {folder} where readers look"
        assert ran.stderr.count(sentence) == 1, "one warning, of one rank"
    assert ran.stderr.count("the model was not asked a question") == sharded


def _has_fsdp2() -> bool:
    from accelerate.utils import FullyShardedDataParallelPlugin

    return "fsdp_version" in FullyShardedDataParallelPlugin.__dataclass_fields__
