"""Measurements of m3ae_fast: of the installed package, or of this source tree where its modules were built into it."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).parents[1]
elsewhere = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
if not list((ROOT / "m3ae_fast").glob("_C.*")) and PathFinder.find_spec("m3ae_fast", elsewhere):
    sys.path[:] = [*elsewhere, str(ROOT)]  # `python -m benchmarks.host` puts the folder that it is run in first
