"""Two processes hold one model between them; each does what one process does with a whole model, and keeps both.

torchrun --nproc_per_node 2 -m tests.ranks.run models DIR     # rank-N.pt: kind -> method -> what -> (found, truth)
torchrun --nproc_per_node 2 -m tests.ranks.run trainer DIR    # rank-N.pt, and the adapters that it trained
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.generation.utils
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

import ptfix
from ptfix.soft_prompts.proof import reference
from tests.matrix.models import base_model, wrap
from tests.runs import arguments

METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")
ROWS = torch.tensor([[5, 9, 17, 33, 2, 7], [8, 3, 29, 4, 21, 6]])
NEW_TOKENS, PADS = 4, 2
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

HAS_TENSOR_PARALLEL = hasattr(PreTrainedModel, "_tp_size")

Findings = dict[str, tuple[torch.Tensor, torch.Tensor]]


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def truth(model: Any, row: torch.Tensor) -> torch.Tensor:
    return reference.greedy(model, row[None], NEW_TOKENS)[0][0, len(row) :]


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """The first row without its first tokens, beside the second."""
    ids, mask = ROWS.clone(), torch.ones_like(ROWS)
    ids[0, :PADS], mask[0, :PADS] = 0, 0
    return ids, mask


def generated(model: Any, alone: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch, and each of its rows alone by the training forward of a whole model."""
    ids, mask = left_padded()
    out = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    return out, torch.stack([truth(alone, ROWS[0, PADS:]), truth(alone, ROWS[1])])


def padded_logits(model: Any, alone: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = left_padded()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    return logits, torch.cat([reference.last_logits(alone, row[None]) for row in (ROWS[0, PADS:], ROWS[1])])


def gradients(model: Any, alone: Any, mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the prompt encoder, after `mine` in this process and all rows in a whole model."""
    found = []
    for each, rows in ((model, mine), (alone, ROWS)):
        each.train()
        each.zero_grad()
        each(input_ids=rows, labels=rows).loss.backward()
        encoder = getattr(each, "module", each).prompt_encoder
        found.append(torch.cat([whole(one.grad).flatten() for one in encoder.parameters() if one.grad is not None]))
        each.eval()
    return found[0], found[1]


def uneven(model: Any, alone: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of other lengths in each process, and one process is done before the other."""
    row = ROWS[0, :3] if dist.get_rank() == 0 else ROWS[1]
    expected = truth(alone, row)
    stop = truth(alone, ROWS[0, :3])[1].item()  # the first process's second token
    # Older releases know no FSDP and have to be asked that the processes wait for each other.
    synced = None if hasattr(transformers.generation.utils, "is_fsdp_managed_module") else True
    end = expected.tolist().index(stop) + 1 if stop in expected else NEW_TOKENS
    options = {**GREEDY, "eos_token_id": stop, "synced_gpus": synced}
    out = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row[None]), **options)
    return out[0, len(row) :], expected[:end]


def fully_sharded(folder: Path) -> dict[str, Findings]:
    mesh = dist.init_device_mesh("cpu", (2,))
    found = {}
    for method in METHODS:
        model = wrap(base_model("llama"), method)
        alone = copy.deepcopy(model)
        for layer in model.base_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        mine = ROWS[dist.get_rank()][None]  # gradients are the mean over processes
        has: Findings = {"generate before any forward": generated(model, alone)}
        has["forward"] = padded_logits(model, alone)
        has["gradient"] = gradients(model, alone, mine)
        has["generate after training"] = generated(model, alone)
        has["uneven processes"] = uneven(model, alone)
        for each in (model, alone):
            each.base_model.gradient_checkpointing_enable()
            each.base_model.enable_input_require_grads()
        has["gradient with checkpointing"] = gradients(model, alone, mine)
        model.save_pretrained(folder / "all" / method)  # all processes gather
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_model_state_dict(model, options=options)  # of which one process has it all
        if dist.get_rank() == 0:
            model.save_pretrained(folder / "one" / method, state_dict=state_dict)
        else:
            model.save_pretrained(folder / "none" / method, state_dict=state_dict, is_main_process=False)
        found[method] = has
    return found


