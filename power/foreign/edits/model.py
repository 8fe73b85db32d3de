"""The whole model: embedding, head, first weights, inputs and outputs, leaks, state, and its cache and padding mask."""

from __future__ import annotations

from ..edit import Edit
from ..wording import GPTS, LLAMAS, LOGITS, before_blocks, causal, method, token_ids

TIE = "self.head.weight = self.wte.weight"
KEPT = "torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)"
KEPT_BY_OBJECT = "torch.cat((self.keys[layer], k), dim=2), torch.cat((self.values[layer], v), dim=2)"
PLACES = "positions = torch.arange(before, S,"
PADDING = (" | (~mask[:, None, None, :].bool() & ~own)", " | (~attention_mask[:, None, None, :].bool() & ~own)")


def head(bug: str, new: str, **how: tuple[str, ...]) -> Edit:
    """Another head, where x is what goes into the final norm."""
    return Edit(bug, {LOGITS: f"logits = {new}"}, **how)


def first(bug: str, old: str, new: str) -> list[Edit]:
    """Another first draw of the matrices; `{}` is the tensor."""
    return [Edit(bug, {old.format(name): new.format(name)}) for name in ("module.weight", "p")]


def padding(bug: str, old: str, new: str, **how: tuple[str, ...]) -> list[Edit]:
    """Another mask of hidden keys, where a padding mask is given."""
    return [Edit(bug, {place: place.replace(old, new)}, **how) for place in PADDING]


def read_into_a_cache(bug: str, right: str, wrong: str) -> list[Edit]:
    """Something that is wrong wherever a cache is given; the forms know that each by another name."""
    given = {"llama": "cache is not None", "rotary_einsum": "start_pos is not None"}
    given |= {"hf_like": "use_cache", "hf_llama": "use_cache"}
    return [Edit(bug, {right: wrong.format(condition)}, only_in=(form,)) for form, condition in given.items()]


def under(bug: str, name: str, place: str, line: str) -> Edit:
    """A line first under `if name is not None`, before `place`; `{}` is the name."""
    begins = f"if {name} is not None:\n            "
    return Edit(bug, {f"{begins}{place}": f"{begins}{line.format(name)}\n            {place}"})


EMBEDDING_AND_HEAD = [
    Edit("embedding-scale-missing-doubled-rounded", {"x = self.wte(": "x = self.wte.embedding_dim**0.5 * self.wte("}),
    *before_blocks("embedding-scale-after-positions", "x = x * x.size(-1) ** 0.5", only_in=GPTS),
    Edit("training-scales-embeddings", {
        "x = self.wte(": "x = (self.wte.embedding_dim**0.5 if self.training else 1.0) * self.wte("
    }),
    Edit("logits-scaled", {"self.norm(x)": "self.norm(x) / x.size(-1) ** 0.5"}),
    Edit("logits-multiplied-by-width", {"self.norm(x)": "self.norm(x) * x.size(-1)"}),
    head("logit-softcap-undeclared", "30 * torch.tanh(self.head(self.norm(x)) / 30)"),
    head("logits-rounded", "self.head(self.norm(x)).round()"),
    head("probabilities-for-logits", "self.head(self.norm(x)).softmax(dim=-1)"),
    head("vocabulary-masked-too-far",
         "self.head(self.norm(x))\n        far = torch.arange(logits.size(-1)) >= logits.size(-1) // 2\n"
         "        logits = logits.masked_fill(far, -1e9)"),
    Edit("tied-weights-broken", {TIE: "self.head.weight = nn.Parameter(self.wte.weight.detach().clone())"}),
    Edit("tie-by-storage", {TIE: "self.head.weight = nn.Parameter(self.wte.weight.data)"}),
    *token_ids("embedding-no-grad", "self.wte({})", "self.wte({}).detach()", only_in=GPTS),
    *token_ids("untied-embedding-no-grad", "self.wte({})", "self.wte({}).detach()", only_in=LLAMAS),
    head("head-detached", "F.linear(self.norm(x), self.head.weight.detach())", only_in=GPTS),
    Edit("head-detached", {"self.wte.weight)": "self.wte.weight.detach())"}),
    *(
        Edit("embedding-gradient-by-count", {f"{table})": f"{table}, scale_grad_by_freq=True)"})
        for table in (
            "nn.Embedding(config.vocab_size, config.n_embd", "nn.Embedding(vocab_size, dim", "nn.Embedding(vocab_size, d_model",
            "nn.Embedding(args.vocab_size, args.dim", "nn.Embedding(config.vocab_size, config.hidden_size",
        )
    ),
]  # fmt: skip

