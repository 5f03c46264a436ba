"""Line charts, one above the other over one x axis. Needs matplotlib: ``pip install 'ptfix[plot]'``."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptfix import whole_file

FORMATS = ("svg", "png", "pdf")

Points = tuple[Sequence[float], Sequence[float]]  #: x, y

_COLOURS = ("#1f77b4", "#c44e52", "#2a9d5c", "#8a5fb0", "#d98c1f", "#5f6b76")
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One chart. Lines of one name have one colour in all panels."""

    label: str  #: of the y axis, with its unit
    lines: Mapping[str, Points]
    spreads: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None  #: least and most, shown as a band
    floor: float | None = None  #: the y axis begins here at the latest


def problem(path: Path) -> str | None:
    """Why no picture can be made there, in one sentence that says what to do; None if one can."""
    if path.suffix[1:].lower() not in FORMATS:
        return f"{path.name} must end in {', '.join(f'.{name}' for name in FORMATS)}: that decides what is drawn."
    if importlib.util.find_spec("matplotlib") is None:
        return "a picture needs matplotlib: pip install 'ptfix[plot]'"
    return None


def draw(panels: Sequence[Panel], path: Path, x_label: str, title: str = "") -> None:
    """Draw the panels and write the file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    # Text stays text, and the same numbers make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ptfix", "font.size": 9}):
        figure = Figure(figsize=(7.5, 0.6 + 1.9 * len(panels)), layout="constrained")
        figure.suptitle(title, fontsize=10)
        told: set[str] = set()
        rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            for name, (x, y) in panel.lines.items():
                number = names.index(name)
                colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]
                marker = "o" if len(x) <= 12 else ""  # a single point would be no line
                axes.plot(x, y, style, label=name, color=colour, marker=marker, markersize=3, linewidth=1.4)
                if panel.spreads and name in panel.spreads:
                    axes.fill_between(x, *panel.spreads[name], color=colour, alpha=0.2, linewidth=0)
            if panel.floor is not None:
                axes.set_ylim(bottom=min(panel.floor, axes.get_ylim()[0]))
            axes.set_ylabel(panel.label)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            if len(names) > 1 and not told.issuperset(panel.lines):  # said once, where they first are
                axes.legend(frameon=False, fontsize=8)
                told.update(panel.lines)
        rows[-1].set_xlabel(x_label)
        file = io.BytesIO()
        kind = path.suffix[1:].lower()
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(file, format=kind, dpi=150, metadata=dates.get(kind))
    whole_file.write(path, file.getvalue())
