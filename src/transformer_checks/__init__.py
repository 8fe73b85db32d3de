"""The one name that an installed distribution leaves in an environment: `from transformer_checks import check_model`.

A wheel holds `checks` and `transformer` inside this package. In a checkout they lie at the top, and are found there.
"""

import sys
from pathlib import Path

from .as_written import AsWritten

if "pytest" in sys.modules:
    sys.meta_path.insert(0, AsWritten)

if not (Path(__file__).parent / "checks").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[2]))

from .checks import THEMES, all_checks, check_model

__all__ = ["THEMES", "all_checks", "check_model"]
