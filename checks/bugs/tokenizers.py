"""Wrong tokenizers: what they do not give back, and merges out of order."""

from __future__ import annotations

from types import SimpleNamespace

from ..check_data import check_a_tokenizer_gives_back_its_text, check_merges_are_applied_in_the_order_learned
from . import bug, toolbox
from .toolbox import parts_with_companions, replace


@bug("a tokenizer joins its tokens with spaces", check_a_tokenizer_gives_back_its_text, of=parts_with_companions)
def tokenizer_decodes_with_spaces(parts: SimpleNamespace) -> None:
    class CharTokenizer:
        def __init__(self, text: str) -> None:
            self.symbols = sorted(set(text))

        def encode(self, text: str) -> list[int]:
            return [self.symbols.index(c) for c in text]

        def decode(self, ids: list[int]) -> str:
            return " ".join(self.symbols[i] for i in ids)

    replace(parts, "tokenizer", CharTokenizer)


@bug("the tables of a tokenizer count from different numbers", check_a_tokenizer_gives_back_its_text,
     of=parts_with_companions)  # fmt: skip
def tokenizer_decodes_off_by_one(parts: SimpleNamespace) -> None:
    class CharTokenizer:
        def __init__(self, text: str) -> None:
            self.stoi = {c: i for i, c in enumerate(sorted(set(text)))}
            self.itos = dict(enumerate(["<unk>", *self.stoi]))

        def encode(self, text: str) -> list[int]:
            return [self.stoi[c] for c in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(self.itos[i] for i in ids)

    replace(parts, "tokenizer", CharTokenizer)


@bug("a tokenizer drops a token that repeats the one before", check_a_tokenizer_gives_back_its_text,
     of=parts_with_companions)  # fmt: skip
def tokenizer_drops_repeats(parts: SimpleNamespace) -> None:
    class Tokenizer(toolbox.Tokenizer):
        def encode(self, text: str) -> list[int]:
            ids = super().encode(text)
            return [i for k, i in enumerate(ids) if not k or ids[k - 1] != i]

    replace(parts, "tokenizer", Tokenizer)


@bug("a tokenizer decodes each token alone: characters of several bytes are lost",
     check_a_tokenizer_gives_back_its_text, of=parts_with_companions)  # fmt: skip
def tokenizer_decodes_bytes_one_by_one(parts: SimpleNamespace) -> None:
    class Tokenizer(toolbox.Tokenizer):
        def decode(self, ids: list[int]) -> str:
            return "".join(self.vocab[i].decode("utf-8", errors="replace") for i in ids)

    replace(parts, "tokenizer", Tokenizer)


@bug("the vocabulary size of a tokenizer does not count its merges", check_a_tokenizer_gives_back_its_text,
     of=parts_with_companions)  # fmt: skip
def tokenizer_vocabulary_too_small(parts: SimpleNamespace) -> None:
    class Tokenizer(toolbox.Tokenizer):
        @property
        def vocab_size(self) -> int:
            return 256

    replace(parts, "tokenizer", Tokenizer)


@bug("a tokenizer encodes what it encoded before once more", check_a_tokenizer_gives_back_its_text,
     of=parts_with_companions)  # fmt: skip
def tokenizer_remembers(parts: SimpleNamespace) -> None:
    class Tokenizer(toolbox.Tokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.ids: dict[str, list[int]] = {}

        def encode(self, text: str) -> list[int]:
            ids = self.ids.setdefault(text, [])
            ids += super().encode(text)
            return list(ids)

    replace(parts, "tokenizer", Tokenizer)


@bug("a tokenizer takes the longest token from the left, whatever was merged first",
     check_merges_are_applied_in_the_order_learned, of=parts_with_companions)  # fmt: skip
def merges_from_the_left(parts: SimpleNamespace) -> None:
    class Tokenizer(toolbox.Tokenizer):
        def merge_all(self, ids: list[int]) -> list[int]:
            text, found = self.decode(ids).encode(), []
            tokens = {token: i for i, token in self.vocab.items()}
            while text:
                length = max(n for n in range(1, len(text) + 1) if text[:n] in tokens)
                found.append(tokens[text[:length]])
                text = text[length:]
            return found

    replace(parts, "tokenizer", Tokenizer)


@bug("a tokenizer goes over its text once: tokens that it has merged are not merged again",
     check_merges_are_applied_in_the_order_learned, of=parts_with_companions)  # fmt: skip
def merges_only_once(parts: SimpleNamespace) -> None:
    class Tokenizer(toolbox.Tokenizer):
        def merge_all(self, ids: list[int]) -> list[int]:
            for pair in self.merges:
                if max(pair) < 256:
                    ids = self.merge(ids, pair)
            return ids

    replace(parts, "tokenizer", Tokenizer)
