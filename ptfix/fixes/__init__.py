"""One file per upstream fault, each exporting FIX. ALL is the order in which they apply."""

from __future__ import annotations

from ptfix.patching import Fix

ALL: tuple[Fix, ...] = ()
