"""`ptfix verify` on adapters saved by the installed pair, on tiny models made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

import ptfix
from ptfix import cli, hosts
from ptfix.soft_prompts.proof import reference, survey
from tests.matrix.models import METHODS, NotInThisPair, adapter_config, base_model, wrap


def save(folder: Path, architecture: str, method: str) -> tuple[Path, Path]:
    """A base model and an adapter on it, in two folders."""
    base = base_model(architecture)
    base.save_pretrained(folder / "base")
    ptfix.apply()  # up to peft 0.11 a prefix for grouped-query attention cannot be made, or trained, without
    model = wrap(base, method)
    ptfix.revert()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save(tmp_path_factory.mktemp("llama"), "llama", "prompt_tuning")


@pytest.fixture
def adapter(saved: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(saved[1], tmp_path / "adapter"))


def verify(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence of an input that cannot be used."""
    status, out, err = verify(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ptfix: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def change(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("llama", method) for method in METHODS] + [("gpt2", "prompt_tuning"), ("qwen2", "p_tuning")],
)
def test_with_ptfix_every_mode_is_exact(
    architecture: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        adapter_config(method)
        _, adapter = save(tmp_path, architecture, method)
    except NotInThisPair as reason:
        pytest.skip(str(reason))
    status, out, _ = verify(capsys, adapter, "--json")
    found = json.loads(out)
    assert [mode for mode in found["modes"] if mode["verdict"] not in ("exact", "host")] == []
    assert (status, found["good"], found["acts"]) == (0, True, True)
    assert {mode["mode"] for mode in found["modes"]} == set(survey.MODES)
    assert found["hosts"] == hosts.versions()


def test_story_1_stock_hosts_that_ignore_the_adapter_are_found_out(
    saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`--stock` says of greedy what a plain comparison, made here by hand, says."""
    base, adapter = saved
    ptfix.revert()
    model = PeftModel.from_pretrained(base_model("llama"), str(adapter)).eval()
    row = torch.tensor([[12, 40, 33, 20, 51]])
    options = {"attention_mask": torch.ones_like(row), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    try:
        out = model.generate(input_ids=row, **options)
    except Exception:
        expected = "raises"
    else:
        plain = model.base_model.generate(input_ids=row, **options)
        right = torch.equal(out, reference.greedy(model, row, 6)[0])
        expected = "exact" if right else "ignored" if torch.equal(out, plain) else "wrong"
    status, text, _ = verify(capsys, adapter, "--base", base, "--stock", "--json")
    found = json.loads(text)
    verdicts = {mode["mode"]: mode["verdict"] for mode in found["modes"]}
    assert verdicts["greedy"] == expected
    assert found["acts"]  # the training forward was never in doubt
    assert status == int(any(verdict not in ("exact", "host") for verdict in verdicts.values()))


def test_the_table_for_people(saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = verify(capsys, saved[1])
    assert status == 0, out
    assert "prompt tuning, 5 virtual tokens" in out
    assert "second turn, returned cache" in out
    assert out.splitlines()[-1].startswith("good: ")


def test_an_adapter_without_effect_is_a_problem(
    saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def powerless(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.base_model(input_ids=input_ids)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    monkeypatch.setattr("peft.PeftModelForCausalLM.forward", powerless)
    monkeypatch.setattr("peft.PeftModelForCausalLM.generate", generate)
    status, out, _ = verify(capsys, saved[1], "--stock")
    assert status == 1
    assert "PROBLEM: the soft prompt has no effect" in out


def test_a_training_forward_that_raises_is_a_problem(
    saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("cache")

    monkeypatch.setattr("peft.PeftModelForCausalLM.forward", broken)
    status, out, _ = verify(capsys, saved[1], "--stock")
    assert status == 1
    assert "training forward raises KeyError" in out


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in refusal(capsys, tmp_path / "nowhere")


def test_no_adapter_in_the_folder(saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert "adapter_config.json" in refusal(capsys, saved[0])


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
def test_broken_config(text: str, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "adapter_config.json" in refusal(capsys, adapter)


@pytest.mark.parametrize("length", [0, None, "many"])
def test_no_sensible_length(length: object, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(adapter, num_virtual_tokens=length)
    assert "num_virtual_tokens" in refusal(capsys, adapter)


def test_unknown_method(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(adapter, peft_type="TELEPATHY")
    assert "this peft cannot read" in refusal(capsys, adapter)


def test_missing_weights(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in adapter.glob("adapter_model.*"):
        path.unlink()
    assert "holds no weights" in refusal(capsys, adapter)


def test_corrupt_weights(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in adapter.glob("adapter_model.*"):
        path.write_bytes(path.read_bytes()[:40])
    assert "weights" in refusal(capsys, adapter)


def test_weights_of_another_length(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(adapter, num_virtual_tokens=6)
    assert "weights" in refusal(capsys, adapter)


def test_not_a_soft_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(base_model("llama"), config).save_pretrained(tmp_path)
    assert "LORA adapter, not a soft prompt" in refusal(capsys, tmp_path)


def test_encoder_decoder(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(adapter, task_type="SEQ_2_SEQ_LM")
    assert "encoder-decoder" in refusal(capsys, adapter)


def test_an_adapter_that_does_not_generate(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(adapter, task_type="MULTIPLE_CHOICE")
    assert "MULTIPLE_CHOICE" in refusal(capsys, adapter)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nobody/has-this-model", None])
def test_missing_base(name: str | None, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(adapter, base_model_name_or_path=name)
    assert "pass --base MODEL" in refusal(capsys, adapter)


def test_base_of_another_width(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(adapter, token_dim=16)
    assert "16 wide" in refusal(capsys, adapter)


def test_more_virtual_tokens_than_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=250))
    model.save_pretrained(tmp_path / "adapter")
    assert "256 positions" in refusal(capsys, tmp_path / "adapter", "--base", tmp_path / "base")


def test_tokenizer_with_more_words_than_the_base(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"word{index}": index for index in range(100)}, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="word0").save_pretrained(adapter)
    assert "100 tokens, the base model 64" in refusal(capsys, adapter)


def test_host_below_the_floor(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "FLOORS", {"transformers": "99.0", "peft": "0.6"})
    assert "older than 99.0" in refusal(capsys, adapter)


def test_text_the_adapter_started_from_is_not_needed(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An old peft asks the tokenizer's folder, or a hub, for words that the saved weights replace."""
    change(adapter, prompt_tuning_init="TEXT", prompt_tuning_init_text="gone", tokenizer_name_or_path="/nowhere")
    status, out, err = verify(capsys, adapter)
    assert status == 0, out + err
