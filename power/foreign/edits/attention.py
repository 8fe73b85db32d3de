"""Attention: its scale, softmax, heads and groups, and the causal mask."""

from __future__ import annotations

from ..edit import Edit
from ..wording import CACHED, SCORES_MASKED, SOFTMAX, causal, hidden_scores, kernel

SCALE = "self.scale = 1 / math.sqrt(self.head_dim)"
SDPA = "F.scaled_dot_product_attention(q, k, v,"
MERGED = "y = y.transpose(1, 2).reshape(B, T, C)"
REPEATED = "t.repeat_interleave(self.n_head // self.n_kv, dim=1)"
HEADS_ON_AN_AXIS = ("einsum_gpt", "hf_like", "llama", "rotary_einsum")  # of the scores


def scale(bug: str, value: str) -> Edit:
    return Edit(bug, {SCALE: f"self.scale = {value}"})


def values(bug: str, new: str) -> list[Edit]:
    """Another third operand of attention."""
    return [
        Edit(bug, {"weights @ v": f"weights @ {new}"}),
        Edit(bug, {"weights, v)": f"weights, {new})"}),
        Edit(bug, {SDPA: f"F.scaled_dot_product_attention(q, k, {new},"}),
    ]


def first_operands(bug: str, q: str, k: str) -> list[Edit]:
    """Other queries and keys in the product that makes the scores."""
    return [
        Edit(bug, {"q @ k.transpose(-2, -1)": f"{q} @ {k}.transpose(-2, -1)"}),
        Edit(bug, {"torch.matmul(q, k.transpose(-2, -1))": f"torch.matmul({q}, {k}.transpose(-2, -1))"}),
        Edit(bug, {'>bhqk", q, k)': f'>bhqk", {q}, {k})'}),
        Edit(bug, {'>bgrqk", q, k)': f'>bgrqk", {q}, {k})'}),
        Edit(bug, {SDPA: f"F.scaled_dot_product_attention({q}, {k}, v,"}),
    ]


def softmax(bug: str, new: str, **how: tuple[str, ...]) -> Edit:
    return Edit(bug, {SOFTMAX: f"weights = {new}"}, **how)


def filled(bug: str, value: str) -> Edit:
    return Edit(bug, {SCORES_MASKED: f"scores = scores.masked_fill(hidden, {value})"})


def covers(bug: str, length: int) -> list[Edit]:
    """No causal mask at all beyond a length."""
    old = "hidden = torch.ones(T,"
    return [Edit(bug, {old: f"hidden = (T <= {length}) & torch.ones(T,"}),
            Edit(bug, {"is_causal=True": f"is_causal=T <= {length}"})]  # fmt: skip


SCALES = [
    scale("scale-missing", "1.0"),
    scale("scale-multiplied", "math.sqrt(self.head_dim)"),
    scale("scale-by-d-model", "1 / math.sqrt(self.n_head * self.head_dim)"),
    scale("scale-without-root", "1 / self.head_dim"),
    scale("scale-by-heads", "1 / math.sqrt(self.n_head)"),
    Edit("scale-by-layer", {SCALE: f"{SCALE} / (layer + 1)"}, only_in=CACHED),
    *kernel("scale-by-sequence", {" * self.scale": " / math.sqrt(T)"}, {"scale=self.scale": "scale=1 / math.sqrt(T)"}),
    *first_operands("scale-twice", "(q * self.scale)", "k"),
    Edit("scale-after-softmax", {" * self.scale": "", SOFTMAX: f"{SOFTMAX} * self.scale"}),
    *kernel(
        "other-scale-without-gradients",
        {" * self.scale": " * (self.scale if torch.is_grad_enabled() else 1.0)"},
        {"scale=self.scale": "scale=self.scale if torch.is_grad_enabled() else 1.0"},
    ),
]

SOFTMAXES = [
    softmax("softmax-over-queries", "scores.softmax(dim=-2)"),
    softmax("softmax-over-heads", "scores.softmax(dim=1)", only_in=HEADS_ON_AN_AXIS),
    Edit(
        "softmax-over-heads-masked-after",
        {SCORES_MASKED: "pass", SOFTMAX: "weights = scores.softmax(dim=1).masked_fill(hidden, 0.0)"},
        only_in=HEADS_ON_AN_AXIS,
    ),
    softmax("softmax-plus-one", "F.pad(scores, (1, 0)).softmax(dim=-1)[..., 1:]"),
    softmax("sigmoid-for-softmax", "scores.sigmoid()"),
    softmax("softmax-without-maximum", "scores.exp() / scores.exp().sum(dim=-1, keepdim=True)"),
    Edit(
        "attention-softcap-undeclared",
        {SCORES_MASKED: SCORES_MASKED.replace("scores.m", "(5 * torch.tanh(scores / 5)).m")},
    ),
    Edit("mask-added-and-subtracted", {SCORES_MASKED: SCORES_MASKED.replace("scores.m", "(scores + 1e4 - 1e4).m")}),
    *first_operands("query-key-norm-undeclared", "F.normalize(q, dim=-1)", "F.normalize(k, dim=-1)"),
    *values("values-are-keys", "k"),
    *values("v-detached", "v.detach()"),
]

