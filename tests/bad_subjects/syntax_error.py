"""Does not parse."""

import torch


def broken(:  # here
    return torch
