"""Names that public code gives to the parameters of constructors and of forward, and the values that they then get.

A size is one of `SIZES`. What follows from the sizes (head width, feed-forward width, …) is computed from them.
Switches that decide whether a model is causal are set. Everything else keeps its default.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout")
# All differ, so that no axis can be mistaken for another.
DEFAULTS = {"vocab_size": 17, "block_size": 13, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.0}
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "…"})()  # there is no value


def squash(name: str) -> str:
    """`numLayers`, `num_layers` and `N_LAYERS` are the same name."""
    return name.lower().replace("_", "").replace("-", "")


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _spelled(before: str, words: str, after: str = "") -> set[str]:
    """Every spelling of a prefix, a word and a suffix; prefix and suffix may be absent."""
    return {
        b + word + a
        for b, word, a in itertools.product(["", *before.split()], words.split(), ["", *after.split()])
    }  # fmt: skip


COUNT = "n num number numberof numof nof no total max"
WIDTH = _spelled(
    "n d num dim", "embd embed emb embedding embeddings embedded model dmodel", "dim dims size dimension width d"
) - {"model", "embedding", "embeddings"} | words(
    "dim dims width channels nchannels chandim channeldim ninp dwordvec nfeatures nunits units nstate modeldim "
    "modelsize residualdim dresid nattn dimmodel dimension"
)  # fmt: skip
HIDDEN = (
    _spelled("n d num dim", "hidden", "size dim dims units dimension width")
    | _spelled("d n", "hid", "dim size")
    | {"hdim"}
)
FEED_FORWARD = _spelled(
    "n d num dim", "ff ffn mlp feedforward intermediate inner dimfeedforward ffnhidden ffhidden mlphidden "
    "feedforwardhidden hiddenff", "dim dims size dimension width hiddensize hiddendim hidden"
) | {"nhid", "nffn", "pfdim", "filtersize"}  # fmt: skip
VOCABULARY = _spelled(
    "n num number numberof d src tgt trg source target enc dec encoder decoder nsrc ntrg ntgt input output padded "
    "total in out",
    "vocab vocabulary voc vocabs",
    "size len length dim count siz",
) | words(
    "ntoken ntokens numtokens numtoken nwords numwords words tokens nsymbols alphabetsize numembeddings nclasses "
    "outputsize ntokenvocab"
)
CONTEXT = _spelled(
    "max src tgt trg source target n num maximum input m maxtarget maxsource", "seq sequence context ctx block text",
    "size len length window windowsize lens"
) - {"block", "nblock", "numblock", "text", "ntext", "numtext", "maxblock"}  # fmt: skip
CONTEXT |= words(
    "maxlen maxlength npositions numpositions maxpositions maxposition npos nctx maxt maxpositionembeddings "
    "maxpositionalembeddings positions maxtokens maxtextlen maxpos maxseqlens trainctx trainseqlen windowlen "
    "maxcontextlen tmax"
)
LAYERS = _spelled(
    COUNT,
    "layer block transformerlayer transformerblock decoderlayer encoderlayer hiddenlayer decoderblock "
    "encoderblock attnlayer attentionlayer attnblock attentionblock translayer",
    "s num count",
) - {"layer", "block"} | words("depth n ndepth encoderdepth decoderdepth modeldepth")
HEADS = _spelled(COUNT, "head attentionhead attnhead queryhead qhead selfattentionhead mhahead", "s num count") | {"h"}
SIZE_OF: dict[str, str] = {
    name: size
    for size, names in (
        ("n_embd", WIDTH), ("n_layer", LAYERS), ("n_head", HEADS), ("block_size", CONTEXT), ("vocab_size", VOCABULARY),
    )
    for name in names
}  # fmt: skip
HEAD_WIDTH = _spelled("d dim n qk v key value attn", "head", "dim dims size width d") - _spelled("n", "head") | words(
    "dk dv dq dkey dvalue dkv kvchannels headdimension dimhead dhead headfeatures"
)
KEY_VALUE_HEADS = _spelled(COUNT, "kvhead keyvaluehead localhead querygroup kvgroup localkvhead kvattentionhead", "s")
BATCH = words("batch batchsize maxbatch maxbatchsize bsz bs b nbatch")
PADDING = _spelled(
    "src trg tgt source target", "pad padding padtoken", "id idx index token tokenid value"
) - {"pad", "padding", "padtoken"}  # fmt: skip
CAUSAL = {"causal": True, "iscausal": True, "autoregressive": True, "isdecoder": True, "usecausalmask": True,
          "causalmask": True, "decoderonly": True, "ismasked": True, "bidirectional": False,
          "isbidirectional": False}  # fmt: skip
CAUSAL_WORDS = {"noncausal": False, "bidirectional": False, "causal": True, "autoregressive": True}

# Methods of a model that make its optimizer.
MAKES_ITS_OPTIMIZER = (
    "configure_optimizers", "configure_optimizer", "get_optimizer", "make_optimizer", "create_optimizer",
)  # fmt: skip

# What a parameter means that has no default and is in no table above: by its letter, or by words in its name.
LETTERS = {"V": "vocab_size", "T": "block_size", "L": "n_layer", "H": "n_head", "D": "n_embd", "C": "n_embd"}
# Where there is a width too.
ENDS = dict.fromkeys(("inputdim", "outputdim", "inputsize", "indim", "outdim"), "vocab_size")


def size_of(name: str, among: Iterable[str] = (), *, required: bool = False) -> str | None:
    """The size that a parameter name stands for, None for any other name.

    `hidden_dim` is the width only if no other name `among` the parameters is. A `required` parameter, which has no
    default to keep, is recognised more freely.
    """
    plain = squash(name)
    if name == "n":  # N is the number of layers in the paper; n is anything
        return None
    if name == "Nx":  # beside the stack in the paper's figure; nx is anything
        return "n_layer"
    if plain in SIZE_OF:
        return SIZE_OF[plain]
    if plain in HIDDEN and not any(squash(other) in WIDTH for other in among):
        return "n_embd"
    if ("drop" in plain and not plain.startswith(("use", "is", "drop_last", "droplast"))) or plain in ("pdrop",):
        return "dropout"
    if not required or plain in DERIVED or plain in PADDING:
        return None
    if plain in ENDS:
        wide = any(squash(other) in WIDTH | HIDDEN for other in among)
        return ENDS[plain] if wide and not any(squash(other) in VOCABULARY for other in among) else None
    return LETTERS.get(name) or _by_words(plain)


def _by_words(plain: str) -> str | None:
    """`i_vocab_size`, `max_decoding_length`, `dim_vector`, `n_width`."""
    for prefix in COUNT.split():
        if plain.startswith(prefix) and (size := SIZE_OF.get(plain.removeprefix(prefix))) is not None:
            return size
    counts = plain.startswith(("n", "num")) or plain.endswith(("s", "num", "count"))
    measured = any(word in plain for word in ("dim", "size", "width"))
    if "voc" in plain and (measured or plain.endswith(("len", "length", "count", "num"))):
        return "vocab_size"
    if "max" in plain and any(word in plain for word in ("len", "position", "token", "step")) and "new" not in plain:
        return "block_size"
    if measured and any(word in plain for word in ("model", "emb", "vector")) and "head" not in plain:
        return "n_embd"
    if counts and not measured and any(word in plain for word in ("layer", "block")) and "norm" not in plain:
        return "n_layer"
    if counts and not measured and "head" in plain and not any(w in plain for w in ("kv", "key", "value", "group")):
        return "n_head"
    return None


# Names of forward's parameters.
TARGETS = _spelled("lm train y next output", "targets target labels label gold tgts", "ids tokens seq batch") | words(
    "y ys yb ytrue ytrain ybatch tgtids nexttokens nextids goldids goldlabels goldtokens"
)
SOURCES = words(
    "src source srcids srcseq srctokens srctokenids sourceids encinput encoderinput encoderinputs inputseq encinputs "
    "srcsequence encoderinputids x"
)
DECODED = words(
    "tgt trg target targets trgseq tgtseq trgtokenids trgtokens tgttokens decinput decoderinput decoderinputs "
    "decinputs decoderids decodertokens decodertokenids decinputids decids decoderinputtokens "
    "targetseq outputseq y decoderinputids tgtids inputs input"
)
STARTS = words("startpos startposition pos position offset curpos pastlength startidx tokenoffset")
POSITIONS = words("positions positionids inputpos tokenpositions posids inputpositions")
CACHES = words(
    "cache kvcache kvcaches past pastkeyvalues pastkvs caches pastkv layerpast mems memory state hidden cachekv "
    "presents"
)

# Of the two answers of a preference loss.
CHOSEN = words("chosen preferred winner win winning w yw pos positive better accepted")
REJECTED = words("rejected dispreferred loser lose losing l yl neg negative worse")

# A derived value: (sizes, default or MISSING) -> value, or MISSING to leave the default.
Rule = Callable[[Mapping[str, Any], Any], Any]


def _whole(rule: Callable[[Mapping[str, Any]], int]) -> Rule:
    """A number that follows from the sizes; a default of None or below 1 means "computed by the model" and stays."""
    return lambda sizes, default: MISSING if default is None or _below_one(default) else rule(sizes)


def _below_one(default: Any) -> bool:
    return isinstance(default, int) and not isinstance(default, bool) and default < 1


def _key_value_heads(sizes: Mapping[str, Any]) -> int:
    return max(int(sizes["n_head"]) // 2, 1)


def _constant(value: Any) -> Rule:
    """A value for a parameter without a default; one with a default keeps it."""
    return lambda sizes, default: value if default is MISSING else MISSING


def _device(sizes: Mapping[str, Any], default: Any) -> Any:
    return MISSING if default is None else sizes.get("device", "cpu")


def _dtype(sizes: Mapping[str, Any], default: Any) -> Any:
    if isinstance(default, str):
        return "float32"
    return MISSING if default in (None, torch.float64) else torch.float32


DERIVED: dict[str, Rule] = {
    **dict.fromkeys(HEAD_WIDTH, _whole(lambda s: s["n_embd"] // s["n_head"])),
    **dict.fromkeys(KEY_VALUE_HEADS, _whole(_key_value_heads)),
    **dict.fromkeys(FEED_FORWARD | HIDDEN, _whole(lambda s: 4 * s["n_embd"])),
    **dict.fromkeys(_spelled("n num d q kv", "latent", "dim size rank"), _whole(lambda s: s["n_embd"] // 2)),
    **dict.fromkeys(("device", "dev"), _device),
    **dict.fromkeys(("dtype", "torchdtype", "paramdtype", "modeldtype"), _dtype),
    **dict.fromkeys(_spelled("max maxgen maxcache", "batch", "size") - {"batch", "batchsize"} | {"maxbs"},
                    _whole(lambda s: 512)),
    **dict.fromkeys(
        ("ffmult", "mlpratio", "ffnmult", "rate", "expansion", "feedforwardscaling", "mlpmult", "expansionfactor",
         "ffnexpansion", "forwardexpansion", "dffmult", "feedforwardmult", "ffratio", "mlpfactor", "ffscale"),
        _constant(4),
    ),
    **dict.fromkeys(("multipleof",), _constant(8)),
    **dict.fromkeys(
        ("ropetheta", "ropebase", "theta", "base", "rotarybase", "ropethetabase", "rotaryembbase"), _constant(10_000.0)
    ),
    **dict.fromkeys(
        ("normeps", "layernormeps", "layernormepsilon", "rmsnormeps", "eps", "epsilon", "lneps", "rmseps"),
        _constant(1e-5),
    ),
    **dict.fromkeys(("initializerrange", "initstd", "std"), _constant(0.02)),
    **dict.fromkeys(("activation", "act", "hiddenact", "activationfunction", "afn", "actfn"), _constant("gelu")),
    **dict.fromkeys(("batchsize", "bsz", "nbatch", "bs"), _constant(3)),
    **dict.fromkeys(("nexperts", "numexperts", "experts", "nexpert"), _constant(4)),
    **dict.fromkeys(("topk", "numexpertspertok", "nexpertsperspertoken", "nactivatedexperts", "numactivatedexperts",
                     "numexpertspertoken"), _constant(2)),
    **dict.fromkeys(("windowsize", "slidingwindow", "slidingwindowsize", "attentionwindow"),
                    _whole(lambda s: s["block_size"] // 2)),
    **dict.fromkeys(_spelled("trg tgt src target", "sos bos eos begin end start", "id idx token tokenid index"),
                    _constant(0)),
    **dict.fromkeys(("learningrate", "lr", "lrinit", "weightdecay"), _constant(1e-3)),
    **dict.fromkeys(("rank", "r", "lorarank"), _constant(4)),
    **dict.fromkeys(("inference", "inferencemode", "infer"), _constant(False)),  # it must read whole texts
}  # fmt: skip
NUMBERS = HEAD_WIDTH | KEY_VALUE_HEADS | FEED_FORWARD | HIDDEN
SWITCHES = ("bias", "use", "is", "tie", "share", "with", "has", "enable", "qkv", "gradient", "return", "flash")


def causal(name: str, default: Any = MISSING, kind: Any = None) -> bool | None:
    """For a parameter that decides whether the model is causal, the value that makes it so; None for any other.

    A longer name, `use_causal_attention`, counts if the parameter is a bool.
    """
    plain = squash(name)
    if plain in CAUSAL:
        return CAUSAL[plain]
    if not (isinstance(default, bool) or (default is MISSING and kind in (bool, "bool", None))):
        return None
    return next((value for word, value in CAUSAL_WORDS.items() if word in plain), None)


def value_for(
    name: str, sizes: Mapping[str, Any], default: Any = MISSING, *, among: Iterable[str] = (), kind: Any = None
) -> Any:
    """The value for a parameter that is not a size; MISSING if it keeps its default, or has none.

    `kind` is its annotation. Padding ids become `sizes["padding"]`, an id that no check uses, if there is one.
    """
    plain = squash(name)
    if plain in PADDING or (plain == "padtoken" and default is MISSING and kind not in (str, "str")):
        spare = sizes.get("padding")
        within = isinstance(default, int) and 0 <= default < sizes["vocab_size"]
        return spare if spare is not None and (default is MISSING or within) else MISSING
    if plain in DERIVED:
        return DERIVED[plain](sizes, default)
    if default is not MISSING:
        return MISSING
    if kind in (bool, "bool") or plain.startswith(SWITCHES):
        return False
    return MISSING
