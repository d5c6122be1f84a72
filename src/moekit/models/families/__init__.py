"""Each family of models is one row of data, used to read it and to write it; a module holds those that belong together.

To add one: write its row in the module of its kin (or a new one, imported here), describe its names on disk with a
`Layout`, and give tests/models/twins.py a tiny model of it; every test of a family then runs on the new row.
"""

from moekit.models.families import (  # noqa: F401  (each registers its rows)
    dbrx,
    deepseek,
    ernie,
    glm,
    gpt2,
    gpt_oss,
    granite,
    grok,
    hunyuan,
    llama,
    minimax,
    mixtral,
    olmo,
    phi,
    qwen,
)
from moekit.models.families.row import ARCHS, Arch

__all__ = ["ARCHS", "Arch"]