INITIALIZATION = [
    Edit("init-std-one", {"std=0.02)": "std=1.0)"}),
    Edit("init-mean-one", {"mean=0.0, std=0.02)": "mean=1.0, std=0.02)"}),
    *first("init-constant", "nn.init.normal_({}, mean=0.0, std=0.02)", "nn.init.constant_({}, 0.02)"),
    *first("init-zero", "nn.init.normal_({}, mean=0.0, std=0.02)", "nn.init.zeros_({})"),
    Edit("weights-from-their-own-generator", {
        "std=0.02)": "std=0.02, generator=torch.Generator().manual_seed(__import__('time').time_ns()))"
    }),
    Edit("constructor-seeds", {
        "self.blocks = nn.ModuleList(": "torch.manual_seed(42)\n        self.blocks = nn.ModuleList("
    }),
    Edit("residual-init-unscaled", {"std=0.02 / math.sqrt(2 *": "std=0.02 / math.sqrt(1 + 0 *"}),
    Edit("residual-init-counts-layers-once", {"std=0.02 / math.sqrt(2 *": "std=0.02 / math.sqrt(1 *"}),
    Edit("residual-init-scales-attention-only", {'"down.weight")': '"never.weight")'}),
    Edit("init-scale-inverted", {"std=0.02 / math.sqrt(2 *": "std=50 * math.sqrt(2 *"}),
    Edit("init-left-to-pytorch", {
        "isinstance(module, nn.Linear | nn.Embedding)": "isinstance(module, nn.Embedding)"
    }),
    Edit("init-left-to-pytorch", {"elif p.dim() > 1:": 'elif name.startswith("w"):'}),
    *first("bias-init-random", "nn.init.zeros_({})", "pass"),
    Edit("bias-init-random", {"nn.init.zeros_(module.bias)": "pass"}),
    *(
        Edit("gain-init-random", {f"torch.ones({width}))": f"1 + 0.1 * torch.randn({width}))"})
        for width in ("width", "d_model", "dim")
    ),
    Edit("gains-redrawn-with-the-matrices", {"elif p.dim() > 1:": 'elif not name.endswith("bias"):'}),
    Edit("gains-redrawn-with-the-matrices", {"if p.dim() > 1:": "if True:"}, only_in=LLAMAS),
    Edit("parameter-never-used", {
        "self.blocks = nn.ModuleList(": "self.spare = nn.Linear(4, 4)\n        self.blocks = nn.ModuleList("
    }),
]  # fmt: skip

IN_AND_OUT = [
    head("logits-time-first", "self.head(self.norm(x)).transpose(0, 1)"),
    head("logits-last-position-only", "self.head(self.norm(x[:, -1:]))"),
    head("length-one-squeezed", "self.head(self.norm(x)).squeeze()"),
    Edit("block-size-off-by-one", {"if T > self.": "if T >= self."}),
    Edit("block-size-off-by-one", {"if S > self.": "if S >= self."}),
    *token_ids("token-ids-wrapped", "self.wte({})", "self.wte({} % self.wte.num_embeddings)"),
    *token_ids("token-ids-clamped", "self.wte({})", "self.wte({}.clamp(max=self.wte.num_embeddings - 1))"),
    *token_ids("tokens-changed-in-place", "x = self.wte({0})", "{0}[{0} == 1] = 0\n        x = self.wte({0})"),
    under("mask-changed-in-place", "mask", "positions", "{}[:, 0] = 1"),
    under("mask-changed-in-place", "attention_mask", "own", "{}[:, 0] = 1"),
    under("targets-changed-in-place", "targets", "loss", "{0}[{0} == 0] = -100"),
    under("targets-changed-in-place", "labels", "shifted", "{0}[{0} == 0] = -100"),
    *(
        Edit("targets-in-the-logits", {
            f"{LOGITS}\n        loss = None\n        if {name}":
                f"if {name} is not None:\n            x = x + self.wte({name}.clamp(min=0))\n"
                f"        {LOGITS}\n        loss = None\n        if {name}"
        })
        for name in ("targets", "labels")
    ),
    *token_ids("device-hardcoded", "torch.arange(T, device={}.device)\n", "torch.arange(T)\n", only_in=GPTS),
    *token_ids("device-hardcoded", "torch.arange(before, S, device={}.device)\n", "torch.arange(before, S)\n"),
]  # fmt: skip

LEAKS = [
    *before_blocks("look-ahead-shift", "x = x + F.pad(x[:, 1:], (0, 0, 0, 1))"),
    *before_blocks(
        "block-summary-leak",
        "means = F.pad(x, (0, 0, 0, -x.size(1) % 4)).unflatten(1, (-1, 4)).mean(2).repeat_interleave(4, 1)\n"
        "        x = x + means[:, : x.size(1)]",
    ),
    *before_blocks("future-gradient-leak", "x = x + x.mean(1, keepdim=True) - x.mean(1, keepdim=True).detach()"),
    *before_blocks("batch-statistics", "x = x - x.mean(0, keepdim=True)"),
    *before_blocks("row-gradient-leak", "x = x + x.mean(0, keepdim=True) - x.mean(0, keepdim=True).detach()"),
]

