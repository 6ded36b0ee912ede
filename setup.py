"""`pip install .`: CMake builds the compiled modules, setuptools packages them. Metadata: pyproject.toml."""

from scikit_build_core.setuptools.wrapper import setup

setup(cmake_source_dir=".")
