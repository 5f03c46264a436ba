"""What lands on disk when a registered tokenizer is saved, by whomever, on the installed release."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ptfix
from ptfix.chat_templates import choosing, files, readers, register, rendering, saving
from ptfix.chat_templates.readers import READERS, Folder, ReadError
from tests.chat_templates import stories
from tests.chat_templates.stale import STALE
from tests.chat_templates.stories import INFERENCE, TRAINING


@pytest.fixture(autouse=True)
def _applied() -> Iterator[None]:
    ptfix.apply()
    saving.warn.cache_clear()
    yield
    ptfix.revert()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    stories.publish(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(base: Path) -> Any:
    """The base model's tokenizer with the script's training template on it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TRAINING
    return tokenizer


def loaded(folder: Path) -> set[str | None]:
    """What the readers that look at such a folder load: one template where all is well.

    But for the processors of 4.42, which read a key that would hide what any later release saves.
    """
    place = Folder(folder)
    readers = (reader for reader in READERS if reader.reads(place) and "4.42 " not in reader.id)
    return {reader.read(place).default for reader in readers}


def test_the_story_without_ptfix(tuned: Any, tmp_path: Path) -> None:
    ptfix.revert()
    tuned.save_pretrained(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = again.apply_chat_template(stories.CHATS[0][:1], tokenize=False, add_generation_prompt=True)
    assert not asked.endswith(stories.HEADER)


def test_the_minicpmv_story(base: Path, tuned: Any, tmp_path: Path) -> None:
    before = stories.rows(tuned)
    stories.trainer(base, tmp_path / "out", tuned, ptfix.callbacks()).train()
    assert tuned.chat_template == TRAINING
    assert stories.rows(tuned) == before
    for step in (1, 2):
        assert loaded(tmp_path / "out" / f"checkpoint-{step}") == {INFERENCE}
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert again.chat_template == INFERENCE
    prompt = again.apply_chat_template(stories.CHATS[0][:1], tokenize=False, add_generation_prompt=True)
    ids = again(prompt, add_special_tokens=False)["input_ids"]
    assert ids == before[0]["input_ids"][: len(ids)]
    assert before[0]["labels"][len(ids) - 1 : len(ids) + 1] == [-100, before[0]["input_ids"][len(ids)]]


def test_what_the_trainer_would_upload(base: Path, tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str | None]] = []

    def upload_folder(*args: Any, folder_path: Any, **kwargs: Any) -> Any:
        sent.append(loaded(Path(folder_path)))
        done: Future[str] = Future()
        done.set_result("https://huggingface.co/somebody/model")
        return done

    class Repo:
        repo_id = "somebody/model"

    for module in (transformers.trainer, transformers.utils.hub):
        for name, stand_in in (("upload_folder", upload_folder), ("create_repo", lambda *args, **kwargs: Repo)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    if hasattr(transformers.trainer, "hf_api"):  # since 5.2x through one client
        client = type("Client", (), {"upload_folder": staticmethod(upload_folder), "create_repo": lambda *a, **k: Repo})
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: client())
    trainer = stories.trainer(
        base, tmp_path / "out", tuned, ptfix.callbacks(), push_to_hub=True, hub_model_id="somebody/model"
    )
    monkeypatch.setattr(type(trainer), "create_model_card", lambda *args, **kwargs: None)
    trainer.train()
    trainer.push_to_hub()
    assert len(sent) >= 2
    assert all(templates == {INFERENCE} for templates in sent)


