"""A Llama in the style of the transformers library: fused attention with a mask that has a default, past_key_values."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class LlamaConfig:
    vocab_size: int = 65
    hidden_size: int = 48
    intermediate_size: int = 96
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class LlamaRMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        squares = x.float().pow(2).mean(-1, keepdim=True)
        return (x.float() * torch.rsqrt(squares + self.eps)).to(x.dtype) * self.weight


def rotary_table(positions, head_dim, base):
    rates = base ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None].float() * rates
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class LlamaAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.n_kv, self.layer = config.num_attention_heads, config.num_key_value_heads, layer
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = 1 / math.sqrt(self.head_dim)
        self.q_proj = nn.Linear(config.hidden_size, self.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, hidden, past=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.n_kv, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        present = (k, v)
        k, v = (t.repeat_interleave(self.n_head // self.n_kv, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.proj(y), present


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h)


class LlamaLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = LlamaAttention(config, layer)
        self.norm2 = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin, hidden, past=None):
        a, present = self.attn(self.norm1(x), cos, sin, hidden, past)
        x = x + a
        x = x + self.mlp(self.norm2(x))
        return x, present


class LlamaForCausalLM(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(LlamaLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, mean=0.0, std=0.02)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=False):
        T = input_ids.size(1)
        before = past_key_values[0][0].size(2) if past_key_values is not None else 0
        S = before + T
        if S > self.config.max_position_embeddings:
            raise ValueError(f"{S} tokens are more than {self.config.max_position_embeddings} positions")
        positions = torch.arange(before, S, device=input_ids.device)
        hidden = torch.ones(T, S, dtype=torch.bool, device=input_ids.device).triu(S - T + 1)
        if attention_mask is not None:
            own = torch.eye(S, dtype=torch.bool, device=input_ids.device)[before:]
            hidden = hidden | (~attention_mask[:, None, None, :].bool() & ~own)
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, None, before:]
        cos, sin = rotary_table(positions, self.blocks[0].attn.head_dim, self.config.rope_theta)
        x = self.wte(input_ids)
        presents = []
        for i, block in enumerate(self.blocks):
            x, present = block(x, cos, sin, hidden, past_key_values[i] if past_key_values is not None else None)
            presents.append(present)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)
        return {"logits": logits, "loss": loss, "past_key_values": tuple(presents) if use_cache else None}

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_token_id=None):
        was_training = self.training
        self.eval()
        idx, past, window = input_ids, None, input_ids
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if past is None or idx.size(1) > self.config.max_position_embeddings:
                past, window = None, idx[:, -self.config.max_position_embeddings :]
            output = self(window, past_key_values=past, use_cache=True)
            logits, past = output["logits"][:, -1], output["past_key_values"]
            if temperature == 0:
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
