"""The matrix products of a GPT-2 shaped model and nothing else: what no implementation can do without.

Attention's products are taken in full; a kernel that leaves out what the causal mask hides needs half of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..subject import Sizes


def weight_shapes(sizes: Sizes) -> list[tuple[int, int]]:
    """[out, in] of every matrix that a token is multiplied by, layer by layer: qkv, output, in, out; then the head."""
    C = sizes.n_embd
    return [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * sizes.n_layer + [(sizes.vocab_size, C)]


def training_products(
    sizes: Sizes, B: int, T: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One training step's products on tensors of their own, forward and backward, when called."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    shapes = weight_shapes(sizes)
    weights = {shape: drawn(*shape) for shape in set(shapes)}
    activations = {width: drawn(B * T, width) for shape in shapes for width in shape}
    head_width = sizes.n_embd // sizes.n_head
    q, k, v = (drawn(B * sizes.n_head, T, head_width) for _ in range(3))
    scores = drawn(B * sizes.n_head, T, T)

    @torch.no_grad()
    def run() -> None:
        for out, into in shapes:
            x, gradient, weight = activations[into], activations[out], weights[out, into]
            x @ weight.T, gradient @ weight, gradient.T @ x
        for _ in range(sizes.n_layer):
            q @ k.transpose(1, 2), scores @ v  # forward; then the gradients of v, the scores, q and k
            scores.transpose(1, 2) @ q, q @ v.transpose(1, 2), scores @ k, scores.transpose(1, 2) @ q

    return run


def decoding_products(
    sizes: Sizes, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One token's matrix-vector products when called: every weight read once, which is what bounds decoding."""
    matrices = [torch.randn(shape, device=device, dtype=dtype) for shape in weight_shapes(sizes)]
    vectors = [torch.randn(matrix.shape[1], device=device, dtype=dtype) for matrix in matrices]

    @torch.no_grad()
    def run() -> None:
        for matrix, vector in zip(matrices, vectors, strict=True):
            matrix @ vector

    return run
