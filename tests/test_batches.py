"""What makes batches is met in its usual forms, and judged together with what trains on it."""

from __future__ import annotations

import textwrap

import pytest

from transformer_checks.checks.check_data import check_batch_and_loss_train_on_the_next_token
from transformer_checks.checks.meet.batches import batches_in
from transformer_checks.checks.meet.which_model import find
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge

HEAD = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
"""
# Each with the targets in the place of Y: the i-th row of tokens begins at i of the data.
FORMS = {
    "stream given": """
        def get_batch(data, batch_size, block_size):
            ix = torch.randint(len(data) - block_size - 3, (batch_size,))
            return torch.stack([data[i:i + block_size] for i in ix]), torch.stack(
                [data[i + S:i + S + block_size] for i in ix])
        """,
    "globals that a script sets": """
        if __name__ == "__main__":
            train_data = val_data = torch.arange(5000)
            batch_size, block_size, device = 4, 8, "cpu"

        def get_batch(split):
            data = train_data if split == "train" else val_data
            ix = torch.randint(len(data) - block_size - 3, (batch_size,))
            x = torch.stack([data[i:i + block_size] for i in ix])
            y = torch.stack([data[i + S:i + S + block_size] for i in ix])
            return x.to(device), y.to(device)
        """,
    "a file of ids": """
        batch_size, block_size = 4, 8

        def get_batch(split):
            data = np.memmap(f"{split}.bin", dtype=np.uint16, mode="r")
            ix = torch.randint(len(data) - block_size - 3, (batch_size,))
            x = torch.stack([torch.from_numpy(data[i:i + block_size].astype(np.int64)) for i in ix])
            y = torch.stack([torch.from_numpy(data[i + S:i + S + block_size].astype(np.int64)) for i in ix])
            return x, y
        """,
    "a method of arrays, rows named": """
        def make_train_batch(tokens, seq_len, bsz, generator=None):
            starts = np.arange(bsz) * 7
            rows = np.stack([tokens[s:s + seq_len + 4] for s in starts])
            return {"input_ids": torch.as_tensor(rows[:, :seq_len]), "labels": torch.as_tensor(rows[:, S:S + seq_len])}
        """,
    "a dataset of a stream": """
        class TokenDataset(Dataset):
            def __init__(self, data, block_size):
                self.data, self.block_size = data, block_size

            def __len__(self):
                return len(self.data) - self.block_size - 3

            def __getitem__(self, i):
                return self.data[i:i + self.block_size], self.data[i + S:i + S + self.block_size]
        """,
    "a dataset of a text": """
        class TextDataset(Dataset):
            def __init__(self, txt, tokenizer, max_length, stride):
                self.rows, ids = [], tokenizer.encode(txt, allowed_special={"<|endoftext|>"})
                for i in range(0, len(ids) - max_length - 3, stride):
                    self.rows.append((torch.tensor(ids[i:i + max_length]), torch.tensor(ids[i + S:i + S + max_length])))

            def __len__(self):
                return len(self.rows)

            def __getitem__(self, i):
                return self.rows[i]
        """,
    "a collate function": """
        def collate_fn(batch):
            ids = torch.stack([torch.as_tensor(row) for row in batch])
            labels = torch.full_like(ids, -100)
            n = ids.shape[1] - S
            labels[:, :n] = ids[:, S:]
            return {"input_ids": ids, "labels": labels}
        """,
    "a loader": """
        rows = torch.randint(1000, (40, 12), generator=torch.Generator().manual_seed(0))
        loader = DataLoader([(row[:8], row[S:S + 8]) for row in rows], batch_size=4)
        """,
}
MODEL = """
class GPT(nn.Module):
    def __init__(self, vocab_size, n_embd, block_size):
        super().__init__()
        self.table, self.head = nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size)
        self.places = nn.Embedding(block_size, n_embd)

    def forward(self, idx, targets=None):
        x = self.table(idx).cumsum(1) + self.places(torch.arange(idx.shape[1]))
        logits, loss = self.head(x), None
        if targets is not None:
            T = logits.shape[1] - LATER
            loss = F.cross_entropy(logits[:, :T].flatten(0, 1), targets[:, LATER:].flatten(), ignore_index=-100)
        return logits, loss
