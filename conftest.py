"""Makes `benchmarks` and `tests` importable. This folder comes last, so an installed m3ae_fast is the one tested."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="every test, or every benchmark: by default those that matter most"
    )
