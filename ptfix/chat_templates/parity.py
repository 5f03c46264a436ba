"""Does inference read the tokens that training read? Judged on one real training row, in token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = -100  #: the label of a token that is not trained on


@dataclass(frozen=True)
class Parity:
    """What is wrong with a row, each in one sentence, and which token ends an answer in it."""

    problems: tuple[str, ...]
    end_of_turn: int | None


def judge(
    input_ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: Any,
    generation_prompt: str | None,
    eos_token_ids: Collection[int],
) -> Parity:
    """Compare a training row with what inference will feed and wait for.

    Args:
        input_ids: token ids of one row, without padding.
        labels: of the same length, -100 where a token is not trained on. Where nothing is masked, only the place of the
            generation prompt is compared.
        tokenizer: the one that made the row.
        generation_prompt: what the inference template appends to ask for an answer; None: not known, not compared.
        eos_token_ids: the ids at which generation stops.
    """
    trained = [place for place, label in enumerate(labels) if label != IGNORED]
    if not trained:
        return Parity(("no token of the row is trained on: all its labels are -100.",), None)
    problems = [_begin(input_ids, tokenizer)]
    masked = trained[0] > 1  # a beginning-of-sequence token has no label in some collators
    if generation_prompt:
        compare = _masked_prompt if masked else _prompt_within
        problems.append(compare(input_ids, trained[0], tokenizer, generation_prompt))
    end = next((place for place in trained if place + 1 not in trained), trained[-1]) if masked else trained[-1]
    end_of_turn = _end_of_turn(input_ids[: end + 1], tokenizer)
    if end_of_turn is not None and end_of_turn not in eos_token_ids:
        problems.append(
            f"an answer ends with {_shown(tokenizer, [end_of_turn])} ({end_of_turn}) in training, at which generation "
            f"does not stop: add it to generation_config.eos_token_id, now {sorted(eos_token_ids)}."
        )
    return Parity(tuple(problem for problem in problems if problem), end_of_turn)


def _begin(input_ids: Sequence[int], tokenizer: Any) -> str | None:
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and list(input_ids[:2]) == [bos, bos]:
        return (
            f"the row begins with {_shown(tokenizer, [bos])} twice: the template writes it and the tokenizer adds it; "
            "tokenize with add_special_tokens=False."
        )
    return None


def _masked_prompt(input_ids: Sequence[int], first: int, tokenizer: Any, generation_prompt: str) -> str | None:
    """Everything before the first trained token must be what inference makes of the same text."""
    prompt = list(input_ids[:first])
    text = _decoded(tokenizer, prompt)
    if text.endswith(generation_prompt):
        return _boundary(prompt, text, tokenizer)
    trained_after, asked_with = _shown(tokenizer, prompt[-12:]), repr(generation_prompt)
    if text.rstrip().endswith(generation_prompt.rstrip()):
        return (
            f"training starts an answer after {trained_after}, inference after {asked_with}: they differ in white "
            "space, which belongs to another token there."
        )
    if generation_prompt in text[-len(generation_prompt) - 64 :]:
        return None  # a thought, or the beginning of an answer, that is not trained on stands in between
    return f"training starts an answer after {trained_after}, inference after {asked_with}."


def _prompt_within(input_ids: Sequence[int], first: int, tokenizer: Any, generation_prompt: str) -> str | None:
    text = _decoded(tokenizer, input_ids)
    place = text.find(generation_prompt)
    if place < 0:
        return f"inference asks with {generation_prompt!r}, which the training row does not contain."
    prompt = text[: place + len(generation_prompt)]
    ids = _encoded(tokenizer, prompt)
    if _decoded(tokenizer, ids) == prompt and ids != list(input_ids[: len(ids)]):
        return _merged(tokenizer, ids, list(input_ids[: len(ids) + 1]))
    return None


def _boundary(prompt: list[int], text: str, tokenizer: Any) -> str | None:
    ids = _encoded(tokenizer, text)
    if ids == prompt or _decoded(tokenizer, ids) != text:
        return None  # equal, or a tokenizer that does not give a text back as it was: nothing to compare
    return _merged(tokenizer, ids, prompt)


def _merged(tokenizer: Any, inference: list[int], training: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(inference, training, strict=False)) if a != b), len(inference))
    return (
        f"the prompt's text is the same in training and inference, its tokens are not, from token {at} on: "
        f"{_shown(tokenizer, training[at : at + 3])} in training, {_shown(tokenizer, inference[at : at + 3])} in "
        "inference. A token reaches across the end of the prompt: tokenize the prompt and the answer apart."
    )


def _end_of_turn(answer: Sequence[int], tokenizer: Any) -> int | None:
    """The special token that ends an answer; white space may follow it. None where there is none, as in a cut row."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    for token in reversed(answer[-3:]):
        if token in special:
            return int(token)
        if _decoded(tokenizer, [token]).strip():
            return None
    return None


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return repr(_decoded(tokenizer, ids))
