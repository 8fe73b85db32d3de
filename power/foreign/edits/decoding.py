"""generate: which logits it reads, what it feeds, how it draws, where it ends, what it leaves behind."""

from __future__ import annotations

from ..edit import Edit
from ..wording import GPTS

LAST = (")[:, -1]", "[0][:, -1]", "logits[:, -1], output", '"][:, -1], output')
WINDOWS = (
    "self.config.block_size :]", "model.max_len :]", "self.config.n_positions :]", "model.context_length :]",
    "model.args.max_seq_len :]", "self.config.max_position_embeddings :]", "self.max_seq_len :]",
)  # fmt: skip
GREW = "idx = torch.cat((idx, token), dim=1)"
DRAWN = "token = torch.multinomial(probs, num_samples=1)"
LIKELIEST = "token = logits.argmax(dim=-1, keepdim=True)"
TOP_K, TOP_P = "logits.topk(min(top_k, logits.size(-1)))", "late = sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p"
ENDS = ("eos_id", "eos_token_id")
OWNERS = ("model", "self")
BOTH_FILTERS = ("einsum_gpt", "hf_like", "hf_llama")
WITH_TEMPERATURE_0 = ("nanogpt", "einsum_gpt", "homework", "llama", "hf_llama", "rotary_einsum")


def last(bug: str, old: str, new: str) -> list[Edit]:
    return [Edit(bug, {place: place.replace(old, new)}) for place in LAST]


def window(bug: str, new: str) -> list[Edit]:
    """Another crop of the text; `{}` is the block size."""
    return [Edit(bug, {f"idx[:, -{size}": new.format(size.removesuffix(" :]"))}) for size in WINDOWS]


READS = [
    *last("generate-first-position-logits", "-1]", "0]"),
    *last("generate-reads-earlier-position", ":, -1]", ":, -2:][:, 0]"),
    *window("generate-no-context-crop", "idx[:, : {}]"),
    *window("generate-crop-off-by-one", "idx[:, 1 - {} :]"),
    *(
        Edit("generate-drops-latest-token", {f"window = {text}": f"window = idx[:, : max(idx.size(1) - 1, 1)]{text[3:]}"})
        for text in (f"idx[:, -{size}" for size in WINDOWS)
    ),
    Edit("cache-refeeds-full-context", {"window = token\n": "window = idx\n"}),
    Edit("same-token-for-whole-batch", {GREW: f"token = token[:1].expand_as(token); {GREW}"}),
    Edit("argmax-over-another-axis", {LIKELIEST: "token = logits.argmax(dim=0)[: logits.size(0), None]"}),
    *(
        Edit("generate-length-off-by-one", {f"range({count})": f"range({count} + 1)"})
        for count in ("max_new_tokens", "max_gen_len")
    ),
]  # fmt: skip

ENDINGS = [
    *(Edit("continues-after-eos", {f"token = token.masked_fill(done[:, None], {end})": "pass"}) for end in ENDS),
    Edit("stops-when-any-row-eos", {"if done.all():": "if done.any():"}),
    *(Edit("end-token-ignored", {f"if {end} is not None:": "if False:"}) for end in ENDS),
]

SAMPLING = [
    Edit("generation-of-the-last-row", {
        "probs = logits.softmax(dim=-1)": "probs = logits[-1:].expand_as(logits).softmax(dim=-1)"
    }),
    Edit("multinomial-of-other-weights", {"probs = logits.softmax(dim=-1)": "probs = logits.sigmoid()"}),
    Edit("sampling-is-greedy", {DRAWN: "token = probs.argmax(dim=-1, keepdim=True)"}),
    Edit("temperature-multiplied", {"logits / temperature": "logits * temperature"}),
    Edit("temperature-ignored", {"logits = logits / temperature": "pass"}),
    Edit("temperature-zero-division", {LIKELIEST: "token = (logits / temperature).argmax(dim=-1, keepdim=True)"},
         only_in=WITH_TEMPERATURE_0),
    Edit("topk-off-by-one-more", {TOP_K: "logits.topk(min(top_k + 1, logits.size(-1)))"}),
    Edit("topk-strict-inequality", {"logits < kth": "logits <= kth"}),
    Edit("topk-threshold-of-another-row", {".values[:, -1:]": ".values[:1, -1:]"}),
    Edit("topk-skips-topp", {"if top_p is not None:": "if top_p is not None and top_k is None:"}, only_in=BOTH_FILTERS),
    Edit("topp-drops-crossing-token", {TOP_P: "late = sorted_probs.cumsum(dim=-1) > top_p"}),
    Edit("topp-mask-not-unsorted", {"late.scatter(-1, order, late)": "late"}),
    Edit("topp-threshold-inverted", {TOP_P: TOP_P.replace(">= top_p", ">= 1 - top_p")}),
    *(
        Edit("seed-fixed-inside-generate", {begins: begins.replace("was", f"torch.manual_seed(0)\n{gap}was", 1)})
        for gap, begins in (("    ", "    was_training = model.training"), (8 * " ", "        was_training = self.training"))
    ),
]  # fmt: skip

LEFT_BEHIND = [
    *(Edit("generate-without-eval", {f"{owner}.eval()": "pass"}, only_in=GPTS) for owner in OWNERS),
    *(Edit("generate-leaves-eval-mode", {f"{owner}.train(was_training)": "pass"}) for owner in OWNERS),
    *(
        Edit("generate-keeps-graph", {f"@torch.no_grad()\n{gap}def generate": "def generate"})
        for gap in ("", "    ")
    ),
]  # fmt: skip

EDITS = [*READS, *ENDINGS, *SAMPLING, *LEFT_BEHIND]