def flattened(folder: Path) -> dict[str, Findings]:
    """FSDP1."""
    found = {}
    for method in METHODS:
        model = wrap(base_model("llama"), method)
        alone = copy.deepcopy(model)
        policy = ModuleWrapPolicy({type(model.base_model.model.layers[0])})
        sharded = Fsdp(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")).eval()
        has: Findings = {"forward": padded_logits(sharded, alone)}
        sharded(input_ids=ROWS, labels=ROWS).loss.backward()
        with Fsdp.summon_full_params(sharded, recurse=False, writeback=False):
            has["generate"] = generated(model, alone)
        # torch's own FULL_STATE_DICT ends the process on a CPU, so the whole model's serves.
        if dist.get_rank() == 0:
            model.save_pretrained(folder / "fsdp1" / method, state_dict=alone.state_dict())
        found[method] = has
    return found


def split(folder: Path) -> dict[str, Findings]:
    """Tensor parallel."""
    if dist.get_rank() == 0:
        base_model("llama").save_pretrained(folder / "base")
    dist.barrier()
    found = {}
    for method in METHODS:
        alone = wrap(base_model("llama"), method)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto")
        base.generation_config.eos_token_id = None
        model = wrap(base, method)
        found[method] = {
            "generate before any forward": generated(model, alone),
            "forward": padded_logits(model, alone),
            "gradient": gradients(model, alone, ROWS),
            "generate after training": generated(model, alone),
        }
    return found


def replicated(folder: Path) -> dict[str, Findings]:
    """DDP."""
    found = {}
    for method in METHODS:
        model = wrap(base_model("llama"), method)
        alone = copy.deepcopy(model)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        found[method] = {
            "forward": padded_logits(ddp, alone),
            "gradient": gradients(ddp, alone, ROWS[dist.get_rank()][None]),
            "generate after training": generated(model, alone),
        }
    return found


def trained(folder: Path, on_ranks: bool = True) -> dict[str, Any]:
    """What two steps of Trainer with all callbacks make of each method: saved in `folder`, and what was warned of."""
    rows = [{"input_ids": row, "labels": row} for row in (*ROWS.tolist(), *ROWS.flip(0, 1).tolist()) * 2]
    found: dict[str, Any] = {}
    for method in (*METHODS, "lora"):
        if method == "lora":
            import peft

            torch.manual_seed(1)
            model = peft.get_peft_model(
                base_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
            )
        else:
            model = wrap(base_model("llama"), method)
        callbacks = [*ptfix.callbacks(), ptfix.InstructionRetentionCallback([[5, 9, 23]], new_tokens=2)]
        args = arguments(
            folder / method,
            max_steps=2,
            save_steps=1,
            logging_steps=1,
            per_device_train_batch_size=2 if on_ranks else 4,
            optim="sgd",
            learning_rate=0.1,
            remove_unused_columns=False,
        )
        if on_ranks:
            allow_sharding_on_cpu(args)
        heard = _Heard()
        logging.getLogger("ptfix").addHandler(heard)
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        logging.getLogger("ptfix").removeHandler(heard)
        trainer.save_model(str(folder / method / "final"))
        found[method] = {"kind": str(trainer.accelerator.distributed_type), "warned": heard.messages}
    return found


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def allow_sharding_on_cpu(args: Any) -> None:
    """accelerate knows FSDP2 on accelerators only, though torch does it anywhere."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert args.device.type == "cpu"  # makes the state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


KINDS: dict[str, Callable[[Path], dict[str, Findings]]] = {
    "ddp": replicated,
    "fsdp1": flattened,
    "fsdp2": fully_sharded,
    "tensor parallel": split,
}


def models(folder: Path) -> dict[str, dict[str, Findings]]:
    """All kinds in one launch, since importing the hosts takes longer than all of them."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    kinds = [kind for kind in KINDS if kind != "tensor parallel" or HAS_TENSOR_PARALLEL]
    return {kind: KINDS[kind](folder) for kind in kinds}


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    ptfix.apply()
    torch.save((trained if kind == "trainer" else models)(folder), folder / f"rank-{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()
