import torch
import torch.nn as nn
import torch.optim as optim

sentence = "I love machine learning"
words = sentence.split()
vocab = {w: i for i, w in enumerate(sorted(set(words)))}
inv_vocab = {i: w for w, i in vocab.items()}
data = torch.tensor([[vocab[w] for w in words]])
inputs, targets = data[:, :-1], data[:, 1:]


class OneLayerTransformer(nn.Module):
    def __init__(self, vocab_size, d_model=32, nhead=2):
        super().__init__()
        self.emb = nn.Embedding(vocab_size, d_model)
        self.pos = nn.Parameter(torch.zeros(1, 64, d_model))
        self.layer = nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward=64, batch_first=True, dropout=0.0)
        self.fc = nn.Linear(d_model, vocab_size)

    def forward(self, x):
        T = x.size(1)
        h = self.emb(x) + self.pos[:, :T]
        mask = torch.triu(torch.ones(T, T) * float("-inf"), diagonal=1)
        return self.fc(self.layer(h, src_mask=mask))


model = OneLayerTransformer(len(vocab))
criterion = nn.CrossEntropyLoss()
opt = optim.Adam(model.parameters(), lr=1e-2)
for epoch in range(200):
    opt.zero_grad()
    out = model(inputs)
    loss = criterion(out.view(-1, len(vocab)), targets.view(-1))
    loss.backward()
    opt.step()
print("final loss", loss.item())
pred = model(inputs).argmax(-1)
print([inv_vocab[i.item()] for i in pred[0]])