HEADS = [
    Edit("no-output-projection", {"self.proj(y)": "y"}),
    Edit("heads-view-without-transpose", {
        f"{x} = {x}.view(B, T, self.n_head, self.head_dim).transpose(1, 2)": f"{x} = {x}.reshape(B, self.n_head, T, self.head_dim)"
        for x in "qkv"
    }),
    Edit("heads-view-without-transpose", {
        "view(B, T, self.n_head, self.head_dim).transpose(1, 2)": "view(B, self.n_head, T, self.head_dim)"
    }),
    Edit("merge-heads-without-transpose", {MERGED: "y = y.reshape(B, T, C)"}),
    Edit("head-batch-axes-confused", {
        MERGED: "y = y.flatten(0, 1).view(-1, B, T, self.head_dim).permute(1, 2, 0, 3).reshape(B, T, C)"
    }),
    *(
        Edit("last-head-dropped", {old: f"{old} * (torch.arange(C) < C - self.head_dim)"})
        for old in (MERGED, "y = y.reshape(B, T, C)")
    ),
    Edit("heads-all-alike", {MERGED: MERGED.replace("y.t", "y[:, :1].expand_as(y).t")}),
    Edit("heads-all-alike", {"y = y.reshape(B, T, C)": "y = y[:, :, :1].expand_as(y).reshape(B, T, C)"}),
    Edit("gqa-repeat-on-sequence-dim", {
        REPEATED: REPEATED.replace("dim=1", "dim=2") + ".reshape(B, self.n_head, -1, self.head_dim)"
    }),
    Edit("gqa-heads-collapse-to-one", {REPEATED: "t[:, :1].expand(-1, self.n_head, -1, -1)"}),
    Edit("gqa-heads-collapse-to-one", {
        '>bgrqk", q, k)': '>bgrqk", q, k[:, :1].expand_as(k))', "weights, v)": "weights, v[:, :1].expand_as(v))"
    }),
    Edit("gqa-k-v-grouping-mismatch", {
        f"k, v = ({REPEATED} for t in (k, v))":
            "k = k.repeat_interleave(self.n_head // self.n_kv, dim=1)\n"
            "        v = v.repeat(1, self.n_head // self.n_kv, 1, 1)"
    }),
    Edit("gqa-k-v-grouping-mismatch", {
        'einsum("bgrqk,bgkd->bgrqd", weights, v)':
            'einsum("brgqk,bgkd->brgqd", weights.view(B, self.n_head // self.n_kv, self.n_kv, T, S), v)'
    }),
]  # fmt: skip

CAUSAL = [
    *causal("no-causal-mask", ".triu(T)", ".triu(S)", "is_causal=False"),
    *causal(
        "causal-mask-dropped-on-a-branch",
        ".triu(T if self.training else 1)",
        ".triu(S if self.training else S - T + 1)",
        "is_causal=not self.training",
    ),
    Edit("causal-mask-dropped-with-dropout", {"is_causal=True": "is_causal=rate == 0.0"}),
    Edit("causal-mask-dropped-with-dropout", {".triu(1)": ".triu(T if self.training and self.attn_drop.p > 0 else 1)"}),
    Edit(
        "causal-mask-dropped-with-dropout",
        {".triu(S - T + 1)": ".triu(S if self.training and self.drop.p > 0 else S - T + 1)"},
        only_in=("hf_like",),
    ),
    *(
        edit
        for bug, right in (("causal-mask-wrong-in-some-layers", "self.layer > 0"), ("last-layer-unmasked", "self.layer != 1"))
        for edit in (
            Edit(bug, {"attn_mask=~hidden": f"attn_mask=~(hidden & ({right}))"}),
            Edit(
                bug,
                {"scores.masked_fill(hidden,": f"scores.masked_fill(hidden & ({right}),"},
                only_in=CACHED,
            ),
        )
    ),
    *covers("causal-hardcoded-length", 64)[1:],
    Edit("causal-hardcoded-length", {"hidden = torch.ones(T,": "hidden = (torch.arange(T)[:, None] < 64) & torch.ones(T,"}),
    *covers("unmasked-beyond-256", 256),
    *covers("unmasked-beyond-1000", 1000),
    *causal(
        "causal-sees-one-future", ".triu(2)", ".triu(S - T + 2)", "attn_mask=torch.ones(T, T, dtype=torch.bool).tril(1)"
    ),
    *causal(
        "causal-excludes-self", ".triu(0)", ".triu(S - T)", "attn_mask=torch.ones(T, T, dtype=torch.bool).tril(-1)"
    ),
    *hidden_scores("one-position-leaks", "hidden[..., 5:6, 6:7] = False"),
    *hidden_scores("chunk-boundary-leaks", "hidden.diagonal(1, -2, -1)[..., 49::50] = False"),
    *hidden_scores("first-token-never-seen", "hidden[..., 1:, :1] = True"),
    *hidden_scores("late-tokens-never-seen", "hidden[..., 65:, 64:] = True"),
    *causal(
        "attention-sees-itself-only",
        ".fill_diagonal_(False)",
        ".fill_diagonal_(False)",
        "attn_mask=torch.eye(T, dtype=torch.bool)",
    ),
    filled("mask-fill-not-negative-enough", "-10.0"),
    filled("mask-fill-of-minus-ten-thousand", "-1e4"),
    filled("mask-fill-weak-in-half-precision", '-10.0 if scores.dtype.itemsize == 2 else float("-inf")'),
    filled("mask-fill-weak-under-autocast", '-10.0 if torch.is_autocast_enabled("cpu") else float("-inf")'),
    filled("mask-positive-inf", 'float("inf")'),
    Edit("mask-multiplied-after-softmax", {SCORES_MASKED: "pass", SOFTMAX: f"{SOFTMAX} * ~hidden"}),
    Edit("bool-mask-added-as-float", {SCORES_MASKED: "scores = scores + ~hidden"}),
    Edit("fp16-mask-overflow", {
        SCORES_MASKED: "scores = scores + hidden.to(scores.dtype) * torch.tensor(-1e9).to(scores.dtype)"
    }),
]  # fmt: skip

EDITS = [*SCALES, *SOFTMAXES, *HEADS, *CAUSAL]
