"""Does the soft prompt of a task head act, and does a padded row get what the row gets alone?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ptfix import errors, models
from ptfix.soft_prompts import heads

_PADS = 3


@dataclass(frozen=True)
class Found:
    """What was found on one row."""

    acts: bool  #: the head says something else than it does without the soft prompt
    wrong: dict[str, str] = field(default_factory=dict)  #: the side of the padding -> how its answer differs


def is_head(peft_model: Any) -> bool:
    """Is this one of peft's task classes that judge a text rather than continue it?"""
    return heads.of(peft_model) is not None


def judge(peft_model: Any, row: torch.Tensor) -> Found:
    """Ask a model, which stays as it is, about ``row [1, tokens]`` alone and padded on either side."""
    head = heads.of(peft_model)
    if head is None:
        raise TypeError(f"a {type(peft_model).__name__} has no task head.")
    names = head.per_token or ("logits",)
    config = peft_model.peft_config[peft_model.active_adapter]
    options = {"task_ids": row.new_zeros(1)} if config.peft_type == "MULTITASK_PROMPT_TUNING" else {}
    pad = getattr(peft_model.base_model.config, "pad_token_id", None) or 0

    def said(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
        outputs = model(input_ids=ids, attention_mask=mask, return_dict=True, **more)
        answers = [outputs[name].float() for name in names]
        if head.per_token:  # the scores of a span's ends come without a last dimension
            answers = [answer[..., None] if answer.dim() == 2 else answer for answer in answers]
        return torch.cat(answers, -1)

    def of_text(answer: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What is said of the text's own tokens; hosts may say something of the virtual tokens before them."""
        return answer[:, -mask.shape[1] :][:, mask[0].bool()] if head.per_token else answer

    with models.undisturbed(peft_model):
        ones = torch.ones_like(row)
        alone = of_text(said(peft_model, row, ones, **options), ones)
        plain = of_text(said(peft_model.base_model, row, ones), ones)
        wrong: dict[str, str] = {}
        for side, pads in (("left", (_PADS, 0)), ("right", (0, _PADS))):
            ids, mask = (torch.nn.functional.pad(one, pads, value=fill) for one, fill in ((row, pad), (ones, 0)))
            try:
                off = models.distance(of_text(said(peft_model, ids, mask, **options), mask), alone)
            except Exception as error:  # whatever the host raises is the finding
                wrong[side] = f"raises {errors.one_line(error)}"
                continue
            if not off <= models.tolerance(peft_model.base_model):
                wrong[side] = f"differs by {off:.2g} of its size"
    return Found(models.distance(plain, alone) > models.noise(peft_model.base_model), wrong)
