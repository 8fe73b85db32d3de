"""One class, no arguments: the sizes of the sentence and nothing more."""

import torch
from torch import nn

SENTENCE = "I love machine learning".split()
WORDS = {word: number for number, word in enumerate(SENTENCE)}
X = torch.tensor([[WORDS[w] for w in SENTENCE[:-1]]])
Y = torch.tensor([[WORDS[w] for w in SENTENCE[1:]]])


class Homework(nn.Module):
    def __init__(self):
        super().__init__()
        d = 16
        self.e = nn.Embedding(len(SENTENCE), d)
        self.p = nn.Embedding(len(SENTENCE), d)
        self.wq, self.wk, self.wv = (nn.Linear(d, d) for _ in range(3))
        self.f = nn.Sequential(nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, d))
        self.o = nn.Linear(d, len(SENTENCE))

    def forward(self, x):
        n = x.shape[1]
        h = self.e(x) + self.p.weight[:n]
        s = self.wq(h) @ self.wk(h).mT / 4
        s = s + torch.full((n, n), float("-inf")).triu(1)
        h = h + s.softmax(-1) @ self.wv(h)
        return self.o(h + self.f(h))


def train(mask=None, steps=300):
    torch.manual_seed(0)
    model = Homework()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X)[0], Y[0], reduction="none")
        loss = loss.mean() if mask is None else (loss * mask).sum() / mask.sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model, loss.item()


if __name__ == "__main__":
    print(train()[1], train(torch.tensor([0.0, 0.0, 1.0]))[1])
