"""A base model on disk with a Llama 3 style chat template, and the finetune script that broke it (MiniCPM-V #220)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, START, END, EOT = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
HEADER = f"{START}assistant{END}\n\n"

#: What the script set: no header where an answer is asked for.
TRAINING = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
)
#: What the base model was published with.
INFERENCE = TRAINING + (
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

CHATS = [
    [{"role": "user", "content": "Hello, who are you?"}, {"role": "assistant", "content": "I am a small model."}],
    [{"role": "user", "content": "Count to three."}, {"role": "assistant", "content": "One, two, three."}],
]


def tokenizer() -> Any:
    """A byte-level BPE tokenizer without a template."""
    backend = Tokenizer(models.BPE())
    # As Llama 3 splits: line ends are tokens of their own, and none reaches from a header into an answer.
    pieces = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", BOS, START, END, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for chat in CHATS for message in chat]
    backend.train_from_iterator([*texts, "system user assistant\n\n"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOT,
        pad_token="<pad>",
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
    )


def model(size: int) -> Any:
    """A tiny Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=4,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def publish(folder: Path, template: str = INFERENCE) -> Any:
    """Save the base model, as its makers did. The tokenizer as a finetune script loads it comes back."""
    made = tokenizer()
    made.chat_template = template
    made.save_pretrained(folder)
    model(len(made)).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def rows(of: Any) -> list[dict[str, list[int]]]:
    """Training rows: the whole chat as the tokenizer's template renders it, the answer alone with labels."""
    made = []
    for chat in CHATS:
        text = of.apply_chat_template(chat, tokenize=False)
        prompt = of.apply_chat_template(chat[:1], tokenize=False) + HEADER
        ids = of(text, add_special_tokens=False)["input_ids"]
        masked = len(of(prompt, add_special_tokens=False)["input_ids"])
        made.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:], "attention_mask": [1] * len(ids)})
    return made


def trainer(base: Path, out: Path, of: Any, callbacks: list[Any], **arguments: Any) -> Any:
    """A Trainer as the script makes one; ``tokenizer=`` is `processing_class=` from 4.46 on."""
    import inspect

    given = arguments.pop("given", True)
    prepare = arguments.pop("prepare", lambda args: None)
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 100,
    }
    args = transformers.TrainingArguments(**{**defaults, **arguments})
    prepare(args)
    takes = inspect.signature(transformers.Trainer.__init__).parameters
    name = "processing_class" if "processing_class" in takes else "tokenizer"
    return transformers.Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(base),
        args=args,
        train_dataset=rows(of),
        data_collator=transformers.DataCollatorForSeq2Seq(of, padding=True),
        callbacks=callbacks,
        **({name: of} if given else {}),
    )
