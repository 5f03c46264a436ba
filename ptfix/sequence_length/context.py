"""The four lengths that a model's config speaks of, and where it says so.

A config is read as the plain dict that lies in ``config.json`` or that ``config.to_dict()`` gives, so nothing here
needs the hosts. Releases write the same fact in many places: transformers 5 keeps ``rope_parameters`` (never empty,
nested by layer type for some), before it was ``rope_scaling``; a multimodal config keeps its text model's numbers one
level down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Architectures with a table of positions, one row each: the position behind the last one is an error. By where the
#: config keeps the table's length. RoPE and ALiBi are no protection: gptj, codegen and mpt make their tables once.
HARD_TABLES: Mapping[str, str] = {
    "biogpt": "max_position_embeddings",
    "codegen": "n_positions",
    "ctrl": "n_positions",
    "gpt2": "n_positions",
    "gpt_bigcode": "n_positions",
    "gpt_neo": "max_position_embeddings",
    "gptj": "n_positions",
    "mpt": "max_seq_len",
    "openai-gpt": "n_positions",
    "opt": "max_position_embeddings",
}

#: They count positions with the attention mask, so padding needs none; all others count padding too.
_PADDING_IS_FREE = ("opt", "biogpt")

_DECLARED = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_TRAINED = (*_DECLARED, "model_max_length")

#: Where multimodal configs keep the text model's own.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")

_UNSCALED = ("default", "mrope", "proportional")


@dataclass(frozen=True)
class Number:
    """A length in tokens, and the place in the config that says so."""

    value: int
    source: str

    def __str__(self) -> str:
        return f"{self.value} ({self.source})"


@dataclass(frozen=True)
class Rope:
    """How rotary frequencies are stretched; ``scheme`` is ``default`` where they are not."""

    scheme: str = "default"
    factor: float | None = None
    original: int | None = None  #: the length before stretching, where the config has it
    theta: float | None = None

    def __str__(self) -> str:
        if self.scheme == "default":
            return "unscaled" if self.theta is None else f"unscaled, theta {self.theta:g}"
        return self.scheme if self.factor is None else f"{self.scheme} x{self.factor:g}"

    def differs_from(self, other: Rope) -> bool:
        """Does a model with this rope answer otherwise? What one of the two does not write down is not compared."""
        pairs = ((self.factor, other.factor), (self.original, other.original), (self.theta, other.theta))
        return self.scheme != other.scheme or any(
            None not in (ours, theirs) and ours != theirs for ours, theirs in pairs
        )


@dataclass(frozen=True)
class Context:
    """What a config says about length. None: it says nothing, and there may be no limit at all."""

    hard_limit: Number | None  #: one token more raises
    pretrained_context: Number | None  #: the length before any rope scaling
    train_mode_context: Number | None  #: up to here, training mode is what the model was made for
    declared_context: Number | None  #: what the config promises
    rope: Rope
    doubts: tuple[str, ...]  #: where the config can be read in two ways
    faults: tuple[str, ...]  #: what is wrong with it at any length
    padding_counts: bool  #: does padding use up positions of the hard table?

    @property
    def boundary(self) -> int | None:
        """The length at which a model may begin to act otherwise."""
        numbers = [number.value for number in (self.pretrained_context, self.train_mode_context) if number is not None]
        return min(numbers, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json: each number with its source."""
        names = ("hard_limit", "pretrained_context", "train_mode_context", "declared_context")
        numbers = {name: getattr(self, name) for name in names}
        return {
            **{name: None if n is None else {"tokens": n.value, "source": n.source} for name, n in numbers.items()},
            "rope": str(self.rope),
            "doubts": [*self.faults, *self.doubts],
        }


def read_folder(folder: Path) -> Context | None:
    """The lengths of a saved model, from its ``config.json``; None where there is none.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = folder / "config.json"
    return read(load(path)) if path.is_file() else None


def load(path: Path) -> dict[str, Any]:
    """A config file as a dict.

    Raises:
        ValueError: the file is not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return config


