"""Soft prompts on models that two processes share or copy are what they are in one process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

import ptfix
from tests.matrix.models import base_model, wrap
from tests.ranks import run

SECONDS = 240  # for two processes that import the hosts on a busy machine; they themselves take a few

needs_tensor_parallel = pytest.mark.skipif(
    not run.HAS_TENSOR_PARALLEL, reason="this transformers has no tensor parallel models"
)
needs_fsdp2_in_accelerate = pytest.mark.skipif(
    "fsdp_version" not in FullyShardedDataParallelPlugin.__dataclass_fields__, reason="this accelerate has no FSDP2"
)

SHARDING = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}


def ran(what: str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and what each of two processes found."""
    folder = Path(tempfile.mkdtemp(prefix="ptfix-ranks-"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(SHARDING if what == "trainer" else {})}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "-m", "tests.ranks.run", what, str(folder)],
            cwd=Path(__file__).parents[2],
            env=env,
            stdout=log,
            stderr=log,
        )
        try:
            status = process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its two processes, which kill() would leave behind
            process.wait()
            raise
    assert status == 0, (folder / "log").read_text()[-4000:]
    return folder, [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def models() -> tuple[Path, list[dict[str, Any]]]:
    return ran("models")


@pytest.fixture(scope="module")
def trainer() -> tuple[Path, list[dict[str, Any]]]:
    return ran("trainer")


def as_in_one_process(processes: list[dict[str, Any]], kind: str, method: str) -> None:
    for found in processes:
        for what, (got, true) in found[kind][method].items():
            assert got.abs().max() > 0, f"{what}: nothing there"
            if got.is_floating_point():
                assert torch.allclose(got, true, atol=1e-4, rtol=1e-4), f"{what}: {(got - true).abs().max()} apart"
            else:
                assert torch.equal(got, true), f"{what}: {got.tolist()}, not {true.tolist()}"


@pytest.mark.parametrize("method", run.METHODS)
def test_fsdp2(models: Any, method: str) -> None:
    as_in_one_process(models[1], "fsdp2", method)


@pytest.mark.parametrize("method", run.METHODS)
def test_a_prompt_sharded_by_fsdp2_is_saved_whole(models: Any, method: str) -> None:
    folder, _ = models
    for how in ("all", "one"):
        assert_saved(folder / how / method, method)
    assert not list((folder / "none").rglob("adapter_model*"))


@pytest.mark.parametrize("method", run.METHODS)
def test_fsdp1(models: Any, method: str) -> None:
    as_in_one_process(models[1], "fsdp1", method)
    assert_saved(models[0] / "fsdp1" / method, method)


@needs_tensor_parallel
@pytest.mark.parametrize("method", run.METHODS)
def test_tensor_parallel(models: Any, method: str) -> None:
    as_in_one_process(models[1], "tensor parallel", method)


@pytest.mark.parametrize("method", run.METHODS)
def test_ddp(models: Any, method: str) -> None:
    as_in_one_process(models[1], "ddp", method)


@needs_fsdp2_in_accelerate
@pytest.mark.parametrize("method", [*run.METHODS, "lora"])
def test_trainer_with_fsdp2_and_all_callbacks(trainer: Any, method: str) -> None:
    folder, (first, second) = trainer
    assert "FSDP" in first[method]["kind"]
    warned = first[method]["warned"]
    left_out = [message for message in warned if "each process holds only a part of the weights" in message]
    expected = ["instruction retention"] if method == "lora" else ["instruction retention", "the soft prompt"]
    assert [message.split(" is not")[0].split(" was not")[0] for message in left_out] == expected
    assert not [message for message in second[method]["warned"] if "part of the weights" in message]
    one = reference_run()
    for step in ("checkpoint-2", "final"):
        sharded, alone = (weights(each / method / step) for each in (folder, one))
        assert sharded.keys() == alone.keys()
        for name, tensor in sharded.items():
            assert torch.allclose(tensor, alone[name], atol=1e-5), name
            assert tensor.abs().max() > 0


@functools.cache
def reference_run() -> Path:
    """The same training in this process."""
    folder = Path(tempfile.mkdtemp(prefix="ptfix-ranks-"))
    ptfix.apply()
    try:
        run.trained(folder, on_ranks=False)
    finally:
        ptfix.revert()
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def assert_saved(folder: Path, method: str) -> None:
    """What lies in `folder` loads in one process and is bit for bit what was wrapped."""
    ids = torch.tensor([[5, 9, 23]])
    ptfix.apply()  # older releases of peft cannot run a prefix for grouped heads
    try:
        model = wrap(base_model("llama"), method)
        loaded = peft.PeftModel.from_pretrained(base_model("llama"), folder)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    finally:
        ptfix.revert()
