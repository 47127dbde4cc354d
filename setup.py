"""Everything is declared in pyproject.toml; this file is where the C++ extension will be built."""

from setuptools import setup

setup()
