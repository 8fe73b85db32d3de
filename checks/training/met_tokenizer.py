"""How to make a foreign tokenizer, of a text, an alphabet, or a vocabulary with merges of ours; what it then knows."""

from __future__ import annotations

import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..expect import NotApplicable
from ..probes.filled import called, roles_of
from ..subject import Companion, Subject

NAMES = {
    "text": "text corpus data texts raw_text vocab_raw_text training_text train_text train_data source content "
    "sentences lines documents dataset",
    "chars": "chars alphabet characters symbols unique_chars",
    "vocab": "vocab vocabulary token_to_id encoder",
    "merges": "merges bpe_merges",
    "stoi": "stoi char_to_id char2idx char_to_idx str_to_int ctoi token2id char2id",
    "itos": "itos id_to_char idx2char idx_to_char int_to_str itoc id2token id2char",
    "size": "vocab_size target_vocab_size max_vocab_size target_size",
    "count": "num_merges n_merges merges_count",
}
TRAINS = ("train", "fit", "build_vocab", "build", "train_from_text", "fit_on_texts", "learn", "train_bpe")
FACTORIES = ("from_text", "from_corpus", "from_texts", "from_data", "train_from_text")
LETTERS = "abcde"
COUNT = 24  # merges


def some_words(seed: int, count: int) -> list[str]:
    """Of few letters, so that merges compete for them."""
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, [5, 4, 3, 2, 1], k=draw.randint(2, 7))) for _ in range(count)]


WORDS = some_words(0, 120)
TEXT = " ".join(WORDS) + "\n\nA bad bee: dead, aced.  Fed abba!\nthe end\n" + " ".join(WORDS[:40])
CHARS = sorted(set(TEXT))
BYTES = "é日🙂"  # of 2, 3 and 4 bytes
MORE = "".join(map(chr, range(32, 127))) + "\n\t" + BYTES


def ours(kind: type) -> tuple[dict[Any, Any], list[tuple[Any, Any]]]:
    """A vocabulary of single symbols and the merges learned from `WORDS`, in bytes or in characters."""
    words = [[c.encode() if kind is bytes else c for c in word] for word in WORDS]
    merges: list[tuple[Any, Any]] = []
    for _ in range(COUNT):
        counts: dict[tuple[Any, Any], int] = {}
        for pair in (pair for word in words for pair in itertools.pairwise(word)):
            counts[pair] = counts.get(pair, 0) + 1
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        words = [merged(word, merges[-1], merges[-1][0] + merges[-1][1]) for word in words]
    single = [bytes([i]) for i in range(256)] if kind is bytes else CHARS
    symbols = [*single, *(a + b for a, b in merges)]
    return dict(enumerate(symbols)) if kind is bytes else {s: i for i, s in enumerate(symbols)}, merges


def merged(symbols: list[Any], pair: tuple[Any, Any], into: Any) -> list[Any]:
    """Every occurrence of the pair, from the left, replaced."""
    found, i = [], 0
    while i < len(symbols):
        both = i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair
        found.append(into if both else symbols[i])
        i += 2 if both else 1
    return found


