"""Tiny models with the interface that LLaDA 2 and Fast-dLLM v2 publish: names of weights, call, masks, and their loops by hand.

Written from what the published code does, as the other side of the tests: nothing here is the project's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MASK, STOP = 49, 48


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(size))

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def rotated(x, positions, share, base):
    """The first `share` of each head, its two halves taken for real and imaginary parts."""
    dim = int(x.shape[-1] * share)
    angles = positions[:, None] / base ** (torch.arange(0, dim, 2) / dim)
    turned = torch.complex(*x[..., :dim].chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., dim:]], -1)


def attention(q, k, v, seen):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def predicted(logits):
    """[MASK] is never predicted: published code leaves that to the training, so random weights need it said."""
    return logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)


class Mlp(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, inner, bias=False), nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---- LLaDA 2: fused projections, norms of queries and keys, half of each head rotated, experts by groups

LLADA2 = dict(
    model_type="llada2_moe", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, num_shared_experts=1,
    moe_intermediate_size=12, first_k_dense_replace=1, routed_scaling_factor=2.5, partial_rotary_factor=0.5, rope_theta=600000,
    rms_norm_eps=1e-6, max_position_embeddings=128, use_qkv_bias=False, score_function="sigmoid",
    norm_head=False, sliding_window=4096, use_sliding_window=False, tie_word_embeddings=False, hidden_act="silu",
    mask_token_id=MASK,
)  # fmt: skip


class Gate(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.randn(c["num_experts"], c["hidden_size"]))
        self.register_buffer("expert_bias", 0.3 * torch.randn(c["num_experts"]))


class Experts(nn.Module):
    """Each token's experts: of the groups whose two best add up to most, those with the best score and bias."""

    def __init__(self, c):
        super().__init__()
        self.c, self.gate = c, Gate(c)
        self.experts = nn.ModuleList(Mlp(c["hidden_size"], c["moe_intermediate_size"]) for _ in range(c["num_experts"]))
        self.shared_experts = Mlp(c["hidden_size"], c["moe_intermediate_size"])

    def forward(self, x):
        return torch.stack([torch.stack([self.token(t) for t in row]) for row in x]) + self.shared_experts(x)

    def token(self, t):
        score = (self.gate.weight @ t).sigmoid()
        biased = (score + self.gate.expert_bias).view(self.c["n_group"], -1)
        groups = biased.topk(2).values.sum(1).topk(self.c["topk_group"]).indices
        allowed = torch.full_like(biased, -torch.inf)
        allowed[groups] = biased[groups]
        chosen = allowed.flatten().topk(self.c["num_experts_per_tok"]).indices
        weights = self.c["routed_scaling_factor"] * score[chosen] / score[chosen].sum()
        return sum(w * self.experts[int(e)](t) for w, e in zip(weights, chosen, strict=True))


class Llada2Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, dim = c, c["head_dim"]
        heads = c["num_attention_heads"] + 2 * c["num_key_value_heads"]
        self.query_key_value = nn.Linear(c["hidden_size"], heads * dim, bias=False)
        self.dense = nn.Linear(c["num_attention_heads"] * dim, c["hidden_size"], bias=False)
        self.query_layernorm, self.key_layernorm = Norm(dim), Norm(dim)
        self.query_layernorm.weight.data *= 3  # attention that looks at some tokens more than at others

    def forward(self, x, seen, positions):
        heads = self.query_key_value(x).unflatten(-1, (-1, self.c["head_dim"])).transpose(1, 2)
        q, k, v = heads.split([self.c["num_attention_heads"], self.c["num_key_value_heads"], self.c["num_key_value_heads"]], 1)
        turn = (positions, self.c["partial_rotary_factor"], self.c["rope_theta"])
        q, k = rotated(self.query_layernorm(q), *turn), rotated(self.key_layernorm(k), *turn)
        return self.dense(attention(q, k, v, seen))


