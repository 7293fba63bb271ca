"""Metadata and tool settings are in pyproject.toml; this file is where the native operators' build belongs."""

from setuptools import setup

setup()