class MetTokenizer:
    """A tokenizer of the subject's, made and trained; `known` are the characters that it can be asked for."""

    def __init__(self, subject: Subject, companion: Companion) -> None:
        self.subject, self.companion, self.told = subject, companion, False
        self.made = self._make()
        self.known = self._known()
        if len(self.known) < 2:
            raise NotApplicable("no characters were found that it tells apart")

    def _make(self) -> Any:
        errors: list[str] = []
        for make, told in self._ways():
            doing = "making it"
            try:
                with warnings.catch_warnings(), self.subject.running():
                    warnings.simplefilter("ignore")
                    self.made = make()
                doing = "encoding 'abba'"
                if self.ids("abba") and isinstance(self.decode(self.encode("abba")), str):
                    self.told = told
                    return self.made
                errors.append("it gives nothing for a word")
            except NotApplicable as reason:
                errors.append(reason.reason)
            except Exception as error:
                errors.append(f"{doing} raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}")
        raise NotApplicable(errors[0] if errors else "no way to make it was found")

    def _ways(self) -> Iterator[tuple[Callable[[], Any], bool]]:
        """Ways to make it, and whether it is told what characters there are."""
        value = self.companion.value
        if not inspect.isclass(value):
            yield lambda: value, False
            return
        for name in FACTORIES:
            factory = getattr(value, name, None)
            if callable(factory) and "text" in roles_of(factory, NAMES).values():
                for values in settings():
                    yield lambda f=factory, v=values: called(f, roles_of(f, NAMES), v), True  # type: ignore[misc]
        roles = roles_of(value, NAMES)
        train = next((name for name in TRAINS if callable(getattr(value, name, None))), None)
        trained = train is not None and "text" in roles_of(getattr(value, train), NAMES).values()
        told = {"text", "chars", "vocab", "stoi"} & set(roles.values())
        for values in settings():
            given = only_required(value, roles, values)
            made = lambda g=given, v=values: self._trained(called(value, roles, g), train, v)  # noqa: E731
            yield made, bool(trained or told & given.keys())

    @staticmethod
    def _trained(made: Any, train: str | None, values: Mapping[str, Any]) -> Any:
        method = getattr(made, train) if train else None
        if method is not None and "text" in roles_of(method, NAMES).values():
            called(method, roles_of(method, NAMES), values)
        return made

    def _known(self) -> str:
        """The characters that it must give back.

        Those of the text that it was made of; of a tokenizer that reads more than characters, those that it gives back
        alone and the letters of our words; of others, those that it tells from the rest. All where it reads bytes.
        """
        try:
            unseen = [self.ids("edcba" * 3), self.ids("bbddd" * 3)]
        except Exception:
            raise NotApplicable("it reads no words that it has not seen") from None
        if unseen[0] == unseen[1]:
            raise NotApplicable("it reads words that it has not seen as one unknown token")
        codes: dict[tuple[int, ...], list[str]] = {}
        for c in dict.fromkeys([*CHARS, *MORE]):
            try:
                codes.setdefault(tuple(self.ids(c)), []).append(c)
            except Exception:
                continue
        frame = len(self.ids("a")) - 1
        if not self.told:  # a character that it drops is not one of its own
            codes = {code: alike for code, alike in codes.items() if len(code) > frame}
        apart = {next((c for c in alike if c == c.lower()), alike[0])
                 for alike in codes.values() if len({c.lower() for c in alike}) == 1}  # fmt: skip
        known = {c for c in apart if not self.told or self.back(c) == c}
        if self.told:
            known |= {c for c in CHARS if c in apart or c == c.lower()} if self.per_character else set(LETTERS)
        if all(len(code) - frame == len(c.encode()) for code, alike in codes.items() for c in alike if c in BYTES):
            known |= apart & set(BYTES)
        return "".join(c for c in dict.fromkeys([*CHARS, *MORE]) if c in known)

    @property
    def per_character(self) -> bool:
        """Whether it has one id for each character, beside those that it puts around a text."""
        lengths = [len(self.ids(text)) for text in ("a", "ab", "abcba")]
        return (lengths[1] - lengths[0], lengths[2] - lengths[1]) == (1, 3)

    def encode(self, text: str) -> Any:
        """What its encode gives, as it gives it."""
        with warnings.catch_warnings(), self.subject.running():
            warnings.simplefilter("ignore")
            return self.made.encode(text)

    def decode(self, ids: Any) -> Any:
        with warnings.catch_warnings(), self.subject.running():
            warnings.simplefilter("ignore")
            return self.made.decode(ids)

    def back(self, text: str) -> str | None:
        """The text after encode and decode; None where that raises."""
        try:
            found = self.decode(self.encode(text))
        except Exception:
            return None
        return found if isinstance(found, str) else None

    def ids(self, text: str) -> list[int]:
        """Raises NotApplicable where they are no ids."""
        return integers(self.encode(text))

    @property
    def size(self) -> int | None:
        """The vocabulary size that it declares."""
        for name in ("vocab_size", "n_vocab", "n_tokens"):
            found = getattr(self.made, name, None)
            if callable(found) and not inspect.isclass(found) and not roles_of(found, {}):
                found = found()
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
        return None


