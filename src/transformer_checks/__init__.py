"""The one name that an installed distribution leaves in an environment: `from transformer_checks import check_model`.

A wheel holds `checks` and `transformer` inside this package. In a checkout they lie at the top, and are found there.
"""

from pathlib import Path

if not (Path(__file__).parent / "checks").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[2]))

from .checks import THEMES, all_checks, check_model

__all__ = ["THEMES", "all_checks", "check_model"]
