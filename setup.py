"""`pip install .`: CMake builds the compiled modules, setuptools packages them. Metadata: pyproject.toml."""

import tempfile

from scikit_build_core.setuptools.wrapper import setup

# Built in a folder of its own: what an earlier build left in ./build, with other options, would be packed, too.
with tempfile.TemporaryDirectory(prefix="m3ae_fast-") as folder:
    setup(cmake_source_dir=".", options={"build": {"build_base": folder}})
