"""The parts of a layer: residual sums, norms, feed-forward, dropout; and what gradients pass through them."""

from __future__ import annotations

from ..edit import Edit
from ..wording import GPTS, before_blocks, blocks

GELU = 'h = F.gelu(self.up(x), approximate="tanh")'
SWIGLU = "h = F.silu(self.gate(x)) * self.up(x)"
MEAN, VARIANCE = "mean = x.mean(-1, keepdim=True)", "var = x.var(-1, keepdim=True, unbiased=False)"
CENTRED, DEVIATION = "(x - mean) / torch.sqrt", "torch.sqrt(var + self.eps)"
SQUARES = "squares = x.float().pow(2).mean(-1, keepdim=True)"
UPDATE = "return self.drop(self.down(h))"
ATTENTION_DROPOUT = "weights = self.attn_drop(weights)"
LOOP = "for block in self.blocks:\n            x = block("


def gelu(bug: str, code: str) -> Edit:
    return Edit(bug, {GELU: code})


def swiglu(bug: str, code: str) -> Edit:
    return Edit(bug, {SWIGLU: f"h = {code}"})


def statistics(bug: str, mean: str, variance: str, squares: str) -> list[Edit]:
    return [Edit(bug, {MEAN: mean, VARIANCE: variance}), Edit(bug, {SQUARES: squares})]


def gain(bug: str, new: str) -> list[Edit]:
    """Another use of the norm's gain."""
    return [Edit(bug, {f" * self.{name}": new.format(f"self.{name}")}) for name in ("weight", "gain")]


def epsilon(bug: str, value: str) -> list[Edit]:
    return [Edit(bug, {old: old.rpartition("1e-")[0] + value}) for old in ("eps=1e-5", "eps: float = 1e-6", "eps=1e-6")]


def dropped(bug: str, code: str) -> Edit:
    """Another dropout after the feed-forward."""
    return Edit(bug, {UPDATE: code})


RESIDUALS = [
    *blocks("attention-residual-missing", attention="x = self.attn(self.norm1(x)", total="x = a"),
    *blocks("feed-forward-residual-missing", feed_forward="x = self.mlp(self.norm2(x))"),
    *blocks(
        "residual-subtracted",
        feed_forward="x = x - self.mlp(self.norm2(x))",
        attention="x = x - self.attn(self.norm1(x)",
        total="x = x - a",
    ),
    *blocks(
        "residual-doubled",
        feed_forward="x = x + x",
        attention="x = x + x\n        self.attn(self.norm1(x)",
        total="x = x + x",
    ),
    *blocks(
        "residual-halved",
        feed_forward="x = (x + self.mlp(self.norm2(x))) / 2",
        attention="x = x / 2 + 0.5 * self.attn(self.norm1(x)",
        total="x = (x + a) / 2",
    ),
    *blocks(
        "update-scaled-by-depth",
        feed_forward="x = x + 0.5 * self.mlp(self.norm2(x))",
        attention="x = x + 0.5 * self.attn(self.norm1(x)",
        total="x = x + 0.5 * a",
    ),
    *blocks(
        "residual-from-normed-input",
        feed_forward="x = self.norm2(x)\n        x = x + self.mlp(x)",
        attention="x = self.norm1(x)\n        x = x + self.attn(x",
        total="x = self.norm1(x) + a",
    ),
    *blocks(
        "residual-from-the-blocks-input",
        feed_forward="x = before + self.mlp(self.norm2(x))",
        attention="before = x\n        x = x + self.attn(self.norm1(x)",
        total="before, x = x, x + a",
    ),
    *blocks(
        "post-norm-for-pre-norm",
        feed_forward="x = self.norm2(self.norm1(x) + self.mlp(self.norm1(x)))",
        attention="x = x + self.attn(x",
        call="a, present = self.attn(x,",
    ),
    *blocks(
        "norm-of-the-update",
        feed_forward="x = before + self.norm1(x)\n        x = x + self.norm2(self.mlp(x))",
        attention="before = x\n        x = self.attn(x",
        call="before = x\n        a, present = self.attn(x,",
        total="x = a",
    ),
    *blocks(
        "parallel-for-sequential",
        feed_forward="x = x + self.mlp(self.norm2(first))",
        attention="first = x\n        x = x + self.attn(self.norm1(x)",
        total="first, x = x, x + a",
    ),
    *blocks(
        "feed-forward-first",
        feed_forward="x = x",
        attention="x = x + self.mlp(self.norm2(x))\n        x = x + self.attn(self.norm1(x)",
        call="x = x + self.mlp(self.norm2(x))\n        a, present = self.attn(self.norm1(x),",
    ),
    *blocks(
        "feed-forward-reads-the-first-norm",
        feed_forward="x = x + self.mlp(normed)",
        attention="normed = self.norm1(x)\n        x = x + self.attn(normed",
        call="normed = self.norm1(x)\n        a, present = self.attn(normed,",
    ),
    Edit("block-never-runs", {LOOP: LOOP.replace("blocks", "blocks[:-1]")}),
    Edit("block-never-runs", {"enumerate(self.blocks)": "enumerate(self.blocks[:-1])"}),
    Edit("block-output-discarded", {"x = block(x": "before = x\n            x = block(x", "self.norm(x)": "self.norm(before)"}),
    Edit("block-output-discarded", {
        "x, present = block(": "before = x\n            x, present = block(", "self.norm(x)": "self.norm(before)"
    }),
]  # fmt: skip

