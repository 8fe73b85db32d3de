"""Tokenizers in forms that users write: right ones of every kind pass, wrong ones are found."""

from __future__ import annotations

import pytest

from tests.test_companions import subject_of
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.verdict import judge

BACK, ORDER = "check_a_tokenizer_gives_back_its_text", "check_merges_are_applied_in_the_order_learned"
CHECKS = {check.__name__: check for check in checks_in("data")}
CHARACTERS = """
    class CharTokenizer:
        def __init__(self, text):
            chars = sorted(set(text))
            self.vocab_size = len(chars)
            self.stoi, self.itos = {c: i for i, c in enumerate(chars)}, dict(enumerate(chars))

        def encode(self, text):
            return [self.stoi[c] for c in text]

        def decode(self, ids):
            return "".join(self.itos[i] for i in ids)
"""
BUILT = """
    class SimpleTokenizer:
        def __init__(self):
            self.char_to_idx, self.idx_to_char, self.vocab_size = {}, {}, 0

        def build_vocab(self, texts):
            symbols = ["<pad>", "<sos>", "<eos>", "<unk>"] + sorted({c for text in texts for c in text})
            self.char_to_idx = {c: i for i, c in enumerate(symbols)}
            self.idx_to_char = {i: c for c, i in self.char_to_idx.items()}
            self.vocab_size = len(symbols)

        def encode(self, text, max_length=None):
            return torch.tensor([1] + [self.char_to_idx.get(c, 3) for c in text] + [2])

        def decode(self, ids):
            return "".join(self.idx_to_char[int(i)] for i in ids)
"""
BYTES = """
    class ByteTokenizer:
        vocab_size = 259

        def encode(self, text, add_special=True):
            ids = list(text.encode("utf-8"))
            return [257] + ids + [258] if add_special else ids

        def decode(self, ids):
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
"""
MERGING = """
    def merge(ids, pair, new):
        found, i = [], 0
        while i < len(ids):
            if ids[i] == pair[0] and i < len(ids) - 1 and ids[i + 1] == pair[1]:
                found.append(new)
                i += 2
            else:
                found.append(ids[i])
                i += 1
        return found

    class BasicTokenizer:
        def __init__(self):
            self.merges, self.vocab = {}, {i: bytes([i]) for i in range(256)}

        def train(self, text, vocab_size, verbose=False):
            ids = list(text.encode("utf-8"))
            for new in range(256, vocab_size):
                counts = {}
                for pair in zip(ids, ids[1:]):
                    counts[pair] = counts.get(pair, 0) + 1
                pair = max(counts, key=counts.get)
                ids = merge(ids, pair, new)
                self.merges[pair], self.vocab[new] = new, self.vocab[pair[0]] + self.vocab[pair[1]]

        def encode(self, text):
            ids = list(text.encode("utf-8"))
            while len(ids) >= 2:
                pair = min(zip(ids, ids[1:]), key=lambda p: self.merges.get(p, float("inf")))
                if pair not in self.merges:
                    break
                ids = merge(ids, pair, self.merges[pair])
            return ids

        def decode(self, ids):
            return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")
"""
GIVEN = """
    import re

    class Tokenizer:
        def __init__(self, vocab, merges, special_tokens=None):
            self.vocab, self.merges = vocab, merges
            self.rank = {pair: i for i, pair in enumerate(merges)}
            self.ids = {token: i for i, token in vocab.items()}

        def encode(self, text):
            ids = []
            for chunk in re.findall(r" ?\\w+| ?[^\\s\\w]+|\\s+(?!\\S)|\\s+", text):
                parts = [bytes([b]) for b in chunk.encode()]
                while len(parts) > 1:
                    pairs = list(zip(parts, parts[1:]))
                    best = min(range(len(pairs)), key=lambda i: self.rank.get(pairs[i], 1e9))
                    if pairs[best] not in self.rank:
                        break
                    parts[best : best + 2] = [parts[best] + parts[best + 1]]
                ids += [self.ids[part] for part in parts]
            return ids

        def decode(self, ids):
            return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")
"""
STRINGS = """
    class BPETokenizer:
        def __init__(self):
            self.merges, self.stoi, self.itos = [], {}, {}

        def apply(self, tokens, pair):
            found, i = [], 0
            while i < len(tokens):
                both = tuple(tokens[i : i + 2]) == pair
                found.append("".join(pair) if both else tokens[i])
                i += 1 + both
            return found

        def train(self, text, num_merges):
            tokens = list(text)
            for _ in range(num_merges):
                pairs = list(zip(tokens, tokens[1:]))
                self.merges.append(max(dict.fromkeys(pairs), key=pairs.count))
                tokens = self.apply(tokens, self.merges[-1])
            symbols = sorted(set(text)) + ["".join(pair) for pair in self.merges]
            self.stoi, self.itos = {s: i for i, s in enumerate(symbols)}, dict(enumerate(symbols))

        def encode(self, text):
            tokens = list(text)
            for pair in self.merges:
                tokens = self.apply(tokens, pair)
            return [self.stoi[token] for token in tokens]

        def decode(self, ids):
            return "".join(self.itos[i] for i in ids)
"""
RIGHT = {
    "characters of a text": (CHARACTERS, {BACK}),
    "built later, with marks around, in a tensor": (BUILT, {BACK}),
    "of an alphabet, dropping all else": ("""
        class CharTokenizer:
            def __init__(self, alphabet="abcdefghijklmnopqrstuvwxyz .,!?:0123456789"):
                self.itos, self.stoi = list(alphabet), {c: i for i, c in enumerate(alphabet)}

            def encode(self, s): return [self.stoi[c] for c in s.lower() if c in self.stoi]
            def decode(self, ids): return "".join(self.itos[i] for i in ids)
        """, {BACK}),
    "made by a class method": ("""
        from dataclasses import dataclass

        @dataclass
        class CharTokenizer:
            stoi: dict
            itos: dict

            @classmethod
            def from_text(cls, text):
                stoi = {c: i for i, c in enumerate(sorted(set(text)))}
                return cls(stoi, {i: c for c, i in stoi.items()})

            def encode(self, s): return [self.stoi[c] for c in s]
            def decode(self, ids): return "".join(self.itos[i] for i in ids)
        """, {BACK}),
    "bytes": (BYTES, {BACK}),
    "merges of bytes, learned": (MERGING, {BACK, ORDER}),
    "merges of bytes, given": (GIVEN, {BACK, ORDER}),
    "merges of strings": (STRINGS, {BACK, ORDER}),
    "words with ends": ("""
        from collections import Counter

        class BPETokenizer:
            def __init__(self, vocab_size=300):
                self.vocab_size, self.merges = vocab_size, []

            def apply(self, s, pair):
                i = 0
                while i < len(s) - 1:
                    if (s[i], s[i + 1]) == pair:
                        s = s[:i] + [s[i] + s[i + 1]] + s[i + 2 :]
                    i += 1
                return s

            def train(self, text):
                words = {w: list(w) + ["</w>"] for w in text.lower().split()}
                symbols = {c for s in words.values() for c in s}
                for _ in range(20):
                    pairs = Counter(p for s in words.values() for p in zip(s, s[1:]))
                    self.merges.append(max(pairs, key=pairs.get))
                    symbols.add("".join(self.merges[-1]))
                    words = {w: self.apply(s, self.merges[-1]) for w, s in words.items()}
                self.vocab = {s: i for i, s in enumerate(["<unk>", *sorted(symbols)])}
                self.inverse = {i: s for s, i in self.vocab.items()}

            def encode(self, text):
                ids = []
                for s in (list(w) + ["</w>"] for w in text.lower().split()):
                    for pair in self.merges:
                        s = self.apply(s, pair)
                    ids += [self.vocab.get(x, 0) for x in s]
                return ids

            def decode(self, ids):
                return "".join(self.inverse[i] for i in ids).replace("</w>", " ").strip()
        """, {BACK}),
    "two functions": ("""
        chars = sorted(set("abcde fghij.\\n"))
        stoi, itos = {c: i for i, c in enumerate(chars)}, dict(enumerate(chars))
        encode = lambda s: [stoi[c] for c in s]
        decode = lambda l: "".join([itos[i] for i in l])
        """, {BACK}),
    "small letters only, others unknown": ("""
        import string

        class CharTokenizer:
            def __init__(self):
                self.chars = ["<pad>", "<unk>"] + list(string.ascii_lowercase + " .,!?'")
                self.stoi = {c: i for i, c in enumerate(self.chars)}

            def encode(self, text): return [self.stoi.get(c, 1) for c in text.lower()]
            def decode(self, ids): return "".join(self.chars[i] for i in ids if i > 1)
        """, {BACK}),
    "whole words": ("""
        class WordTokenizer:
            def __init__(self, text):
                self.stoi = {w: i for i, w in enumerate(["<unk>", *sorted(set(text.split()))])}
                self.itos = list(self.stoi)

            def encode(self, text): return [self.stoi.get(w, 0) for w in text.split()]
            def decode(self, ids): return " ".join(self.itos[i] for i in ids)
        """, set()),
    "whole words, others refused": ("""
        class SimpleTokenizerV1:
            def __init__(self, vocab):
                self.str_to_int, self.int_to_str = vocab, {i: s for s, i in vocab.items()}

            def encode(self, text): return [self.str_to_int[w] for w in text.split()]
            def decode(self, ids): return " ".join(self.int_to_str[i] for i in ids)
        """, set()),
    "of one length": ("""
        class CharTokenizer:
            def __init__(self, text, max_len=40):
                self.max_len, self.stoi = max_len, {c: i + 1 for i, c in enumerate(sorted(set(text)))}

            def encode(self, text):
                ids = [self.stoi.get(c, 0) for c in text[: self.max_len]]
                return ids + [0] * (self.max_len - len(ids))

            def decode(self, ids): return "".join(list(self.stoi)[i - 1] for i in ids if i)
        """, set()),
    "of a file": ("""
        class FileTokenizer:
            def __init__(self, model_path): self.text = open(model_path).read()
            def encode(self, text): return [0]
            def decode(self, ids): return "a"
        """, set()),
}  # fmt: skip


