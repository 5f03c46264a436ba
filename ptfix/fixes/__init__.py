"""One file per upstream fault, each exporting FIX. ALL is the order in which they apply."""

from __future__ import annotations

from ptfix.fixes import (
    active_adapters,
    cached_forward,
    chat_template_saving,
    continuous_batching,
    cpt_generate,
    cpt_loss,
    first_use_check,
    left_padded_forward,
    packed_rows,
    padded_task_heads,
    prefix_checkpointing,
    prefix_forward,
    prefix_sizes,
    prefix_task_heads,
    prefix_tensor_parallel,
    seq2seq_forward,
    seq2seq_generate,
    sharded_prompt_saving,
    soft_prompt_generate,
    soft_prompt_reload,
    task_head_outputs,
    task_heads_built,
    trainer_tokenizer,
)
from ptfix.patching import Fix

ALL: tuple[Fix, ...] = (
    prefix_sizes.FIX,
    prefix_forward.FIX,
    prefix_checkpointing.FIX,
    prefix_tensor_parallel.FIX,
    left_padded_forward.FIX,
    task_heads_built.FIX,
    prefix_task_heads.FIX,
    task_head_outputs.FIX,
    padded_task_heads.FIX,  # around task_head_outputs: moves labels and outputs of real tokens
    cached_forward.FIX,  # around the other forwards: it decides whether they run
    packed_rows.FIX,
    soft_prompt_generate.FIX,
    continuous_batching.FIX,
    cpt_loss.FIX,
    cpt_generate.FIX,
    seq2seq_forward.FIX,
    seq2seq_generate.FIX,
    sharded_prompt_saving.FIX,
    soft_prompt_reload.FIX,
    active_adapters.FIX,
    trainer_tokenizer.FIX,
    chat_template_saving.FIX,
    first_use_check.FIX,  # last, around all others
)