GRADIENTS = [
    *blocks("feed-forward-detached", feed_forward="x = x + self.mlp(self.norm2(x.detach()))"),
    *blocks("residual-detached", feed_forward="x = x.detach() + self.mlp(self.norm2(x))"),
    *blocks(
        "gradient-wrong-in-training",
        feed_forward="x = (x.detach() if self.training else x) + self.mlp(self.norm2(x))",
    ),
    *blocks("gradient-scaled", feed_forward="x = x + self.mlp(self.norm2(x))\n        x = x / 2 + x.detach() / 2"),
    *blocks("inplace-op-breaks-autograd", feed_forward="normed = self.norm2(x)\n        x += self.mlp(normed)"),
    *blocks(
        "inplace-op-hidden-from-autograd",
        feed_forward="normed = self.norm2(x)\n        x.data.mul_(1.1)\n        x = x + self.mlp(normed)",
    ),
    *statistics(
        "norm-statistics-detached",
        MEAN.replace("x.", "x.detach()."),
        VARIANCE.replace("x.", "x.detach()."),
        SQUARES.replace("x.", "x.detach()."),
    ),
]

FEED_FORWARDS = [
    gelu("mlp-no-activation", "h = self.up(x)"),
    Edit(
        "activation-after-second-linear",
        {GELU: "h = self.up(x)", UPDATE: 'return self.drop(F.gelu(self.down(h), approximate="tanh"))'},
    ),
    dropped("activation-after-both", 'return self.drop(F.gelu(self.down(h), approximate="tanh"))'),
    gelu("gelu-variant", "u = self.up(x)\n        h = u * torch.sigmoid(1.702 * u)"),
    gelu(
        "gelu-written-wrong",
        "u = self.up(x)\n        h = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + u**3)))",
    ),
    gelu("relu-for-gelu", "h = F.relu(self.up(x))"),
    gelu("silu-for-gelu", "h = F.silu(self.up(x))"),
    gelu("relu-squared-for-gelu", "h = F.relu(self.up(x)) ** 2"),
    gelu("tanh-for-gelu", "h = torch.tanh(self.up(x))"),
    gelu("bias-not-added", GELU.replace("self.up(x)", "F.linear(x, self.up.weight)")),
    swiglu("gelu-for-silu", "F.gelu(self.gate(x)) * self.up(x)"),
    swiglu("gelu-tanh-for-silu", 'F.gelu(self.gate(x), approximate="tanh") * self.up(x)'),
    swiglu("sigmoid-for-silu", "torch.sigmoid(self.gate(x)) * self.up(x)"),
    swiglu("relu-for-silu", "F.relu(self.gate(x)) * self.up(x)"),
    swiglu("gate-without-activation", "self.gate(x) * self.up(x)"),
    swiglu("activation-of-the-product", "F.silu(self.gate(x) * self.up(x))"),
    swiglu("activation-of-both", "F.silu(self.gate(x)) * F.silu(self.up(x))"),
    swiglu("gate-added", "F.silu(self.gate(x)) + self.up(x)"),
    gelu("downcast-inside", GELU + ".bfloat16().to(x.dtype)"),
    swiglu("downcast-inside", "(F.silu(self.gate(x)) * self.up(x)).bfloat16().to(x.dtype)"),
]

