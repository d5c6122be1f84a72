"""The silent mistakes that a configuration already shows, each with its cause and its remedy. No torch."""

from moekit.lint.findings import Finding, Level
from moekit.lint.linter import lint, lint_file

__all__ = ["Finding", "Level", "lint", "lint_file"]
