"""Two models with the same weights give the same numbers: logits, and how far apart they may be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..expect import Bound

BOUNDS = {
    torch.float64: Bound(1e-9, "of the largest logit; correct models differ by 1e-15 of it in float64"),
    torch.float32: Bound(1e-5, "of the largest logit; correct models differ by up to 7e-7 of it in float32"),
}


def apart(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference relative to our largest number; infinite where one side is not finite alone."""
    theirs, ours = theirs.detach(), ours.detach()
    if theirs.shape != ours.shape:
        return float("inf")
    same = (theirs == ours) | (theirs.isnan() & ours.isnan())
    difference = torch.where(same, 0.0, (theirs - ours).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))
    largest = ours[ours.isfinite()].abs().max() if bool(ours.isfinite().any()) else torch.tensor(1.0)
    return float(difference.max() / largest.clamp(min=1e-300))