PAST_MEAN = "{0} = {0}.cumsum(1) / torch.arange(1, x.size(1) + 1)[:, None]"
NORMS = [
    *statistics(
        "norm-over-sequence",
        MEAN.replace("-1", "(-2, -1)"),
        VARIANCE.replace("-1", "(-2, -1)"),
        SQUARES.replace("-1", "(-2, -1)"),
    ),
    *statistics(
        "norm-over-batch",
        MEAN.replace("-1", "(0, -1)"),
        VARIANCE.replace("-1", "(0, -1)"),
        SQUARES.replace("-1", "(0, -1)"),
    ),
    *statistics(
        "norm-averages-over-the-past",
        MEAN,
        f"{VARIANCE}\n        {PAST_MEAN.format('var')}",
        f"{SQUARES}\n        {PAST_MEAN.format('squares')}",
    ),
    Edit("norm-without-mean", {CENTRED: "x / torch.sqrt"}),
    Edit("norm-adds-the-mean", {CENTRED: "(x + mean) / torch.sqrt"}),
    Edit("norm-divides-by-variance", {DEVIATION: "(var + self.eps)"}),
    Edit("norm-divides-by-nothing", {f" / {DEVIATION}": ""}),
    Edit("norm-unbiased-variance", {"unbiased=False": "unbiased=True"}),
    Edit("norm-unbiased-deviation", {DEVIATION: "(x.std(-1, keepdim=True) + self.eps)"}),
    Edit("rms-sum-not-mean", {SQUARES: SQUARES.replace("mean", "sum")}),
    Edit("rms-subtracts-mean", {SQUARES: f"x = x - x.mean(-1, keepdim=True)\n        {SQUARES}"}),
    Edit("rms-divided-by-the-inverse-root", {"torch.rsqrt(": "torch.sqrt("}),
    Edit("rms-eps-outside-sqrt", {"torch.rsqrt(squares + self.eps)": "(1 / (torch.sqrt(squares) + self.eps))"}),
    Edit("norm-epsilon-is-a-floor", {"torch.rsqrt(squares + self.eps)": "torch.rsqrt(squares.clamp(min=self.eps))"}),
    *epsilon("norm-wrong-eps", "0.1"),
    *epsilon("norm-epsilon-of-one", "1.0"),
    *gain("norm-gain-missing", ""),
    *gain("norm-gain-added", " + {}"),
    *gain("rms-one-plus-weight-twice", " * (1 + {})"),
    *(
        Edit("norm-gain-and-bias-swapped", {f" * self.{name} + self.bias": f" * self.bias + self.{name}"})
        for name in ("weight", "gain")
    ),
    Edit("attention-norm-missing", {"self.norm1(x)": "x"}),
    Edit("feed-forward-norm-missing", {"self.norm2(x)": "x"}),
    Edit("final-norm-missing", {"self.norm(x)": "x"}),
    Edit("final-norm-twice", {"self.norm(x)": "self.norm(self.norm(x))"}),
    Edit("norm-reused", {"self.norm2(x)": "self.norm1(x)"}),
    *before_blocks("embedding-normed", "x = F.layer_norm(x, x.shape[-1:])"),
]

