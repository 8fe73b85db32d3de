"""GPT-2 and Llama in NumPy float64, written from the papers' formulas: one sequence, one query, one head at a time.

Deliberately slow and without batch, mask or cache: each row of a padded batch must get the logits computed here for
that row alone.
Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2), Su et al. 2021 (rotary positions), Zhang and Sennrich
2019 (RMSNorm), Shazeer 2020 (SwiGLU), Ainslie et al. 2023 (grouped key-value heads).
"""

from __future__ import annotations

import numpy as np


def logits(weights: dict[str, np.ndarray], tokens: list[int], config) -> np.ndarray:
    """Logits [T, V] of one sequence; `weights` are named as in `Transformer.state_dict`."""
    x = weights["embedding.weight"][tokens]
    if config.positions == "learned":
        x = x + weights["positions.table.weight"][: len(tokens)]
    norm, feed_forward = {"layer": layer_norm, "rms": rms_norm}[config.norm], {"gelu": gelu, "swiglu": swiglu}
    for layer in range(config.n_layer):
        block = part(weights, f"blocks.{layer}.")
        x = x + attention(part(block, "attention."), norm(part(block, "attention_norm."), x, config.norm_eps), config)
        normed = norm(part(block, "feed_forward_norm."), x, config.norm_eps)
        x = x + feed_forward[config.feed_forward](part(block, "feed_forward."), normed)
    return norm(part(weights, "norm."), x, config.norm_eps) @ weights["head.weight"].T


def part(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def linear(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return x @ weights["weight"].T + weights.get("bias", 0.0)


def attention(weights: dict[str, np.ndarray], x: np.ndarray, config) -> np.ndarray:
    T, D, H, G = len(x), config.head_width, config.n_head, config.kv_heads
    heads = linear(part(weights, "qkv."), x).reshape(T, H + 2 * G, D)
    q, k, v = heads[:, :H], heads[:, H : H + G], heads[:, H + G :]
    if config.positions != "learned":
        q, k = rotate(q, config), rotate(k, config)
    out = np.zeros((T, H, D))
    for t in range(T):
        for h in range(H):
            g = h * G // H
            weight = np.exp(k[: t + 1, g] @ q[t, h] / np.sqrt(D))
            out[t, h] = weight @ v[: t + 1, g] / weight.sum()
    return linear(part(weights, "output."), out.reshape(T, H * D))


def rotate(x: np.ndarray, config) -> np.ndarray:
    """Each pair of features as a complex number, times e^{i m θ_j} at position m, where θ_j = base^(-2j / D)."""
    T, _, D = x.shape
    half = D // 2
    interleaved = config.positions == "rotary-interleaved"
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    theta = config.rope_base ** (-2 * np.arange(half) / D)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * np.arange(T)[:, None, None] * theta)
    out = np.empty_like(x)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def layer_norm(weights: dict[str, np.ndarray], x: np.ndarray, eps: float) -> np.ndarray:
    centered = x - x.mean(-1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
    return normed * weights["weight"] + weights.get("bias", 0.0)


def rms_norm(weights: dict[str, np.ndarray], x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights["weight"]


def gelu(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU, x Φ(x) ≈ x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    hidden = linear(part(weights, "input."), x)
    hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return linear(part(weights, "output."), hidden)


def swiglu(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    gate = linear(part(weights, "gate."), x)
    return linear(part(weights, "output."), gate / (1 + np.exp(-gate)) * linear(part(weights, "input."), x))
