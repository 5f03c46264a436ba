"""Exceptions in words for people."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """``KeyError: 'position_ids'``: the exception's type and its first line, cut to 160 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")