DROPOUTS = [
    dropped("resid-dropout-in-eval", "return F.dropout(self.down(h), 0.1)"),
    dropped("dropout-module-built-in-forward", "return nn.Dropout(self.drop.p)(self.down(h))"),
    Edit("attn-dropout-in-eval", {"rate = self.dropout if self.training else 0.0": "rate = self.dropout"}),
    Edit("attn-dropout-in-eval", {ATTENTION_DROPOUT: "weights = F.dropout(weights, self.attn_drop.p)"}),
    dropped("dropout-rate-ignored", "return F.dropout(self.down(h), training=self.training)"),
    dropped("dropout-rate-means-kept", "return F.dropout(self.down(h), 1 - self.drop.p, self.training)"),
    dropped("dropout-without-rescaling",
            "h = self.down(h)\n        return h * (torch.rand_like(h) >= self.drop.p) if self.training else h"),
    dropped("dropout-scaled-by-its-rate",
            "h = self.down(h)\n        if not self.training or self.drop.p == 0:\n            return h\n"
            "        return h * (torch.rand_like(h) >= self.drop.p) / self.drop.p"),
    dropped("dropout-scaled-in-evaluation-too",
            "return self.drop(self.down(h)) * (1.0 if self.training else 1 - self.drop.p)"),
    dropped("dropout-mask-shared-by-rows",
            "h = self.down(h)\n        return h * self.drop(torch.ones_like(h[:1]))"),
    dropped("dropout-from-its-own-generator",
            "h = self.down(h)\n        if not self.training:\n            return h\n"
            "        own = torch.Generator().manual_seed(__import__('time').time_ns())\n"
            "        return h * (torch.rand(h.shape, generator=own) >= self.drop.p) / (1 - self.drop.p)"),
    dropped("dropout-site-missing", "return self.down(h)"),
    dropped("dropout-twice", "return self.drop(self.drop(self.down(h)))"),
    dropped("dropout-inside-the-feed-forward", "return self.drop(self.down(self.drop(h)))"),
    Edit("dropout-rescaled-twice", {ATTENTION_DROPOUT: f"{ATTENTION_DROPOUT} / (1 - self.attn_drop.p * self.training)"}),
    Edit("dropout-by-hand-not-rescaled",
         {ATTENTION_DROPOUT: "weights = weights * (torch.rand_like(weights) >= self.attn_drop.p * self.training)"}),
    Edit("attention-dropout-not-applied", {ATTENTION_DROPOUT: "pass"}),
    Edit("attention-dropout-not-applied", {"dropout_p=rate, ": ""}),
    Edit("dropout-call-forgotten", {"x = self.drop(x)": "pass"}),
    Edit("dropout-result-dropped", {"x = self.drop(x)": "self.drop(x)"}),
    Edit("dropout-before-the-softmax",
         {ATTENTION_DROPOUT: "pass", "scores.softmax(dim=-1)": "self.attn_drop(scores).softmax(dim=-1)"}),
    Edit("dropout-on-the-norm", {"self.norm1(x)": "self.mlp.drop(self.norm1(x))"}, only_in=GPTS),
]  # fmt: skip


def table(bug: str, new: str) -> Edit:
    """Another use of the table of positions."""
    return Edit(bug, {"self.wpe(positions)": new})


