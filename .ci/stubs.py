"""Types of the compiled module, from what pybind11 says of it: `python .ci/stubs.py` writes m3ae_fast/_C.pyi."""

import re
from pathlib import Path

HEAD = '''"""Types of m3ae_fast._C, made by `python .ci/stubs.py`. Outputs are arguments; None: one is not wanted."""

from collections.abc import Sequence

from torch import Tensor

'''
PLAIN = {
    r"(\w+\.)*SupportsInt \| (\w+\.)*SupportsIndex": "int",
    r"(\w+\.)*SupportsFloat \| (\w+\.)*SupportsIndex": "float",
    r"collections\.abc\.": "",
    r'(\w+\.)*Annotated\[(.*?), "FixedSize\(\d+\)"\]': r"\2",
}


def stub(module) -> str:
    """The whole file, an entry for each public name in alphabetical order."""
    lines = []
    for name in sorted(name for name in dir(module) if not name.startswith("_")):
        value = getattr(module, name)
        if not callable(value):
            lines.append(f"{name}: {type(value).__name__}")
            continue
        signature, _, says = value.__doc__.partition("\n")
        for pattern, plain in PLAIN.items():
            signature = re.sub(pattern, plain, signature)
        says = f"  # {' '.join(says.split())}" if says.strip() else ""
        entry = f"def {signature}: ...{says}"
        if len(entry) > 120:  # as ruff wraps it
            before, arguments, after = re.match(r"(\w+\()(.*)(\) -> .*)", signature).groups()
            entry = "\n".join(
                [f"def {before}", *(f"    {each}," for each in arguments.split(", ")), f"{after}: ...{says}"]
            )
        lines.append(entry)
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    from m3ae_fast import _C

    Path(_C.__file__).with_name("_C.pyi").write_text(stub(_C), encoding="utf-8")