@pytest.mark.parametrize(("code", "laws"), RIGHT.values(), ids=RIGHT)
def test_right_tokenizers_pass_the_laws_that_apply(tmp_path, code, laws):
    subject = subject_of(tmp_path, code)
    verdicts = {name: judge(CHECKS[name], subject, {}) for name in (BACK, ORDER)}
    assert not [v.says for v in verdicts.values() if v.outcome not in ("passed", "not_applicable")]
    assert {name for name, v in verdicts.items() if v.outcome == "passed"} == laws
    assert not verdicts[BACK].remarks


GREEDY = STRINGS.replace("""            tokens = list(text)
            for pair in self.merges:
                tokens = self.apply(tokens, pair)
            return""", """            tokens = []
            while text:
                tokens.append(max((s for s in self.stoi if text.startswith(s)), key=len))
                text = text[len(tokens[-1]) :]
            return""")  # fmt: skip
FREQUENT = MERGING.replace(
    'min(zip(ids, ids[1:]), key=lambda p: self.merges.get(p, float("inf")))',
    "next((p for p in zip(ids, ids[1:]) if p in self.merges), (0, 0))",
)
ONCE = GIVEN.replace("best = min(range(len(pairs)), key", "best = max(range(len(pairs)), key").replace("1e9", "-1")
JOINED = 'bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")'
WRONG = {
    "joined with spaces": (BACK, ["first wrong at character 1"], CHARACTERS.replace('"".join', '" ".join')),
    "off by one": (BACK, ["encodes", "decodes that as"], CHARACTERS.replace("dict(enumerate(chars))",
                                                                           "dict(enumerate(chars, 1))").replace(
        "self.itos[i] for", "self.itos.get(i, '?') for")),
    "a set is not sorted alike": (BACK, ["first wrong"], CHARACTERS.replace("dict(enumerate(chars))",
                                                                           "dict(enumerate(chars[::-1]))")),
    "spaces are stripped": (BACK, ["decodes that as ''"], CHARACTERS.replace("in text]", "in text.strip()]")),
    "repeats are lost": (BACK, ["decodes that as"], CHARACTERS.replace("in text]", "in dict.fromkeys(text)]")),
    "bytes one by one": (BACK, ["'é'"], BYTES.replace(JOINED, "''.join(chr(i) for i in ids if i < 256)")),
    "the marks have no place": (BACK, ["the id 257", "vocabulary size 256"], BYTES.replace("size = 259", "size = 256")),
    "encode remembers": (BACK, ["and the next time as"], CHARACTERS.replace(
        "return [self.stoi[c] for c in text]",
        "self.got = getattr(self, 'got', []); self.got += [self.stoi[c] for c in text]; return list(self.got)")),
    "two functions apart": (BACK, ["first wrong"], RIGHT["two functions"][0].replace(
        "dict(enumerate(chars))", "dict(enumerate(chars[1:] + [' ']))")),
    "the longest first": (ORDER, ["ebda", "e + bd + a, should be e + b + da"], GREEDY),
    "the first from the left": (ORDER, ["should be"], FREQUENT),
    "the last learned first": (ORDER, ["should be"], ONCE),
}  # fmt: skip


@pytest.mark.parametrize(("check", "facts", "code"), WRONG.values(), ids=WRONG)
def test_wrong_tokenizers_are_found(tmp_path, check, facts, code):
    subject = subject_of(tmp_path, code)
    found = judge(CHECKS[check], subject, {})
    assert found.outcome == "failed", found.says
    assert not [fact for fact in facts if fact not in found.says], found.says
    assert found.where.line > 20
    assert check == BACK or judge(CHECKS[BACK], subject, {}).outcome == "passed"


def test_a_tokenizer_of_words_may_lose_spaces_and_says_so(tmp_path):
    code = STRINGS.replace(
        "def encode(self, text):\n", "def encode(self, text):\n            text = text.replace('  ', ' ')\n"
    )
    found = judge(CHECKS[BACK], subject_of(tmp_path, code), {})
    assert found.outcome == "passed", found.says
    assert "does not keep spaces" in found.remarks[0]
