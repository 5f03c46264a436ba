"""A next release, imitated: GenerationMixin's private methods are called otherwise, in the class and in its callers.

python -m tests.soft_prompts.drift static|inputs|private|drafts ARCHITECTURES MODES
prints, mode by mode, what the public contract answers.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from typing import Any

from transformers.generation import utils


def _rewrite(name: str, edit: Any) -> bool:
    function = vars(utils.GenerationMixin)[name]
    bare = function.__func__ if isinstance(function, (staticmethod, classmethod)) else function
    if not inspect.isfunction(bare):
        return False
    source = textwrap.dedent(inspect.getsource(bare))
    edited = edit(source)
    if edited == source:
        return False
    namespace = dict(vars(utils))
    exec(compile(edited, utils.__file__, "exec"), namespace)
    setattr(utils.GenerationMixin, name, namespace[bare.__name__])
    return True


def static() -> None:
    """The maker of static caches is no longer asked by a name that a subclass could override."""
    makers = [name for name in ("_prepare_static_cache", "_get_cache") if hasattr(utils.GenerationMixin, name)]
    pattern = re.compile(rf"self\.({'|'.join(makers)})\(")
    changed = [
        _rewrite(name, lambda source: pattern.sub(r"GenerationMixin.\1(self, ", source))
        for name in list(vars(utils.GenerationMixin))
    ]
    assert any(changed)


def inputs() -> None:
    """Inputs are prepared by a method of another name."""
    mixin: Any = utils.GenerationMixin
    mixin._prepare_inputs = lambda self, *args, **kwargs: type(self).prepare_inputs_for_generation(
        self, *args, **kwargs
    )
    changed = [
        _rewrite(name, lambda source: source.replace("self.prepare_inputs_for_generation(", "self._prepare_inputs("))
        for name in list(vars(mixin))
    ]
    assert any(changed)


def private() -> None:
    """Every private helper has another name, in the class and in all that call it on self."""
    mixin: Any = utils.GenerationMixin
    helpers = [name for name in vars(mixin) if re.match(r"_(prepare|get|update|maybe|expand|validate|prefill)", name)]
    helpers = [name for name in helpers if inspect.isroutine(getattr(mixin, name))]
    pattern = re.compile(rf"\b(self|cls|GenerationMixin|super\(\))\.({'|'.join(helpers)})\b")
    for name in list(vars(mixin)):
        _rewrite(name, lambda source: pattern.sub(r"\1.\2_of_another_name", source))
    for name in helpers:
        setattr(mixin, f"{name}_of_another_name", vars(mixin)[name])
        delattr(mixin, name)


def drafts() -> None:
    """Every draft counts as accepted, also where the model says otherwise."""
    _rewrite(
        "_assisted_decoding",
        lambda source: source.replace(
            "n_matches = ((~(candidate_new_tokens == selected_tokens[:, :-1])).cumsum(dim=-1) < 1).sum()",
            "n_matches = candidate_length",
        ),
    )


if __name__ == "__main__":
    {function.__name__: function for function in (static, inputs, private, drafts)}[sys.argv[1]]()
    from ptfix.soft_prompts import public_contract
    from tests.matrix.contract import PublicContract
    from tests.matrix.modes import bench, judge

    answers = {f"trial of {mode}": fault for mode, fault in public_contract.modes().items()}
    for architecture in sys.argv[2].split(","):
        for method in ("prompt_tuning", "prefix_tuning"):
            made = PublicContract(**vars(bench(architecture, method)))
            for mode in sys.argv[3].split(","):
                outcome = judge(mode, made)
                answers[f"{architecture} {method} {mode}"] = None if outcome == "exact" else outcome
    print(json.dumps(answers))
