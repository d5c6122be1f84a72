import pytest
import torch

from tiny import tiny_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of tiny models: moe (chats), base (no chat template), dense."""
    root = tmp_path_factory.mktemp("models")
    kinds = {"moe": {"context": 4096}, "base": {"chat": False}, "dense": {"moe": False}}
    for name, kind in kinds.items():
        torch.manual_seed(0)
        tiny_model(**kind).save(root / name)
    return root