def read(config: Mapping[str, Any]) -> Context:
    """The lengths of a config: the dict in ``config.json``, or what ``config.to_dict()`` gives."""
    config = _text_config(config)
    kind = str(config.get("model_type", ""))
    rope = _rope(config)
    doubts: list[str] = []
    # Bloom's seq_length was its training length; ALiBi goes on.
    declaring, training = (_DECLARED, _TRAINED) if kind != "bloom" else ((), ())
    stated = next((Number(value, name) for name in declaring if (value := _length(config.get(name)))), None)
    pretrained, declared = stated, stated
    if rope.scheme in ("yarn", "longrope") and stated is not None:
        original = rope.original
        if original is None:
            original = stated.value
            doubts.append(
                f"rope {rope} does not say original_max_position_embeddings, so {stated} is taken for the length "
                "before scaling: write the length the model was pretrained with there"
            )
        elif rope.scheme == "yarn" and original == stated.value and (rope.factor or 1) > 1:
            # transformers 5 fills a missing original with max_position_embeddings, and nothing shows that it did.
            doubts.append(
                f"rope {rope} says that original_max_position_embeddings and {stated.source} are both {original}: "
                f"right only if the model was pretrained with {original} tokens"
            )
        pretrained = Number(original, "original_max_position_embeddings")
        stretched = int(original * (rope.factor or 1)) if rope.scheme == "yarn" else 0
        if stretched > stated.value:
            declared = Number(stretched, f"original_max_position_embeddings x {rope.factor:g}")
    elif rope.scheme in ("linear", "dynamic") and stated is not None:
        doubts.append(f"rope {rope} does not say whether {stated} is the length before scaling or after it")
    elif rope.scheme not in ("default", "llama3", "yarn", "longrope"):
        doubts.append(f"ptfix does not know rope scheme {rope.scheme!r}, so the config's numbers are taken as they are")
    others = (Number(value, name) for name in training if (value := _length(config.get(name))))
    smaller = [number for number in others if stated is not None and number.value < stated.value]
    trained = min(smaller, key=lambda number: number.value, default=declared)
    if smaller and pretrained is stated:
        pretrained = trained
    table = HARD_TABLES.get(kind)
    rows = _length(config.get(table)) if table is not None else None
    hard = Number(rows, str(table)) if rows is not None else None
    return Context(
        hard, pretrained, trained, declared, rope, tuple(doubts), _faults(config, rope), kind not in _PADDING_IS_FREE
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part; what it does not say may stand above it, as transformers 4 mirrors."""
    for name in _TEXT_CONFIGS:
        inner = config.get(name)
        if isinstance(inner, Mapping):
            above = {key: value for key, value in config.items() if key not in _TEXT_CONFIGS}
            said = {key: value for key, value in _text_config(inner).items() if value is not None}
            return {**above, **said}
    return config


def _rope(config: Mapping[str, Any]) -> Rope:
    """The rope of a config in any release's layout."""
    new = config.get("rope_parameters")
    old = config.get("rope_scaling")
    given: Mapping[str, Any] = new if isinstance(new, Mapping) else old if isinstance(old, Mapping) else {}
    layers = [layer for layer in given.values() if isinstance(layer, Mapping)]
    chosen = given
    if layers:  # one for each type of layer: those that see everything decide, and a stretched one before others
        full = given.get("full_attention")
        layers = [full, *layers] if isinstance(full, Mapping) else layers
        chosen = next((layer for layer in layers if _scheme(layer) != "default"), layers[0])
    scheme, theta = _scheme(chosen), _number(chosen.get("rope_theta")) or _number(config.get("rope_theta"))
    original = _length(chosen.get("original_max_position_embeddings"))
    if scheme == "longrope":
        original = _length(config.get("original_max_position_embeddings")) or original  # Phi-3 keeps it at the top
    factor = _number(chosen.get("factor")) if scheme != "default" else None
    return Rope(scheme, factor, original, theta)


def _faults(config: Mapping[str, Any], rope: Rope) -> tuple[str, ...]:
    if rope.scheme == "default" or rope.theta is not None or not isinstance(config.get("rope_parameters"), Mapping):
        return ()
    return (
        f"rope_parameters ask for {rope.scheme} scaling and have lost rope_theta, without which no frequencies can be "
        "computed: transformers 5 replaces the whole dict when rope_scaling is assigned, so write rope_theta into it",
    )


def _scheme(rope: Mapping[str, Any]) -> str:
    name = str(rope.get("rope_type") or rope.get("type") or "default")
    return {"su": "longrope", **dict.fromkeys(_UNSCALED, "default")}.get(name, name)


def _length(value: Any) -> int | None:
    number = _number(value)
    # Some write a huge number for "no limit".
    return int(number) if number is not None and 1 <= number < 1e9 else None


def _number(value: Any) -> float | None:
    finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # also not NaN
    return float(value) if finite else None
