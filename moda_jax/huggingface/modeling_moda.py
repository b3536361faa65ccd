"""A Mixture-of-Depths Attention language model for Hugging Face transformers (PyTorch).

`moda-jax export` puts this file beside the weights. It is the model of moda-jax, written for
reading: attention is a softmax over two arrays of scores, side by side. Source of the mechanism:
Zhu et al., arXiv 2603.15619.

In a comment or name B, T are rows and tokens, N and K query and key/value heads, G = N / K, H the
size of a head, D the width of the residual stream, S depth slots.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

_FIELDS = CausalLMOutputWithPast.__dataclass_fields__
_CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
"""What this version of transformers calls the keys and values of the tokens so far."""


class MoDAConfig(PretrainedConfig):
    """Sizes under transformers' names; norm_placement, qk_norm and depth as in moda-jax."""

    model_type = "moda"
    keys_to_ignore_at_inference = [_CACHE]  # noqa: RUF012  (transformers' form)

    def __init__(
        self,
        vocab_size=320,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        rope_theta=500_000.0,
        norm_placement="reordered",
        qk_norm="full",
        use_bias=False,
        depth=None,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.norm_placement = norm_placement
        self.qk_norm = qk_norm
        self.use_bias = use_bias
        self.depth = {"name": "residual"} if depth is None else dict(depth)
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, in float32, then back to x's dtype."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x_f32 = x.float()
        mean_square = x_f32.square().mean(-1, keepdim=True)
        return (x_f32 * torch.rsqrt(mean_square + self.eps) * self.weight.float()).to(x.dtype)


def rotate(x, rope):
    """Rotary positions, half-rotation, in float32: x [B, T, heads, H], rope cos and sin."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


class KeyValue(nn.Module):
    """A projection to keys and values of its own, whose entries only depth attention reads."""

    def __init__(self, config):
        super().__init__()
        width = config.num_key_value_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.use_bias)


class Attention(nn.Module):
    """Attention over the sequence and, under the same softmax, over a token's depth slots."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim, self.qk_norm = layer, config.head_dim, config.qk_norm
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.use_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.use_bias)
        # Depth scores get a number that was chosen and one that is learned for each query head.
        self.bias_start = config.depth.get("score_bias")
        if self.bias_start is not None and config.num_hidden_layers > 1:
            self.score_bias = nn.Parameter(torch.zeros(self.num_heads))
        if self.qk_norm != "none":
            sizes = (width, kv_width) if self.qk_norm == "full" else (self.head_dim,) * 2
            self.q_norm = RMSNorm(sizes[0], config.rms_norm_eps)
            self.k_norm = RMSNorm(sizes[1], config.rms_norm_eps)

    def heads(self, product, norm, rope):
        """[B, T, width] -> [B, T, heads, H], normed and rotated."""
        if self.qk_norm == "full":
            product = norm(product)
        product = product.unflatten(-1, (-1, self.head_dim))
        return rotate(norm(product) if self.qk_norm == "head" else product, rope)

    def key_value(self, projection, x, rope):
        """Keys and values [B, T, K, H] of any projection, with this layer's key norm."""
        key = self.heads(projection.k_proj(x), getattr(self, "k_norm", None), rope)
        return key, projection.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, x, rope, visible, slots, cache):
        """What attention adds [B, T, D], and its own key and value [B, T, K, H].

        visible: [B, 1, 1, T, keys], True where a query may see a key. slots: pairs [B, T, K, H].
        """
        query = self.heads(self.q_proj(x), getattr(self, "q_norm", None), rope)
        own_key, own_value = self.key_value(self, x, rope)
        key, value = own_key.transpose(1, 2), own_value.transpose(1, 2)  # [B, K, T, H]
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        query = query.unflatten(2, (self.num_kv_heads, -1)) * self.head_dim**-0.5

        scores = torch.einsum("btkgh,bkjh->bkgtj", query, key).float()
        scores = scores.masked_fill(~visible, float("-inf"))
        if slots:
            depth_key, depth_value = (torch.stack(part) for part in zip(*slots, strict=True))
            depth_scores = torch.einsum("btkgh,sbtkh->bkgts", query, depth_key).float()
            if self.bias_start is not None:
                bias = self.bias_start + self.score_bias.float()
                depth_scores = depth_scores + bias.view(self.num_kv_heads, -1, 1, 1)
            scores = torch.cat((scores, depth_scores), dim=-1)
        # A query of padding that sees nothing would be 0 / 0.
        weights = torch.nan_to_num(scores.softmax(-1)).to(value.dtype)
        sequence, depth = weights.split((key.shape[2], len(slots)), dim=-1)
        out = torch.einsum("bkgtj,bkjh->btkgh", sequence, value)
        if slots:
            out = out + torch.einsum("bkgts,sbtkh->btkgh", depth, depth_value)
        return self.o_proj(out.flatten(2)), (own_key, own_value)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=config.use_bias)
        self.up_proj = nn.Linear(*sizes, bias=config.use_bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=config.use_bias)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """pre: x + f(norm(x)); post: norm(x + f(x)); reordered: x + norm(f(x))."""

    def __init__(self, config, layer):
        super().__init__()
        depth = config.depth
        self.placement = config.norm_placement
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.has_depth = depth["name"] == "moda"
        if self.has_depth:
            # Nobody reads what the last layer would write.
            is_last = layer == config.num_hidden_layers - 1
            self.writes = layer % depth["write_every"] == 0 and not is_last
            self.attention_kv, self.ffn_kv = depth["attention_kv"], depth["ffn_kv"]
            self.window, self.reserved = depth["window"], depth["reserved"]
            if self.writes and self.attention_kv == "project":
                self.depth_attention = KeyValue(config)
            if self.writes and self.ffn_kv == "project":
                self.depth_ffn = KeyValue(config)
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps)  # noqa: E731
        self.post_attention_layernorm = norm()
        if self.placement == "pre":
            self.input_layernorm = norm()
        else:
            self.post_feedforward_layernorm = norm()

    def norms(self):
        """Attention's and the FFN's."""
        if self.placement == "pre":
            return self.input_layernorm, self.post_attention_layernorm
        return self.post_attention_layernorm, self.post_feedforward_layernorm

    def join(self, x, branch, norm):
        if self.placement == "reordered":
            return x + norm(branch)
        return norm(x + branch) if self.placement == "post" else x + branch

    def visible_slots(self, slots):
        """Of the slots that earlier layers wrote: all, or the first and the newest ones."""
        if not self.has_depth:
            return []
        if self.window is None:
            return slots
        return slots[: self.reserved] + slots[self.reserved :][-self.window :]

    def forward(self, x, rope, visible, slots, cache):
        """The residual stream after this layer; what it writes is appended to `slots`."""
        attention_norm, mlp_norm = self.norms()
        source = attention_norm(x) if self.placement == "pre" else x
        branch, own = self.self_attn(source, rope, visible, self.visible_slots(slots), cache)
        x = self.join(x, branch, attention_norm)
        if self.has_depth and self.writes:
            is_own = self.attention_kv == "reuse"
            slots.append(
                own if is_own else self.self_attn.key_value(self.depth_attention, source, rope)
            )
        source = mlp_norm(x) if self.placement == "pre" else x
        if self.has_depth and self.writes and self.ffn_kv == "project":
            slots.append(self.self_attn.key_value(self.depth_ffn, source, rope))
        return self.join(x, self.mlp(source), mlp_norm)


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_dim, self.theta = config.head_dim, config.rope_theta

    def rope(self, positions):
        """cos and sin [B, T, 1, H/2], float32."""
        half = torch.arange(self.head_dim // 2, dtype=torch.float32, device=positions.device)
        frequency = torch.pow(torch.tensor(self.theta), half * (-2.0 / self.head_dim))
        angle = positions[..., None, None].float() * frequency
        return angle.cos(), angle.sin()

    def forward(self, x, visible, positions, cache):
        rope = self.rope(positions)
        slots: list = []  # of these tokens: what they read over depth is their own
        for layer in self.layers:
            x = layer(x, rope, visible, slots, cache)
        return self.norm(x)


class MoDAForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Between decoding steps it keeps the sequence's keys and values alone."""

    config_class = MoDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # The loss is a mean over each batch: Trainer is to divide it by its gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.use_bias)
        if config.tie_word_embeddings:
            self.lm_head.bias = None
        self.post_init()

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        past_key_values=None,
        return_dict=True,
        **kwargs,
    ):
        """Logits [B, T, V]; with `labels` [B, T] also the mean loss of each next token.

        attention_mask: [B, keys], 0 where there is padding. cache: of the keys and values so far;
        older versions of transformers call it past_key_values. Raises ValueError for arguments of
        transformers' models that this one does not implement, as output_attentions=True.
        """
        names = ("output_attentions", "output_hidden_states")
        for name, value in ({n: getattr(self.config, n, None) for n in names} | kwargs).items():
            # `generate` may pass cache_position, which is what the cache says.
            if name != "cache_position" and value is not None and value is not False:
                raise ValueError(
                    f"{name}: expected none, as it is not implemented, got {value!r:.40}"
                )
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        query = past + torch.arange(x.shape[1], device=x.device)
        key = torch.arange(past + x.shape[1], device=x.device)
        visible = (key <= query[:, None])[None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, : len(key)].bool()
        if position_ids is None:
            position_ids = query[None]
            if attention_mask is not None:
                counted = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)
                position_ids = counted[:, past : len(key)]
        x = self.model(x, visible[:, None, None], position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept]).float()
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten().to(logits.device)
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})
        return result if return_dict else result.to_tuple()
