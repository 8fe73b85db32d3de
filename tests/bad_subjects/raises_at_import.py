"""Divides by zero when it is imported."""

import torch

scale = torch.pi / 0  # here
