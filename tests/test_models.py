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