"""


def written(tmp_path, form, *, shift, later=0, more="", device="cpu"):
    source = HEAD + textwrap.dedent(FORMS[form]).replace("S:S", f"{shift}:{shift}").replace("+ S", f"+ {shift}")
    source = source.replace("- S", f"- {shift}").replace("S:]", f"{shift}:]")
    file = tmp_path / "model.py"
    file.write_text(source + MODEL.replace("LATER", str(later)) + textwrap.dedent(more))
    return str(file)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_shift_of_its_targets_is_read_from_a_batch(form, shift, tmp_path):
    found = find(written(tmp_path, form, shift=shift))
    (batch,) = batches_in(found.scope, found.module.__name__, found.sandbox)
    assert batch.shift == shift
    assert batch.tokens.shape == batch.targets.shape and len(batch.tokens) > 1
    assert form == "a loader" or (batch.line > 0 and batch.file.endswith("model.py"))


@pytest.mark.parametrize(("shift", "later"), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("form", ["stream given", "a dataset of a stream", "a collate function"])
def test_batch_and_loss_are_judged_as_a_pair(form, shift, later, tmp_path):
    subject = subject_of(written(tmp_path, form, shift=shift, later=later))
    verdict = judge(check_batch_and_loss_train_on_the_next_token, subject, {})
    assert verdict.outcome == ("passed" if shift + later == 1 else "failed"), verdict.says
    assert f"targets shifted by {shift}" in subject.header
    if verdict.outcome == "failed":
        assert f"by {shift} and the loss shifts them by {later}" in verdict.says
        assert verdict.where.line > 0


STEP = """
def train_step(model, optimizer, x, y):
    logits, _ = model(x)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
"""
LOOP = """
def train(model, optimizer, steps):
    for _ in range(steps):
        x, y = get_batch(torch.arange(99), 4, 8)
        logits, _ = model(x)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()).backward()
        optimizer.step()
"""


def test_a_step_that_shifts_makes_a_batch_right_that_does_not(tmp_path):
    for shift in (0, 1):
        subject = subject_of(written(tmp_path, "stream given", shift=shift, more=STEP))
        verdict = judge(check_batch_and_loss_train_on_the_next_token, subject, {})
        assert verdict.outcome == ("failed" if shift else "passed"), verdict.says
        assert "train_step shifts them by 1" in verdict.says or not shift


def test_a_loop_that_slices_again_is_not_judged(tmp_path):
    subject = subject_of(written(tmp_path, "stream given", shift=0, more=LOOP))
    verdict = judge(check_batch_and_loss_train_on_the_next_token, subject, {})
    assert verdict.outcome == "not_applicable" and "slices" in verdict.says


@pytest.mark.parametrize(
    "more",
    [
        "def get_batch(split):\n    return torch.randint(9, (4, 8)), torch.randint(9, (4, 8))",
        "def get_batch(path):\n    return open(path).read()",
        "def get_batch(data):\n    return data[:8].view(2, 4)",
        "def get_batch(data, batch_size, T):\n    raise RuntimeError('no')",
        "def get_batch(data):\n    return torch.zeros(4, 8).long(), torch.zeros(4, 8).long()",
    ],
)
def test_what_gives_no_shifted_tokens_is_not_judged(more, tmp_path):
    (tmp_path / "model.py").write_text(HEAD + MODEL.replace("LATER", "0") + more)
    subject = subject_of(str(tmp_path / "model.py"))
    verdict = judge(check_batch_and_loss_train_on_the_next_token, subject, {})
    assert verdict.outcome == "not_applicable" and "batches" in verdict.says
    assert "shifted by" not in subject.header
