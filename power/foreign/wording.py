"""Places that the forms word differently, so that one mistake at such a place is an edit for each wording."""

from __future__ import annotations

from .edit import Edit

GPTS = ("nanogpt", "einsum_gpt", "hf_like", "homework")  # with a table of positions, dropout and a tied head
LLAMAS = ("llama", "hf_llama", "rotary_einsum")
CACHED = ("hf_like", *LLAMAS)  # whose layers know their number

SCORES_MASKED = 'scores = scores.masked_fill(hidden, float("-inf"))'
SOFTMAX = "weights = scores.softmax(dim=-1)"
FEED_FORWARD = "x = x + self.mlp(self.norm2(x))"
ATTENTION = "x = x + self.attn(self.norm1(x)"
ATTENTION_CALL = "a, present = self.attn(self.norm1(x),"  # of the two forms whose blocks return their cache
ATTENTION_SUM = "x = x + a\n"
LOGITS = "logits = self.head(self.norm(x))"


def before_blocks(bug: str, line: str, **how: tuple[str, ...]) -> list[Edit]:
    """A line before the loop over the blocks, where x is [B, T, C]."""
    loops = ("for block in self.blocks:\n            x = block(", "for i, block in enumerate(self.blocks):")
    return [Edit(bug, {loop: f"{line}\n        {loop}"}, **how) for loop in loops]


def method(bug: str, code: str, **how: tuple[str, ...]) -> list[Edit]:
    """One more method of the model; `code` has no indentation of its own."""
    forwards = (
        "def forward(self, idx, targets=None):",
        "def forward(self, tokens, mask=None):",
        "def forward(self, input_ids,",
        "def forward(self, x):\n        T = x.size(1)",
        "def forward(self, tokens, cache=None):",
        "def forward(self, tokens, start_pos=None):",
    )
    indented = code.replace("\n", "\n    ")
    return [Edit(bug, {forward: f"{indented}\n\n    {forward}"}, **how) for forward in forwards]


def token_ids(bug: str, old: str, new: str, **how: tuple[str, ...]) -> list[Edit]:
    """A change around the ids that the embedding reads; `{}` is their name."""
    return [Edit(bug, {old.format(name): new.format(name)}, **how) for name in ("idx", "tokens", "input_ids", "x")]


def cross_entropy(bug: str, new: str, **how: tuple[str, ...]) -> list[Edit]:
    """Another beginning of the call of cross entropy; `{}` are its logits [N, V]."""
    flat = ("logits.flatten(0, 1)", "logits.view(-1, logits.size(-1))", "shifted")
    return [Edit(bug, {f"F.cross_entropy({logits},": new.format(logits)}, **how) for logits in flat]


def kernel(bug: str, explicit: dict[str, str], fused: dict[str, str], **how: tuple[str, ...]) -> list[Edit]:
    """The same mistake where attention is written out and where it is one call."""
    return [Edit(bug, explicit, **how), Edit(bug, fused, **how)]


def causal(bug: str, square: str, cached: str, fused: str = "", **how: tuple[str, ...]) -> list[Edit]:
    """Another causal mask, in the forms without a cache, with one, and with a kernel that masks by itself."""
    made = [Edit(bug, {".triu(1)": square}, **how), Edit(bug, {".triu(S - T + 1)": cached}, **how)]
    return made + ([Edit(bug, {"is_causal=True": fused}, **how)] if fused else [])


def hidden_scores(bug: str, line: str) -> list[Edit]:
    """A line that changes `hidden` [.., T, S], true where a query must not see a key, before it is used."""
    fused = "y = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden"
    return [
        Edit(bug, {place: f"hidden = hidden.clone()\n        {line}\n        {place}"})
        for place in (SCORES_MASKED, fused)
    ]


def blocks(
    bug: str,
    *,
    feed_forward: str = FEED_FORWARD,
    attention: str = ATTENTION,
    call: str = ATTENTION_CALL,
    total: str = "x = x + a",
) -> list[Edit]:
    """Another block: its two lines, or three where attention returns its cache too."""
    changed = {
        FEED_FORWARD: feed_forward,
        ATTENTION: attention,
        ATTENTION_CALL: call,
        ATTENTION_SUM: f"{total}\n",
    }
    one = {old: changed[old] for old in (FEED_FORWARD, ATTENTION) if changed[old] != old}
    other = {old: changed[old] for old in (FEED_FORWARD, ATTENTION_CALL, ATTENTION_SUM) if changed[old] != old}
    return [Edit(bug, changes) for changes in ((one,) if one == other else (one, other))]