class Llada2Layer(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attention = Llada2Attention(c)
        self.mlp = Experts(c) if layer >= c["first_k_dense_replace"] else Mlp(c["hidden_size"], c["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = Norm(c["hidden_size"]), Norm(c["hidden_size"])

    def forward(self, x, seen, positions):
        x = x + self.attention(self.input_layernorm(x), seen, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llada2(nn.Module):
    """`model(input_ids, attention_mask)` -> logits of the token at each position; the mask is added, 0 or -inf."""

    def __init__(self, c=LLADA2):
        super().__init__()
        self.model = nn.Module()
        self.model.word_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(Llada2Layer(c, n) for n in range(c["num_hidden_layers"]))
        self.model.norm = Norm(c["hidden_size"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        self.lm_head.weight.data *= 4  # predictions that are sure to different degrees

    def forward(self, input_ids, attention_mask):
        x, positions = self.model.word_embeddings(input_ids), torch.arange(input_ids.shape[1])
        for layer in self.model.layers:
            x = layer(x, attention_mask == 0, positions)
        return self.lm_head(self.model.norm(x))


def llada2_generate(model, prompt, gen_length, block, steps, threshold):
    """One request, without a cache: the whole canvas up to the block's end under a block-causal mask in every step."""
    blocks = -(-(prompt.shape[1] + gen_length) // block)
    canvas = torch.cat([prompt, torch.full((1, blocks * block - prompt.shape[1]), MASK)], 1)
    mask = torch.ones(blocks, blocks).tril().log().repeat_interleave(block, 0).repeat_interleave(block, 1)
    shares = [block // steps + (n < block % steps) for n in range(steps)]
    calls = 0
    for end in range((prompt.shape[1] // block + 1) * block, blocks * block + 1, block):
        own = canvas[0, end - block : end]
        for share in shares:
            open_places = own == MASK
            if not open_places.any():
                break
            calls += 1
            best, tokens = predicted(model(canvas[:, :end], mask[:end, :end])[0, -block:]).softmax(-1).max(-1)
            best = torch.where(open_places, best, -torch.inf)
            sure = best > threshold
            if sure.sum() < share:
                sure = torch.zeros_like(sure).scatter(0, best.topk(min(share, int(open_places.sum()))).indices, True)
            own[sure] = tokens[sure]
        if (canvas[0, prompt.shape[1] : end] == STOP).any():
            break
    return canvas[:, : min(prompt.shape[1] + gen_length, end)], calls


# ---- Fast-dLLM v2: Qwen2's weights, a cache that is told to keep a block, predictions of the next token, parts of a block

FAST = dict(
    model_type="Fast_dLLM_Qwen", architectures=["Fast_dLLM_QwenForCausalLM"], vocab_size=50, hidden_size=32, intermediate_size=48,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, rope_theta=1000000.0, rms_norm_eps=1e-6,
    max_position_embeddings=128, tie_word_embeddings=True, use_sliding_window=False, sliding_window=None, hidden_act="silu",
    max_window_layers=28, bd_size=8, torch_dtype="bfloat16",
)  # fmt: skip


class FastAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.dim = c, c["hidden_size"] // c["num_attention_heads"]
        size, keys = c["hidden_size"], c["num_key_value_heads"] * self.dim
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(size, size), nn.Linear(size, keys), nn.Linear(size, keys)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x, seen, positions, past):
        q, k, v = (f(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotated(x, positions, 1.0, self.c["rope_theta"]) for x in (q, k))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.o_proj(attention(q, k, v, seen)), (k, v)


class FastLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = FastAttention(c), Mlp(c["hidden_size"], c["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = Norm(c["hidden_size"]), Norm(c["hidden_size"])


class FastDllm(nn.Module):
    """`model(ids, past, update, block)` -> logits of the *next* token, and the cache, longer by `ids` if `update`."""

    def __init__(self, c=FAST):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(FastLayer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = Norm(c["hidden_size"])
        for layer in self.model.layers:
            layer.self_attn.q_proj.weight.data *= 8  # attention that looks at some tokens more than at others
            layer.self_attn.o_proj.weight.data *= 8  # or each token predicts itself, as the embeddings are tied
            layer.mlp.down_proj.weight.data *= 8

    def forward(self, input_ids, past_key_values, update_past_key_values, block_size):
        before = past_key_values[0][0].shape[2] if past_key_values else 0
        at, kept = torch.arange(before + input_ids.shape[1]) // block_size, []
        x, positions = self.model.embed_tokens(input_ids), torch.arange(before, len(at))
        for n, layer in enumerate(self.model.layers):
            past = past_key_values[n] if past_key_values else None
            out, new = layer.self_attn(layer.input_layernorm(x), at[before:, None] >= at, positions, past)
            x = x + out
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            kept.append(new)
        logits = self.model.norm(x) @ self.model.embed_tokens.weight.T  # tied
        return logits, kept if update_past_key_values else past_key_values


def fast_generate(model, prompt, blocks, block, small, threshold):
    """One request: prefix by whole blocks; the call that keeps a block predicts the next one's first token."""
    whole = prompt.shape[1] // block * block
    tokens, past, calls = prompt.clone(), None, 0
    if whole:
        logits, past = model(prompt[:, :whole], None, True, block)
        if whole == prompt.shape[1]:
            tokens = torch.cat([tokens, predicted(logits[:, -1:]).argmax(-1)], 1)
    for _ in range(blocks):
        own = torch.cat([tokens, torch.full((1, -tokens.shape[1] % block), MASK)], 1)[:, -block:]
        for at in range(0, block, small):
            while (own[0, at : at + small] == MASK).any():
                calls += 1
                logits = model(own, past, False, block)[0]
                logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)[0, at : at + small]
                best, found = predicted(logits).softmax(-1).max(-1)
                best = torch.where(own[0, at : at + small] == MASK, best, -torch.inf)
                sure = best > threshold
                sure[best.argmax()] = True
                own[0, at : at + small][sure] = found[sure]
        tokens = torch.cat([tokens[:, : tokens.shape[1] // block * block], own], 1)
        if (tokens[:, prompt.shape[1] :] == STOP).any():
            break
        logits, past = model(own, past, True, block)
        tokens = torch.cat([tokens, predicted(logits[:, -1:]).argmax(-1)], 1)
    return tokens, calls
