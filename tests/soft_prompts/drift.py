"""A next release, imitated: GenerationMixin is written otherwise, as its source says today.

python -m tests.soft_prompts.drift renamed|drafts ARCHITECTURES MODES
prints, mode by mode, what the public contract answers there.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from transformers.generation import utils

mixin: Any = utils.GenerationMixin


def rewrite(edit: Callable[[str], str]) -> set[str]:
    """Run `edit` over the source of every method; the names of those that it changed."""
    changed = set()
    for name, method in list(vars(mixin).items()):
        function = method.__func__ if isinstance(method, staticmethod | classmethod) else method
        if not inspect.isfunction(function):
            continue
        source = textwrap.dedent(inspect.getsource(function))
        edited = edit(source)
        if edited != source:
            namespace = dict(vars(utils))
            exec(compile(edited, utils.__file__, "exec"), namespace)
            setattr(mixin, name, namespace[function.__name__])
            changed.add(name)
    return changed


def renamed() -> None:
    """Every private helper has another name in the class and in all that call it. Static caches are made, and inputs
    prepared, by calls that no subclass can override."""
    helpers = [name for name in vars(mixin) if re.match(r"_(prepare|get|update|maybe|expand|validate|prefill)", name)]
    helpers = [name for name in helpers if inspect.isroutine(getattr(mixin, name))]
    private = re.compile(rf"\b(self|cls|GenerationMixin)\.({'|'.join(helpers)})\b")
    makers = re.compile(r"\bself\.(_prepare_static_cache|_get_cache)_of_another_name\(")

    def edit(source: str) -> str:
        source = private.sub(r"\1.\2_of_another_name", source)
        source = makers.sub(r"GenerationMixin.\1_of_another_name(self, ", source)
        return source.replace("self.prepare_inputs_for_generation(", "self._prepare_inputs(")

    assert {"generate", "_sample", "_beam_search"} <= rewrite(edit)
    for name in helpers:
        setattr(mixin, f"{name}_of_another_name", vars(mixin)[name])
        delattr(mixin, name)
    mixin._prepare_inputs = lambda self, *args, **kwargs: type(self).prepare_inputs_for_generation(
        self, *args, **kwargs
    )


def drafts() -> None:
    """Every draft counts as accepted, also where the model says otherwise."""
    count = re.compile(r"n_matches = \(\(~\(candidate_new_tokens == .*")
    assert rewrite(lambda source: count.sub("n_matches = candidate_length", source)) == {"_assisted_decoding"}


if __name__ == "__main__":
    {function.__name__: function for function in (renamed, drafts)}[sys.argv[1]]()
    from ptfix.soft_prompts.proof import trials
    from tests.matrix.contract import PublicContract
    from tests.matrix.modes import bench, judge

    answers = {f"trial of {mode}": fault for mode, fault in trials.modes().items()}
    for architecture in sys.argv[2].split(","):
        for method in ("prompt_tuning", "prefix_tuning"):
            made = PublicContract(**vars(bench(architecture, method)))
            for mode in sys.argv[3].split(","):
                outcome = judge(mode, made)
                answers[f"{architecture} {method} {mode}"] = None if outcome == "exact" else outcome
    print(json.dumps(answers))
