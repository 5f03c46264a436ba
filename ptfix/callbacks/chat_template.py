"""ChatTemplateCallback: every checkpoint carries the inference template, and inference reads what training read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ptfix import models
from ptfix.callbacks.problems import OnProblem, Problems, never_ends_a_run
from ptfix.chat_templates import choosing, parity, readers, saving

logger = logging.getLogger("ptfix")


#: How many rows of the first batch are looked at.
_ROWS = 8
_NOT_REGISTERED = "checkpoints may get another chat template than the one for inference"


class ChatTemplateError(RuntimeError):
    """A checkpoint's template is wrong and cannot be mended, or inference will not read what training reads."""


@never_ends_a_run("the chat template could not be checked")
class ChatTemplateCallback(TrainerCallback):  # type: ignore[misc]  # the hosts are untyped here
    """Register the Trainer's tokenizer or processor, check the first batch, and check each checkpoint on disk.

    The tokenizer keeps its training template in memory. What is saved, by whomever, is the inference template; where a
    saver writes no tokenizer (sharded FSDP checkpoints, savers of adapters alone), this callback does. Silent about
    tokenizers without a template. Whatever goes wrong in it is a problem as others are, and ends no run by itself.

    Args:
        inference_template: the template to save. None: see `ptfix.chat_templates.register`.
        base: folder, or hub name in the local cache, of the base model. None: what the model and its adapter name.
        on_problem: ``"warn"`` through ``logging.getLogger("ptfix")``, or ``"raise"`` a `ChatTemplateError`.
        repair_eos: add the token that ends an answer in training to the model's generation_config.eos_token_id.
        smoke_tokens: when training ends, generate so many tokens for a short question and expect an answer. 0: none.
    """

    def __init__(
        self,
        inference_template: str | Mapping[str, str] | None = None,
        base: str | Path | None = None,
        on_problem: OnProblem = "warn",
        repair_eos: bool = False,
        smoke_tokens: int = 0,
    ) -> None:
        # A save finds some of the same problems, and says them in the same words.
        self._problems = Problems(on_problem, ChatTemplateError, saving.warn)
        self.inference_template, self.base = inference_template, base
        self.repair_eos, self.smoke_tokens = repair_eos, smoke_tokens
        self._saver: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._problems.guarded(_NOT_REGISTERED):
            self._register(kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self._problems.guarded(_NOT_REGISTERED):
            self._register(kwargs)
            if self._saver is not None:
                self._begin(state, kwargs.get("model"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            with self._problems.guarded(f"the chat template of {folder} could not be checked"):
                self._verify(folder, complete=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            with self._problems.guarded(f"the chat template of {args.output_dir} could not be checked"):
                self._verify(Path(args.output_dir), complete=False)
        if self.smoke_tokens and self._saver is not None and state.is_world_process_zero:
            with self._problems.guarded("the model could not be asked a question"):
                if models.is_sharded(args, kwargs["model"]):
                    logger.warning("the model was not asked a question: each process holds only a part of the weights.")
                else:
                    self._smoke(kwargs["model"])

    def _begin(self, state: Any, model: Any) -> None:
        """Say what checkpoints will get, and wait for the first batch."""
        saving.at_train_begin(self._saver)
        chosen = saving.choice(self._saver)
        if not chosen.judged:  # each save tries again, and says what it did
            logger.info("which chat template is right could not be judged yet: %s", "; ".join(chosen.reasons))
        elif chosen.templates is None and saving.training_template(self._saver) is not None:
            self._problems.tell(saving.as_it_is(chosen))
        if chosen.templates is None:
            return
        logger.info("checkpoints get the chat template of %s", chosen.source)
        if state.is_world_process_zero and model is not None:
            self._check_first_batch(model, chosen.templates.default)

    def _register(self, given: dict[str, Any]) -> None:
        """The object whose template counts: the Trainer's own, or the collator's, or the base model's."""
        model = given.get("model")
        saver = given.get("processing_class") or given.get("tokenizer") or _collators(given.get("train_dataloader"))
        base = self.base or _base_of(model)
        if saver is None and given.get("train_dataloader") is not None:
            saver = self._saver or _tokenizer_of(base)
        if saver is None or not hasattr(saver, "chat_template"):
            return
        saving.register(saver, self.inference_template, base=base if choosing.base_folder(base or "") else None)
        self._saver = saver

    def _verify(self, folder: Path, complete: bool) -> None:
        """Look at what landed on disk; `complete` where a tokenizer has to be there."""
        if self._saver is None or not folder.is_dir():
            return
        has_tokenizer = (folder / readers.TOKENIZER_CONFIG).is_file()
        if not has_tokenizer and not complete:
            return
        chosen = saving.choice(self._saver)
        if chosen.templates is not None:
            if not has_tokenizer:
                self._saver.save_pretrained(folder)
            outcome = saving.write(folder, chosen.templates, self._saver)
            if outcome.changes and has_tokenizer:
                names = ", ".join(str(change.path.relative_to(folder.resolve())) for change in outcome.changes)
                logger.warning("%s held another chat template and now holds the one for inference: %s", folder, names)
            if outcome.problems:
                self._problems.tell(saving.not_written(folder, outcome.problems))
        if not chosen.judged:
            self._problems.tell(saving.not_judged(folder, chosen))

    def _check_first_batch(self, model: Any, template: str | None) -> None:
        """Judge the first batch when the model is fed with it: real rows, and no random number is drawn for them."""

        def look(module: Any, inputs: Any, given: dict[str, Any]) -> None:
            handle.remove()
            ids, labels = given.get("input_ids"), given.get("labels")
            if ids is not None and labels is not None and ids.dim() == 2 and ids.shape == labels.shape:
                with self._problems.guarded("the first batch could not be checked"):
                    self._judge(module, template, given)

        handle = model.register_forward_pre_hook(look, with_kwargs=True)

    def _judge(self, model: Any, template: str | None, batch: dict[str, Any]) -> None:
        tokens = saving.special_tokens(self._saver)
        prompt = choosing.judge(template, tokens).generation_prompt if template is not None else None
        tokenizer = saving.tokenizer_of(self._saver)
        config = getattr(model, "generation_config", None)
        stops = models.stop_tokens(model, tokenizer)
        found = [parity.judge(*row, tokenizer, prompt, stops) for row in _rows(batch)]
        if all(each.problems for each in found):  # a row that is cut, or packed, may be odd where the run is right
            for problem in found[0].problems:
                self._problems.tell(problem)
        ends = {each.end_of_turn for each in found if each.end_of_turn is not None} - set(stops)
        if self.repair_eos and config is not None and ends:
            config.eos_token_id = [*stops, *sorted(ends)]

    def _smoke(self, model: Any) -> None:
        """Ask for a few tokens, greedily: an answer may be bad, but not empty. Parity is the proof, this a glance."""
        import torch

        tokenizer = saving.tokenizer_of(self._saver)
        chosen = saving.choice(self._saver).templates
        if chosen is None or chosen.default is None:
            return
        question = [{"role": "user", "content": "Say hello."}]
        text = tokenizer.apply_chat_template(
            question, chat_template=chosen.default, add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device)
        with models.evaluating(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.smoke_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        answer = out[0, ids.shape[1] :].tolist()
        if not tokenizer.decode(answer, skip_special_tokens=True).strip():
            self._problems.tell(
                f"asked {question[0]['content']!r}, the model answers nothing: {tokenizer.decode(answer)!r}"
            )


def _rows(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The first rows of a batch without their padding: token ids and labels."""
    mask = batch.get("attention_mask")
    rows = []
    for place, (ids, labels) in enumerate(zip(batch["input_ids"][:_ROWS], batch["labels"][:_ROWS], strict=True)):
        if mask is not None and mask.dim() == 2:
            ids, labels = ids[mask[place].bool()], labels[mask[place].bool()]
        rows.append((ids.tolist(), labels.tolist()))
    return rows


def _collators(dataloader: Any) -> Any:
    """The tokenizer that makes the batches, where the Trainer was given none."""
    collate = getattr(dataloader, "collate_fn", None)
    collate = getattr(collate, "data_collator", collate)  # the Trainer wraps it to drop unused columns
    return getattr(collate, "tokenizer", None) or getattr(collate, "processor", None)


def _base_of(model: Any) -> str | None:
    """The base model's folder or hub name, of an adapter's config first."""
    model = models.unwrap(model)
    for config in getattr(model, "peft_config", {}).values():
        if config.base_model_name_or_path:
            return str(config.base_model_name_or_path)
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _tokenizer_of(base: str | Path | None) -> Any:
    """The base model's own tokenizer, from a local folder."""
    folder = choosing.base_folder(base) if base else None
    if folder is None or not (folder / readers.TOKENIZER_CONFIG).is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of remote code, say: the checkpoint stays without, as it would have
        logger.warning("checkpoints get no tokenizer: that of %s does not load (%s)", folder, error)
        return None
