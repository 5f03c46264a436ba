"""torch.compile of a soft-prompted model: the graphs are those of the stock forward()."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptfix
from ptfix.soft_prompts import training
from tests.matrix import models
from tests.soft_prompts import test_heads

dynamo = pytest.importorskip("torch._dynamo")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    training._say_once.cache_clear()
    yield
    ptfix.revert()
    dynamo.reset()


def graphs(method: str, fullgraph: bool) -> tuple[int, int, list[float]]:
    """How many graphs and breaks it takes to train on rows of several lengths, and the losses."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    model = models.wrap(models.base_model("llama"), method).train()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    losses = []
    for length in (10, 10, 14, 18):
        ids = torch.arange(2, 2 + length)[None]
        loss = compiled(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
    counters: Any = dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), losses


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_compiled_forward_is_stocks(method: str, fullgraph: bool) -> None:
    try:
        stock = graphs(method, fullgraph)
    except Exception as error:
        pytest.skip(f"stock cannot be compiled here: {type(error).__name__}")
    ptfix.apply()
    found = graphs(method, fullgraph)
    assert (found[0], found[2]) == (stock[0], stock[2])
    # Where the host breaks a graph, each function around that place is counted again.
    assert stock[1] or not found[1]


def test_what_a_graph_cannot_do_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ptfix.apply()
    with caplog.at_level(logging.WARNING, "ptfix"):
        graphs("prompt_tuning", fullgraph=False)
        graphs("prompt_tuning", fullgraph=False)
    said = [record.message for record in caplog.records if "torch.compile" in record.message]
    assert len(said) == 1
    assert "on the right" in said[0]


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_a_compiled_task_head_is_one_graph_with_the_eager_ones_outputs(task: str) -> None:
    if not test_heads.is_made("llama", task):
        pytest.skip(f"this transformers has no llama for {task}")
    model, ids = test_heads.prompted("llama", task, "prompt_tuning"), torch.arange(2, 8)[None]
    try:
        test_heads.said(torch.compile(model, backend="eager", fullgraph=True), ids)
    except Exception as error:
        pytest.skip(f"stock cannot be compiled here: {type(error).__name__}")
    ptfix.apply()
    labels = {"TOKEN_CLS": {"labels": ids % 3}}.get(task, {})
    dynamo.reset()
    eager = test_heads.said(model, ids, **labels)
    compiled = test_heads.said(torch.compile(model, backend="eager", fullgraph=True), ids, **labels)
    for name in test_heads.TASKS[task][1]:
        assert torch.equal(compiled[name], eager[name])
    if labels:
        torch.testing.assert_close(compiled.loss, eager.loss)
