"""What ptfix asks of a model: is it sharded? Two processes ask it in tests/ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ptfix import models

NO_FSDP = SimpleNamespace(fsdp=None)


def layers() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


def test_whole_weights_are_not_sharded() -> None:
    assert not models.is_sharded(NO_FSDP, layers())
    assert not models.is_sharded(None, layers())


@pytest.mark.parametrize("fsdp", ["full_shard", ["full_shard"], True])
def test_what_trainer_was_asked_for(fsdp: object) -> None:
    assert models.is_sharded(SimpleNamespace(fsdp=fsdp), layers())


def test_a_dtensor_is_sharded() -> None:
    model = layers()
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)  # of this process alone
    shard = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False)
    model[1].weight = torch.nn.Parameter(shard)
    assert models.is_sharded(NO_FSDP, model)


def test_a_tensor_parallel_model_is_sharded() -> None:
    model = layers()
    model._tp_size = 1
    assert not models.is_sharded(NO_FSDP, model)
    model._tp_size = 2
    assert models.is_sharded(NO_FSDP, model)


def test_what_failed_leaves_the_model_as_it_was_also_without_memory_to_compare_its_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).train()
    model[0].eval()
    model[0].weight.requires_grad = False

    def full(*args: object) -> bool:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    def ask() -> None:
        with models.undisturbed(model):
            model[1].note = torch.rand(())
            model.requires_grad_(True)
            monkeypatch.setattr(torch, "equal", full)

    random_state = torch.get_rng_state()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ask()
    monkeypatch.undo()
    assert [module.training for module in model] == [False, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
    assert not hasattr(model[1], "note")
    assert torch.equal(torch.get_rng_state(), random_state)