def uploads(monkeypatch: pytest.MonkeyPatch) -> list[set[str | None]]:
    """What ``save_pretrained(push_to_hub=True)`` sends, with no hub: the templates of each upload."""
    sent: list[set[str | None]] = []
    ptfix.revert()
    mixin = transformers.utils.hub.PushToHubMixin
    monkeypatch.setattr(
        mixin,
        "_upload_modified_files",
        lambda self, working_dir, *args, **kwargs: sent.append(defaults(Path(working_dir))),
    )
    if hasattr(mixin, "_create_repo"):
        monkeypatch.setattr(mixin, "_create_repo", lambda self, repo_id, **kwargs: repo_id)
    base_module = transformers.tokenization_utils_base
    answer = type("Answer", (), {"repo_id": "x"})
    if hasattr(base_module, "create_repo"):
        monkeypatch.setattr(base_module, "create_repo", lambda *args, **kwargs: answer)
    if hasattr(base_module, "hf_api"):
        monkeypatch.setattr(
            base_module, "hf_api", lambda: type("Client", (), {"create_repo": lambda *args, **kwargs: answer})()
        )
    ptfix.apply()
    return sent


def test_save_pretrained_uploads_what_it_leaves(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = uploads(monkeypatch)
    register(tuned)
    tuned.save_pretrained(str(tmp_path / "out"), push_to_hub=True, repo_id="x")
    assert sent == [{INFERENCE}]
    ptfix.revert()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda obj: pickle.loads(pickle.dumps(obj))])
def test_a_copy_saves_as_its_original(tuned: Any, tmp_path: Path, copied: Any) -> None:
    register(tuned)
    twin = copied(tuned)
    twin.save_pretrained(tmp_path / "out")
    assert loaded(tmp_path / "out") == {INFERENCE}
    assert twin.chat_template == tuned.chat_template == TRAINING