def settings() -> Iterator[dict[str, Any]]:
    """What its parameters may want: a text or a list of texts; characters, or tokens with ids; merges of bytes."""
    stoi = {c: i for i, c in enumerate(CHARS)}
    fixed = {"chars": CHARS, "stoi": stoi, "itos": dict(enumerate(CHARS)), "size": 256 + COUNT, "count": COUNT}
    vocab, merges = ours(bytes)
    yield {**fixed, "text": TEXT, "vocab": vocab, "merges": merges}
    vocab, merges = ours(str)
    yield {**fixed, "text": TEXT, "vocab": vocab, "merges": merges}
    yield {**fixed, "text": TEXT.split("\n"), "vocab": stoi}
    yield {**fixed, "text": TEXT, "vocab": CHARS, "size": len(CHARS) + COUNT}
    yield {**fixed, "text": TEXT, "vocab": TEXT, "chars": "".join(CHARS)}


def only_required(function: Callable[..., Any], roles: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what has a default: an empty vocabulary that training fills, say. A text or a size is always given."""
    parameters = inspect.signature(function).parameters
    wanted = {role for name, role in roles.items() if parameters[name].default is inspect.Parameter.empty}
    return {role: value for role, value in values.items() if role in wanted | {"text", "size", "count"}}


def integers(ids: Any) -> list[int]:
    """The ids in a list, a tensor, an array, or in what has them as `ids` or under input_ids."""
    if isinstance(ids, Mapping) or hasattr(ids, "input_ids"):
        ids = ids["input_ids"] if isinstance(ids, Mapping) else ids.input_ids
    ids = getattr(ids, "ids", ids)
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, bytes | bytearray):
        ids = list(ids)
    if isinstance(ids, list | tuple) and len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    if not isinstance(ids, list | tuple) or not all(
        isinstance(i, int) and not isinstance(i, bool) for i in map(plain, ids)
    ):
        raise NotApplicable("its encode returns no list of ids")
    return [plain(i) for i in ids]


def plain(i: Any) -> Any:
    return i.item() if hasattr(i, "item") else i


@dataclass(frozen=True)
class Ranked:
    """Merges in the order in which they were learned: pairs of ids, or of strings, and what they become."""

    merges: list[tuple[tuple[Any, Any], Any]]
    of_ids: bool


def merges_of(met: MetTokenizer) -> Ranked:
    """Where it keeps them: by pair of ids to the new id, by pair to rank, or in a list. Raises NotApplicable."""
    held = vars(met.made) if hasattr(met.made, "__dict__") else {}
    for name, value in held.items():
        if value and isinstance(value, Mapping | list | tuple) and {"merges", "ranks"} & set(name.lower().split("_")):
            pairs = [*value] if not isinstance(value, Mapping) else sorted(value, key=lambda pair: value[pair])
            if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
                continue
            if all(isinstance(i, int) for pair in pairs for i in pair) and isinstance(value, Mapping):
                return Ranked([(pair, value[pair]) for pair in pairs], True)
            texts = [tuple(x.decode("latin-1") if isinstance(x, bytes) else x for x in pair) for pair in pairs]
            if all(isinstance(x, str) for pair in texts for x in pair):
                if any(mark in x for pair in texts for x in pair for mark in ("<", "_", "▁", "##")):
                    raise NotApplicable("its merges have marks of where words begin or end")
                ours = [(a, b) for a, b in texts if set(a + b) <= set(LETTERS)]  # those that our words can need
                return Ranked([((a, b), a + b) for a, b in ours], False)
    raise NotApplicable("it keeps no merges in a form that is known")
