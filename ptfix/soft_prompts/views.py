"""Shallow views of modules: the same weights and children, attributes of their own.

Whatever is set on a view, nobody else sees it: there is nothing to restore after an exception, and no other thread to
disturb.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch


def shallow(module: Any, **attributes: Any) -> Any:
    """A view of one module. Its children are the module's own, and so are its weights, also when they are replaced:
    FSDP2 puts whole parameters in place of the shards for the time of a forward."""
    kind: type[Any] = type(module)
    view = object.__new__(kind)  # not copy.copy(): a module sharded by FSDP2 is copied by calling its class's __init__
    view.__dict__.update(module.__dict__)
    for name in ("_modules", "_buffers"):  # else a module assigned to the view (a cache is one in 4.44) lands on both
        view.__dict__[name] = copy.copy(module.__dict__[name])
    view.__dict__.update(attributes)
    return view


def bound(module: Any, **attributes: Any) -> Any:
    """A view of one module on which its own functions run, also those that accelerate has hung on the module."""
    view = shallow(module)
    view.__dict__.update({name: _moved(value, {id(module): view}) for name, value in view.__dict__.items()})
    view.__dict__.update(attributes)
    return view


def tree(module: Any, edit: Callable[[Any, torch.nn.Module], None]) -> Any:
    """A view of a module and of all below it; ``edit(view, module)`` sets each view's attributes."""
    view = shallow(module)
    for name, child in module._modules.items():
        if child is not None:
            view._modules[name] = tree(child, edit)
    edit(view, module)
    return view


def with_parameters(module: Any, change: Callable[[torch.nn.Parameter], torch.nn.Parameter]) -> Any:
    """A view of a module and of all below it whose parameters are what ``change(parameter)`` makes of the module's."""

    def edit(view: Any, original: torch.nn.Module) -> None:
        view.__dict__["_parameters"] = parameters = {
            name: parameter if parameter is None else change(parameter)
            for name, parameter in original._parameters.items()
        }
        names = view.__dict__.get("_flat_weights_names")
        if names is not None:  # an LSTM computes with a list of its own
            view.__dict__["_flat_weights"] = [parameters[name] for name in names]

    return tree(module, edit)


def private(module: Any) -> Any:
    """A view of a module and of all below it, in eval mode, whose bound methods stay inside it: whatever it runs and
    stores, nothing shared is changed."""
    pairs: list[tuple[Any, torch.nn.Module]] = []

    def edit(view: Any, original: torch.nn.Module) -> None:
        view.__dict__["training"] = False
        pairs.append((view, original))

    view = tree(module, edit)
    twins = {id(original): each for each, original in pairs}
    for each, _ in pairs:
        each.__dict__.update({name: _moved(value, twins) for name, value in each.__dict__.items()})
    return view


def _moved(value: Any, twins: dict[int, Any]) -> Any:
    """A method bound to an original (peft's disable_adapter() and accelerate's hooks hang such on modules), bound to
    its view."""
    if isinstance(value, types.MethodType) and id(value.__self__) in twins:
        return types.MethodType(value.__func__, twins[id(value.__self__)])
    if isinstance(value, functools.partial) and value.args and id(value.args[0]) in twins:
        first, *rest = value.args
        return functools.partial(_moved(value.func, twins), twins[id(first)], *rest, **value.keywords)
    return value
