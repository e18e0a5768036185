"""RDSNet: objects as tight boxes and full-resolution masks, each correcting the other.

`__init__.pyi` lists the public names. They are imported when first used: `rdsnet --help` does not wait for torch.
"""

import ast
from importlib import import_module
from pathlib import Path

_LIST = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {own.name: node.module for node in _LIST.body if isinstance(node, ast.ImportFrom) for own in node.names}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("rdsnet")
    if name not in _HOMES:
        raise AttributeError(f"module 'rdsnet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
