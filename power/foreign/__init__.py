"""Known bugs in foreign code: complete model files of other shapes than ours, and the bugs as edits of their text.

`python -m power.foreign` measures which are caught there, and by which check.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

FORMS = {  # file → the architecture that it declares
    "nanogpt": "gpt2",
    "einsum_gpt": "gpt2",
    "hf_like": "gpt2",
    "homework": "gpt2",
    "llama": "llama",
    "hf_llama": "llama",
    "rotary_einsum": "llama",
}
FOLDER = Path(__file__).parent / "forms"


@cache
def source_of(form: str) -> str:
    return (FOLDER / f"{form}.py").read_text(encoding="utf-8")
