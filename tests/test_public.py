"""What `import rdsnet` gives."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import rdsnet


def test_public_names_are_those_of_the_type_checker_s_list() -> None:
    assert {"load", "refine_boxes", "fit_refiner", "Refiner", "build_model", "get_config"} < set(rdsnet.__all__)
    assert all(getattr(rdsnet, name).__module__.startswith("rdsnet.") for name in rdsnet.__all__)
    assert rdsnet.__version__ == version("rdsnet")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        rdsnet.lode  # noqa: B018


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, rdsnet; rdsnet.get_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