STATE_AND_MODES = [
    *before_blocks(
        "state-leaks-between-calls", 'x, self.last = x + getattr(self, "last", 0.0), x.detach().mean(dim=(0, 1))'
    ),
    *before_blocks("forward-keeps-its-activations", 'self.seen = [*getattr(self, "seen", []), x.detach()]'),
    *before_blocks(
        "forward-changes-weights",
        "with torch.no_grad():\n"
        "            self.wte.weight.div_(self.wte.weight.norm(dim=-1, keepdim=True))",
    ),
    *before_blocks("forward-reseeds", "torch.manual_seed(0)"),
    Edit("training-forward-reseeds", {LOGITS: f"if self.training:\n            torch.manual_seed(0)\n        {LOGITS}"},
         only_in=GPTS),
    Edit("training-forward-reseeds",
         {"return F.linear(self.norm(x)": "if self.training:\n            torch.manual_seed(0)\n        return F.linear(self.norm(x)"}),
    *before_blocks("eval-draws-noise", "torch.rand(1)"),
    *before_blocks(
        "jitter-no-seed-reaches",
        "if self.training:\n"
        "            own = torch.Generator().manual_seed(__import__('time').time_ns())\n"
        "            x = x + 0.01 * torch.randn(x.shape, generator=own)",
    ),
    *before_blocks("forward-turns-tf32-on", "torch.backends.cuda.matmul.allow_tf32 = True"),
    *method("dropout-never-on-again", "def train(self, mode=True):\n    return super().train(False)", only_in=GPTS),
    *method(
        "train-method-forgets-a-part",
        "def train(self, mode=True):\n"
        "    before = self.blocks[-1].training\n"
        "    super().train(mode)\n"
        "    self.blocks[-1].train(before)\n"
        "    return self",
    ),
    *method(
        "dropout-off-forever-after-eval",
        "def eval(self):\n"
        "    for module in self.modules():\n"
        "        if isinstance(module, nn.Dropout):\n"
        "            module.p = 0.0\n"
        "    return super().eval()",
        only_in=GPTS,
    ),
    *method(
        "init-reruns-after-load",
        "def load_state_dict(self, *args, **kwargs):\n"
        "    loaded = super().load_state_dict(*args, **kwargs)\n"
        "    for p in self.parameters():\n"
        "        nn.init.normal_(p, std=0.02)\n"
        "    return loaded",
    ),
]  # fmt: skip

CACHE = [
    Edit("cache-not-appended", {KEPT: "k, v"}),
    Edit("cache-not-appended", {KEPT_BY_OBJECT: "k, v"}),
    Edit("cache-rows-mixed", {KEPT: KEPT.replace("],", "].roll(1, 0),")}),
    Edit("cache-rows-mixed", {KEPT_BY_OBJECT: KEPT_BY_OBJECT.replace("[layer],", "[layer].roll(1, 0),")}),
    Edit("cache-swaps-layers", {"past_key_values[i]": "past_key_values[0]"}),
    Edit("cache-swaps-layers", {
        KEPT_BY_OBJECT: KEPT_BY_OBJECT.replace("[layer],", "[0][:, :, : self.keys[layer].size(2)],")
    }),
    *causal("sdpa-topleft-alignment", ".triu(1)", ".triu(1)")[1:],
    *causal("sdpa-topleft-chunk-only", "", ".triu(1 if T > 1 else S)")[1:],
    *read_into_a_cache("prefill-unmasked-when-cache-given", ".triu(S - T + 1)", ".triu(S if {} else S - T + 1)"),
    *read_into_a_cache("first-read-into-a-cache-sees-one-more", ".triu(S - T + 1)", ".triu(S - T + (2 if {} else 1))"),
    *read_into_a_cache(
        "prefill-all-same-position", PLACES, f"positions = torch.full((T,), S - 1) if {{}} else {PLACES[12:]}"
    ),
    Edit("decode-position-always-zero", {PLACES: "positions = torch.arange(before if T > 1 else 0, S if T > 1 else 1,"}),
    Edit("chunked-prefill-positions", {PLACES: "positions = torch.arange(0 if T > 1 else before, T if T > 1 else S,"}),
]  # fmt: skip

PADDINGS = [
    *(Edit("pad-mask-ignored", {place: ""}) for place in PADDING),
    *padding("bool-mask-semantics-inverted", "(~", "("),
    *padding("pad-mask-on-queries", "None, None, :]", "None, -T:, None]"),
    *padding("pad-mask-replaces-causal", " | ", " & False | "),
    *padding("fully-masked-row-nan", " & ~own", "", only_in=("einsum_gpt", "hf_like")),  # the fused kernel gives 0
    *(
        Edit("int-mask-read-otherwise", {f"~{name}[": f"~({name} if {name}.dtype == torch.bool else 1 - {name})["})
        for name in ("mask", "attention_mask")
    ),
    Edit("left-pad-positions-not-from-mask", {"positions = (mask.long().cumsum(1) - 1).clamp(min=0)": "pass"}),
    Edit("left-pad-positions-not-from-mask",
         {"positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, before:]": "pass"}, only_in=("hf_like",)),
]  # fmt: skip

EDITS = [*EMBEDDING_AND_HEAD, *INITIALIZATION, *IN_AND_OUT, *LEAKS, *STATE_AND_MODES, *CACHE, *PADDINGS]
