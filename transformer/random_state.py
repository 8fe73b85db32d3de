"""The random states that dropout draws from: taken, set, and left as found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

RandomState = dict[str, Tensor]  # of the CPU's generator and of the device's, where that is another


def seeded(seed: int, device: torch.device) -> RandomState:
    """What a program that begins with torch.manual_seed(seed) has; nobody's state changes."""
    devices = {"cpu", device.type}
    return {kind: torch.Generator(kind).manual_seed(seed).get_state() for kind in devices}


def current(device: torch.device) -> RandomState:
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*which(device))
    return state


def restore(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], *which(device))


def which(device: torch.device) -> tuple[Any, ...]:
    return () if device.type == "mps" else (device,)  # there is but one


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within leaves no trace."""
    state = current(device)
    try:
        yield
    finally:
        restore(state, device)