def test_nothing_of_ours_is_written_but_templates(tuned: Any, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path / "stock")
    register(tuned)
    tuned.save_pretrained(tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names - {"chat_template.jinja"} == {path.name for path in (tmp_path / "stock").iterdir()} - {
        "chat_template.jinja"
    }
    stock, ours = (
        json.loads((tmp_path / name / "tokenizer_config.json").read_text("utf-8")) for name in ("stock", "ours")
    )
    assert {**stock, "chat_template": INFERENCE} == ours


def test_the_names_of_what_was_saved_come_back(tuned: Any, tmp_path: Path) -> None:
    stock = {Path(name).name for name in tuned.save_pretrained(str(tmp_path / "stock"))}
    register(tuned)
    names = tuned.save_pretrained(str(tmp_path / "ours"))
    assert {Path(name).parent for name in names} == {tmp_path / "ours"}
    assert {Path(name).name for name in names} >= stock - {"chat_template.jinja"}


def test_a_save_that_fails_leaves_what_was_there(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tuned)
    tuned.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    tuned.add_tokens(["another"])

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(tuned), "_save_pretrained", fails)
    with pytest.raises(OSError, match="no space left"):
        tuned.save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert tuned.chat_template == TRAINING


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills its children as POSIX does")
def test_killed_while_saving(tuned: Any, tmp_path: Path) -> None:
    """Every file is whole whenever the process dies, and the next save clears what it left."""
    register(tuned)
    folder = tmp_path / "out"
    tuned.save_pretrained(folder)
    chances = random.Random(0)
    for _ in range(int(os.environ.get("PTFIX_TEST_KILLS", "30"))):
        child = os.fork()
        if child == 0:
            while True:
                tuned.save_pretrained(folder)
        time.sleep(chances.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert loaded(folder) == {INFERENCE}
        json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tuned.save_pretrained(folder)
    assert not list(folder.glob(".*"))


def test_a_tokenizer_that_is_not_registered_is_saved_by_the_host_alone(tuned: Any, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path / "applied")
    ptfix.revert()
    tuned.save_pretrained(tmp_path / "stock")
    for path in (tmp_path / "stock").iterdir():
        assert (tmp_path / "applied" / path.name).read_bytes() == path.read_bytes()


def test_revert_gives_the_host_back(tuned: Any, tmp_path: Path) -> None:
    register(tuned)
    ptfix.revert()
    tuned.save_pretrained(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TRAINING


def test_stale_files_of_an_earlier_save_go(tuned: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("stale")
    (folder / "chat_template.jinja").write_text("stale")
    (folder / "chat_template.json").write_text('{"chat_template": "stale"}')
    register(tuned)
    tuned.save_pretrained(folder)
    assert loaded(folder) == {INFERENCE}
    assert not (folder / "additional_chat_templates").exists()


def test_what_was_asked_for_is_written(tuned: Any, tmp_path: Path) -> None:
    register(tuned, TRAINING + "{# mine #}")
    tuned.save_pretrained(tmp_path / "out")
    assert loaded(tmp_path / "out") == {TRAINING + "{# mine #}"}


def test_without_a_base_the_training_template_is_repaired(tmp_path: Path) -> None:
    tokenizer = stories.tokenizer()
    tokenizer.chat_template = TRAINING
    register(tokenizer)
    tokenizer.save_pretrained(tmp_path / "out")
    (template,) = loaded(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for chat in stories.CHATS:
        asked = again.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(asked)
        assert asked.endswith(stories.HEADER)
    assert str(template).startswith(TRAINING)


def test_a_format_changed_on_purpose_is_repaired_not_replaced(base: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    )
    register(tokenizer)
    tokenizer.save_pretrained(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = again.apply_chat_template(stories.CHATS[0][:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("</s>\n<|assistant|>\n")


def test_other_threads_see_the_training_template_all_the_while(tuned: Any, tmp_path: Path) -> None:
    register(tuned)
    stop, seen = threading.Event(), set()

    def look() -> None:
        while not stop.is_set():
            seen.add(tuned.chat_template)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for turn in range(5):
            tuned.save_pretrained(tmp_path / f"{turn}")
    finally:
        stop.set()
        thread.join()
    assert seen == {TRAINING}


def test_a_processor_and_its_tokenizer_carry_one_template(base: Path, tmp_path: Path) -> None:
    from tests.chat_templates.load import TextProcessor

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    processor = TextProcessor(tokenizer)
    if not hasattr(processor, "chat_template"):
        pytest.skip("a processor of this release has no chat template")
    tokenizer.chat_template = processor.chat_template = TRAINING
    register(processor)
    processor.save_pretrained(tmp_path / "out")
    assert loaded(tmp_path / "out") == {INFERENCE}
    assert processor.chat_template == tokenizer.chat_template == TRAINING
    assert not any("ptfix" in path.read_text("utf-8", "ignore") for path in (tmp_path / "out").iterdir())


def test_a_trainer_without_a_tokenizer_still_saves_the_bases(base: Path, tuned: Any, tmp_path: Path) -> None:
    callbacks = [ptfix.ChatTemplateCallback()]
    trainer = stories.trainer(base, tmp_path / "out", tuned, callbacks, given=False)
    trainer.data_collator = transformers.default_data_collator
    trainer.train_dataset = [
        {name: values[:12] for name, values in row.items()} for row in stories.rows(tuned)
    ]  # all of one length: this collator does not pad
    trainer.train()
    assert loaded(tmp_path / "out" / "checkpoint-2") == {INFERENCE}


def test_a_checkpoint_saved_by_others_is_put_right(
    base: Path, tuned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class SavesAgain(transformers.TrainerCallback):  # as LLaMA-Factory's SaveProcessorCallback does
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            other = transformers.AutoTokenizer.from_pretrained(base)
            other.chat_template = TRAINING
            other.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    with caplog.at_level(logging.WARNING, logger="ptfix"):
        stories.trainer(base, tmp_path / "out", tuned, [SavesAgain(), ptfix.ChatTemplateCallback()]).train()
    assert loaded(tmp_path / "out" / "checkpoint-2") == {INFERENCE}
    assert any("held another chat template" in record.message for record in caplog.records)


def test_the_callback_puts_checkpoints_right_where_apply_was_not_called(base: Path, tuned: Any, tmp_path: Path) -> None:
    ptfix.revert()
    stories.trainer(base, tmp_path / "out", tuned, [ptfix.ChatTemplateCallback()]).train()
    assert loaded(tmp_path / "out" / "checkpoint-2") == {INFERENCE}


def test_training_is_the_same_with_and_without_the_callback(base: Path, tuned: Any, tmp_path: Path) -> None:
    weights = []
    for name, callbacks in (("with", ptfix.callbacks()), ("without", [])):
        trainer = stories.trainer(base, tmp_path / name, tuned, callbacks)
        trainer.train()
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_register_wants_a_tokenizer() -> None:
    with pytest.raises(TypeError, match="takes a tokenizer or processor"):
        register({"chat_template": TRAINING})


def test_two_ranks_save_one_folder(base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*command, "-m", "tests.chat_templates.ranks", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "shared"):
        assert loaded(folder) == {INFERENCE}
        assert not list(folder.glob(".*"))


def test_trl_with_a_training_template(base: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="pip install trl datasets brings SFTTrainer")
    datasets = pytest.importorskip("datasets", reason="pip install trl datasets brings SFTTrainer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    # As trl's own training templates: the answer between marks that give the loss its mask.
    marked = "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"  # noqa: E501
    tokenizer.chat_template = marked
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(base),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=1,
            save_steps=1,
            report_to=[],
            assistant_only_loss=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in stories.CHATS]),
        processing_class=tokenizer,
        callbacks=ptfix.callbacks(),
    )
    trainer.train()
    assert loaded(tmp_path / "out" / "checkpoint-1") == {INFERENCE}
    assert tokenizer.chat_template == marked


# What goes wrong beside the template is no reason for a save to fail.


def defaults(folder: Path) -> set[str | None]:
    """What the readers load that load anything."""
    place, found = Folder(folder), set()
    for reader in READERS:
        with contextlib.suppress(ReadError):
            if reader.reads(place) and reader.loads != "nothing":
                found.add(reader.read(place).default)
    return found


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "ptfix" and record.levelname == "WARNING"]


def saved_as_by_stock(ours: Path, stock: Path) -> None:
    """Every file that the host writes, byte for byte, but for the template in it."""
    places = {"chat_template.jinja", "chat_template.json"}
    for path in stock.iterdir():
        if path.name == "tokenizer_config.json":
            one, other = (json.loads((folder / path.name).read_text("utf-8")) for folder in (ours, stock))
            assert {**one, "chat_template": None} == {**other, "chat_template": None}
        elif path.name not in places:
            assert (ours / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture
def stock(tuned: Any, tmp_path: Path) -> Path:
    """What the host saves alone."""
    ptfix.revert()
    tuned.save_pretrained(tmp_path / "stock")
    ptfix.apply()
    return tmp_path / "stock"


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need privileges elsewhere")
@pytest.mark.parametrize("name", STALE)
def test_a_stale_odd_file_costs_no_save(
    name: str, tuned: Any, stock: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build, words = STALE[name]
    build(tmp_path / "out")
    outside = {path: path.read_bytes() for path in tmp_path.glob("outside-*/**/*") if path.is_file()}
    outside |= {path: path.read_bytes() for path in tmp_path.glob("outside-*") if path.is_file()}
    register(tuned)
    names = tuned.save_pretrained(tmp_path / "out")
    assert {Path(name).parent for name in names} == {tmp_path / "out"}
    saved_as_by_stock(tmp_path / "out", stock)
    assert defaults(tmp_path / "out") == {INFERENCE}
    assert len(said(caplog)) == bool(words), said(caplog)
    assert words in "".join(said(caplog))
    assert {path: path.read_bytes() for path in outside} == outside, "written through a link"
    assert not list((tmp_path / "out").rglob("*.ptfix-tmp"))
    tuned.save_pretrained(tmp_path / "out")
    assert len(said(caplog)) == bool(words), "said again"


def test_a_folder_where_a_file_has_to_be_fails_as_stock_fails(tuned: Any, tmp_path: Path) -> None:
    """transformers from 4.47 on writes chat_template.jinja itself, and cannot: the error is the host's."""
    outcomes = []
    for apply in (False, True):
        folder = tmp_path / f"{apply}"
        (folder / "chat_template.jinja").mkdir(parents=True)
        ptfix.apply() if apply else ptfix.revert()
        register(tuned)
        try:
            tuned.save_pretrained(folder)
        except OSError as error:
            outcomes.append(type(error))
        else:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("several", [False, True], ids=["one template", "several"])
@pytest.mark.parametrize(
    "name", [name for name in STALE if name.partition(" ")[0] in ("broken", "more", "additional_chat_templates")]
)
def test_a_stale_odd_file_costs_no_save_of_a_processor(
    name: str, several: bool, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.chat_templates.load import TextProcessor

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    processor = TextProcessor(tokenizer)
    if not hasattr(processor, "chat_template"):
        pytest.skip("a processor of this release has no chat template")
    STALE[name][0](tmp_path / "out")
    outside = {path: path.read_bytes() for path in tmp_path.glob("outside-*/*")}
    register(processor, {"default": INFERENCE, "tool_use": INFERENCE + "{# tools #}"} if several else INFERENCE)
    tokenizer.chat_template = processor.chat_template = TRAINING
    processor.save_pretrained(tmp_path / "out")
    found = [sentence for sentence in said(caplog) if "ptfix-tmp" not in sentence]
    assert len(found) == len(said(caplog)) <= 1
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_chat_template() == INFERENCE
    assert {path: path.read_bytes() for path in tmp_path.glob("outside-*/*")} == outside


def test_what_is_uploaded_beside_an_odd_file(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    STALE["broken processor_config.json"][0](tmp_path / "out")
    sent = uploads(monkeypatch)
    register(tuned)
    tuned.save_pretrained(str(tmp_path / "out"), push_to_hub=True, repo_id="x")
    assert sent == [{INFERENCE}]
    assert len(said(caplog)) == 1
    assert "processor_config.json is not valid JSON" in said(caplog)[0]


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The operating system refuses every write of ptfix: it makes no file, and no file takes another's place."""
    real_open, real_replace, real_mkdir = os.open, os.replace, os.mkdir

    def opens(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and "ptfix-tmp" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, flags, *args, **kwargs)

    def replaces(source: Any, target: Any, **kwargs: Any) -> None:
        if "ptfix-tmp" in str(source):
            raise OSError(code, os.strerror(code), str(target))
        real_replace(source, target, **kwargs)

    def makes(path: Any, *args: Any, **kwargs: Any) -> None:
        if "ptfix-tmp" in str(path) and code != errno.ENOSPC:
            raise OSError(code, os.strerror(code), str(path))
        real_mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "replace", replaces)
    monkeypatch.setattr(os, "mkdir", makes)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=["permission", "read-only", "full"])
def test_a_system_that_refuses_us_costs_no_save(
    code: int,
    tuned: Any,
    stock: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    register(tuned)
    with monkeypatch.context() as patched:
        refuse(patched, code)
        tuned.save_pretrained(tmp_path / "out")
    saved_as_by_stock(tmp_path / "out", stock)
    assert len(said(caplog)) == 1
    assert os.strerror(code) in said(caplog)[0]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == INFERENCE, "the host wrote it in its own places"


def test_a_disk_without_room_for_a_second_copy(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that overwrites the files that are there needs none, and neither do we."""
    register(tuned)
    tuned.save_pretrained(tmp_path / "out")
    tuned.add_tokens(["another"])
    real = type(tuned)._save_pretrained

    def full(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if "ptfix-tmp" in str(save_directory):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, save_directory, *args, **kwargs)

    monkeypatch.setattr(type(tuned), "_save_pretrained", full)
    tuned.save_pretrained(tmp_path / "out")
    assert "another" in (tmp_path / "out" / "tokenizer.json").read_text("utf-8")
    assert loaded(tmp_path / "out") == {INFERENCE}


def test_a_fault_of_ours_costs_no_save(
    tuned: Any, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a mistake in ptfix")

    register(tuned)
    for number, (owner, name) in enumerate(
        [(saving, "choice"), (files, "publish"), (files, "write_where_possible"), (files._Directory, "clean")]
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fails)
            if name == "write_where_possible":
                patched.setattr(files, "publish", fails)
            tuned.save_pretrained(tmp_path / f"{number}")
        saved_as_by_stock(tmp_path / f"{number}", stock)
        if name != "publish":
            assert "a mistake in ptfix" in said(caplog)[-1]
        else:
            assert loaded(tmp_path / f"{number}") == {INFERENCE}


def test_one_save_looks_at_its_folder_once(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tuned)
    surveys, reads = [], []
    survey, read = files._survey, files.read_bytes
    monkeypatch.setattr(files, "_survey", lambda *args: surveys.append(args) or survey(*args))
    monkeypatch.setattr(files, "read_bytes", lambda path, *args: reads.append(path.name) or read(path, *args))
    for _ in range(2):
        surveys.clear()
        reads.clear()
        tuned.save_pretrained(tmp_path / "out")
        assert len(surveys) == 1
        assert max(map(reads.count, reads)) <= 2, "once to plan, and once to see that it is still so"


# What could not be judged.


class Starts:
    """subprocess.Popen that the system refuses so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refusals: float) -> None:
        self.refusals, self.real = refusals, subprocess.Popen
        monkeypatch.setattr(subprocess, "Popen", self)
        monkeypatch.setattr(rendering, "_PAUSE", 0.0)
        choosing._judge.cache_clear()
        choosing._difference.cache_clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.refusals > 0:
            self.refusals -= 1
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return self.real(*args, **kwargs)


def test_a_failed_child_is_not_remembered(
    tuned: Any, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    starts = Starts(monkeypatch, refusals=math.inf)
    register(tuned)
    tuned.save_pretrained(tmp_path / "1")
    saved_as_by_stock(tmp_path / "1", stock)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "1").chat_template == TRAINING
    assert len(said(caplog)) == 1
    assert f"could not be judged, so {tmp_path / '1'} is saved with the one in memory" in said(caplog)[0]
    assert "Cannot allocate memory" in said(caplog)[0]
    starts.refusals = 0
    tuned.save_pretrained(tmp_path / "2")
    assert loaded(tmp_path / "2") == {INFERENCE}
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("refusals", range(2, 8))
def test_a_child_that_fails_in_the_middle_decides_nothing(
    refusals: int, tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a later candidate either: the base model's template stays the first choice."""
    starts = Starts(monkeypatch, refusals=0)
    real = starts.real
    calls = iter(range(100))

    def middle(*args: Any, **kwargs: Any) -> Any:
        if next(calls) in (refusals - 2, refusals - 1):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", middle)
    register(tuned)
    for step in range(3):
        tuned.save_pretrained(tmp_path / f"{step}")
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / f"{step}").chat_template in (INFERENCE, TRAINING)
    assert loaded(tmp_path / "2") == {INFERENCE}


def test_the_last_judgement_stands_while_nobody_can_judge(
    tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(tuned)
    tuned.save_pretrained(tmp_path / "1")
    Starts(monkeypatch, refusals=math.inf)
    tuned.save_pretrained(tmp_path / "2")
    assert loaded(tmp_path / "2") == {INFERENCE}
    assert "was right when it was last judged" in said(caplog)[0]
    tuned.chat_template = TRAINING + "{# another #}"  # of which nothing is known
    tuned.save_pretrained(tmp_path / "3")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "3").chat_template == TRAINING + "{# another #}"
    assert "the one in memory" in said(caplog)[1]


def test_a_base_that_cannot_be_read_now_is_read_later(
    base: Path, tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, place: Any) -> None:
        raise ReadError("tokenizer_config.json cannot be read: Input/output error")

    saving._loaded_from.cache_clear()
    tuned.init_kwargs.pop("chat_template", None)
    register(tuned, base=base)
    vars(tuned)[saving._MARK].pop("first_seen")
    with monkeypatch.context() as patched:
        patched.setattr(readers.Reader, "read", fails)
        found = saving.choice(tuned)
    assert found.source == "the training template, repaired"
    assert "Input/output error" in found.reasons[0]
    assert saving.choice(tuned).source == "the template of the base model"
