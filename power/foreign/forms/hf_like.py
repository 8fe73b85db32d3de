"""A GPT-2 in the style of the transformers library: a config object, labels shifted in forward, past_key_values."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


class GPTConfig:
    def __init__(self, vocab_size=65, n_positions=64, n_embd=48, n_layer=3, n_head=4, dropout=0.0, eps=1e-5):
        self.vocab_size, self.n_positions, self.n_embd = vocab_size, n_positions, n_embd
        self.n_layer, self.n_head, self.dropout, self.eps = n_layer, n_head, dropout, eps


@dataclass
class CausalLMOutput:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    past_key_values: tuple | None = None


class GPTAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.head_dim = config.n_embd // config.n_head
        self.scale = 1 / math.sqrt(self.head_dim)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_drop, self.drop = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, x, hidden, past=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = k.view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        v = v.view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.scale
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(dim=-1)
        weights = self.attn_drop(weights)
        y = torch.matmul(weights, v)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.drop(self.proj(y)), (k, v)


class GPTMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up, self.down = nn.Linear(config.n_embd, 4 * config.n_embd), nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        h = F.gelu(self.up(x), approximate="tanh")
        return self.drop(self.down(h))


class GPTBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = GPTAttention(config, layer)
        self.norm2 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.mlp = GPTMLP(config)

    def forward(self, x, hidden, past=None):
        a, present = self.attn(self.norm1(x), hidden, past)
        x = x + a
        x = x + self.mlp(self.norm2(x))
        return x, present


class GPTForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(GPTBlock(config, layer) for layer in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        self.head.weight = self.wte.weight

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        for name, p in module.named_parameters():
            if name in ("proj.weight", "down.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=False):
        B, T = input_ids.shape
        before = past_key_values[0][0].size(2) if past_key_values is not None else 0
        S = before + T
        if S > self.config.n_positions:
            raise ValueError(f"{S} tokens are more than n_positions={self.config.n_positions}")
        positions = torch.arange(before, S, device=input_ids.device)
        hidden = torch.ones(T, S, dtype=torch.bool, device=input_ids.device).triu(S - T + 1)
        if attention_mask is not None:
            own = torch.eye(S, dtype=torch.bool, device=input_ids.device)[before:]
            hidden = hidden | (~attention_mask[:, None, None, :].bool() & ~own)
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, before:]
        x = self.wte(input_ids) + self.wpe(positions)
        x = self.drop(x)
        presents = []
        for i, block in enumerate(self.blocks):
            x, present = block(x, hidden, past_key_values[i] if past_key_values is not None else None)
            presents.append(present)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(logits, loss, tuple(presents) if use_cache else None)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, do_sample=False, temperature=1.0, top_k=None, top_p=None,
                 eos_token_id=None):  # fmt: skip
        was_training = self.training
        self.eval()
        idx, past, window = input_ids, None, input_ids
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if past is None or idx.size(1) > self.config.n_positions:
                past, window = None, idx[:, -self.config.n_positions :]
            output = self(window, past_key_values=past, use_cache=True)
            logits, past = output.logits[:, -1], output.past_key_values
            if not do_sample:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                if top_p is not None:
                    ordered, order = logits.sort(dim=-1, descending=True)
                    sorted_probs = ordered.softmax(dim=-1)
                    late = sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p
                    logits = logits.masked_fill(late.scatter(-1, order, late), float("-inf"))
                probs = logits.softmax(dim=-1)
                token = torch.multinomial(probs, num_samples=1)
            if eos_token_id is not None:
                token = token.masked_fill(done[:, None], eos_token_id)
                done = done | (token[:, 0] == eos_token_id)
            idx = torch.cat((idx, token), dim=1)
            window = token
            if done.all():
                break
        self.train(was_training)
        return idx