POSITIONS = [
    Edit("position-not-added", {" + self.wpe(positions)": ""}),
    Edit("position-multiplied", {" + self.wpe(positions)": " * self.wpe(positions)"}),
    table("position-scaled", "self.wpe.embedding_dim**0.5 * self.wpe(positions)"),
    table("position-divided", "self.wpe(positions) / self.wpe.embedding_dim**0.5"),
    Edit("position-in-every-block", {"block(x": "block(x + self.wpe(positions)"}, only_in=GPTS),
    table("position-offset-by-one", "self.wpe((positions + 1) % self.wpe.num_embeddings)"),
    table("position-constant", "self.wpe(torch.full_like(positions, positions.size(-1) - 1))"),
    table("position-reversed", "self.wpe(positions.flip(-1))"),
    table("positions-start-again", "self.wpe(positions % 8)"),
    table("positions-start-again-at-128", "self.wpe(positions % 128)"),
    table("positions-clamped", "self.wpe(positions.clamp(max=100))"),
    table("position-table-detached", "F.embedding(positions, self.wpe.weight.data)"),
]

RATES, ANGLES = "rates = base ** (-torch.arange", "angles = positions[..., None].float() * rates"
ROTATED = "q, k = rotate(q, cos, sin), rotate(k, cos, sin)"
TURN = "a * cos - b * sin, a * sin + b * cos"
SPREAD = "{0}.repeat_interleave(2, -1)[..., {1}]"
LOW, HIGH = ": a.size(-1)", "a.size(-1) :"


def rotated(bug: str, code: str) -> Edit:
    return Edit(bug, {ROTATED: code})


ROTARY = [
    Edit("rope-base-of-its-own", {RATES: RATES.replace("base", "1000.0")}),
    Edit("rope-exponent-halved", {".float() / head_dim)": ".float() / head_dim / 2)"}),
    Edit("rope-exponent-doubled", {".float() / head_dim)": ".float() / head_dim * 2)"}),
    Edit("rope-exponent-by-model-width", {".float() / head_dim)": ".float() / (4 * head_dim))"}),
    Edit("rope-exponent-positive", {RATES: RATES.replace("(-", "(")}),
    Edit("rope-half-precision", {ANGLES: "angles = (positions[..., None].bfloat16() * rates.bfloat16()).float()"}),
    Edit("rope-angles-by-matmul", {ANGLES: "angles = positions[..., None].float() @ rates[None, :]"}),
    Edit("rotary-positions-start-again", {ANGLES: ANGLES.replace("positions", "(positions % 32)")}),
    Edit("rope-half-of-the-features", {ANGLES: f"{ANGLES} * (torch.arange(len(rates)) < len(rates) // 2)"}),
    Edit("rope-sign-lost", {TURN: TURN.replace("-", "+")}),
    Edit("rope-pairing-mismatch", {TURN:
        f"a * {SPREAD.format('cos', LOW)} - b * {SPREAD.format('sin', LOW)}, "
        f"a * {SPREAD.format('sin', HIGH)} + b * {SPREAD.format('cos', HIGH)}"}),
    rotated("rope-missing", "pass"),
    rotated("rope-twice", f"{ROTATED}\n        {ROTATED}"),
    rotated("rope-on-v", f"{ROTATED}\n        v = rotate(v, cos, sin)"),
    rotated("rope-only-on-q", "q = rotate(q, cos, sin)"),
    rotated("rope-only-on-k", "k = rotate(k, cos, sin)"),
    rotated("rope-only-on-q-in-one-layer", "q, k = rotate(q, cos, sin), k if self.layer == 1 else rotate(k, cos, sin)"),
    rotated("rope-opposite-signs", "q, k = rotate(q, cos, sin), rotate(k, cos, -sin)"),
    rotated("rope-single-position-kernel",
            f"if T == 1:\n            q = torch.cat((rotate(q[:, :1], cos, sin), q[:, 1:]), dim=1)\n"
            f"            k = torch.cat((rotate(k[:, :1], cos, sin), k[:, 1:]), dim=1)\n"
            f"        else:\n            {ROTATED}"),
]  # fmt: skip

EDITS = [*RESIDUALS, *GRADIENTS, *FEED_FORWARDS, *NORMS, *DROPOUTS, *POSITIONS, *ROTARY]
