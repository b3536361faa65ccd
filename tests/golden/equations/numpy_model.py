# ruff: noqa: E741 -- l is a layer, as in the papers
"""The model in plain NumPy.

Written from the papers' equations, independently of moda_jax, to check it.

Float64 or, for complex-step derivatives, complex128: every operation is analytic (no abs, no
conjugate), and a maximum is taken of real parts only. One row of tokens at a time, one token and
one head at a time where that is the plainest.

Symbols: V vocabulary, D model width, L layers, N query heads, K key/value heads, H head size,
F hidden width, T tokens, W layers that write depth slots, n streams. Sublayer i = 0 .. 2L-1: the
attention of layer l is i = 2l, its FFN is i = 2l + 1.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def tanh(x):
    return 2 * sigmoid(2 * x) - 1


def silu(x):
    return x * sigmoid(x)


def softmax(z):
    """Of a vector."""
    e = np.exp(z - z.real.max())
    return e / e.sum()


def rms_norm(x, eps, scale=1):
    """Over the last axis."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def rope(x, positions, theta):
    """x [T, heads, H]; rotates the pairs (i, i + H/2)."""
    H = x.shape[-1]
    angle = positions[:, None] * theta ** (-2 * np.arange(H // 2) / H)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = x[..., : H // 2], x[..., H // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(query, keys, values):
    """One token: query [N, H] over keys, values [entries, K, H], a softmax a head. Gives [N*H]."""
    N, H = query.shape
    K = keys.shape[1]
    heads = []
    for n in range(N):
        k = n // (N // K)
        weights = softmax(H**-0.5 * (keys[:, k] @ query[n]))
        heads.append(weights @ values[:, k])
    return np.concatenate(heads)


def sinkhorn(matrix, rounds=20):
    for _ in range(rounds):
        matrix = matrix / matrix.sum(axis=0, keepdims=True)
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    return matrix


def writers(config):
    """The layers that write depth slots."""
    return [l for l in range(config["L"] - 1) if l % config["every"] == 0]


class Row:
    """One row of T tokens: its segments and positions, and the depth slots written so far."""

    def __init__(self, config, params, segments, positions):
        self.config, self.params = config, params
        self.segments, self.positions = segments, positions
        self.slots = []  # (key, value), each [T, K, H]

    def linear(self, name, index, x):
        y = x @ self.params[name][index]
        if self.config["bias"]:
            y = y + self.params[name + "_bias"][index]
        return y

    def norm(self, x, scale):
        return rms_norm(x, self.config["eps"], scale)

    def split(self, x):
        """[T, heads*H] to [T, heads, H]."""
        return x.reshape(len(x), -1, self.config["H"])

    def key_of_layer(self, x, l):
        """What layer l keeps of a projected key [T, K*H]: [T, K, H]."""
        if not self.config.get("reader"):
            return self.normed_and_rotated(x, "key_norm", l)
        if self.config["qk_norm"] == "full":
            return self.split(self.norm(x, 1.0))
        return self.norm(self.split(x), 1.0)

    def key_as_read(self, key, l):
        """With "reader", a kept key has had no scale and no rotation: layer l gives it its own."""
        if not self.config.get("reader"):
            return key
        scale = self.params["key_pair_norm"][l]  # one number for i and i + H/2
        scale = scale.reshape(-1, self.config["H"] // 2)
        scale = np.concatenate([scale, scale], axis=1)
        return rope(key * scale, self.positions, self.config["theta"])

    def normed_and_rotated(self, x, scale_name, l):
        """A projected query or key [T, heads*H] to [T, heads, H], with QK-norm and RoPE."""
        qk_norm = self.config["qk_norm"]
        if qk_norm == "full":
            x = self.split(self.norm(x, self.params[scale_name][l]))
        elif qk_norm == "head":
            x = self.norm(self.split(x), self.params[scale_name][l])
        else:
            x = self.split(x)
        return rope(x, self.positions, self.config["theta"])

    # Sublayers.

    def attention(self, l, x):
        query = self.normed_and_rotated(self.linear("query", l, x), "query_norm", l)
        kept = self.key_of_layer(self.linear("key", l, x), l)
        key = self.key_as_read(kept, l)
        value = self.split(self.linear("value", l, x))
        slots = [(self.key_as_read(slot_key, l), v) for slot_key, v in self.visible_slots()]
        outputs = []
        for t in range(len(x)):
            sequence = [j for j in range(t + 1) if self.segments[j] == self.segments[t]]
            keys = [key[j] for j in sequence] + [slot_key[t] for slot_key, _ in slots]
            values = [value[j] for j in sequence] + [slot_value[t] for _, slot_value in slots]
            outputs.append(attend(query[t], np.stack(keys), np.stack(values)))
        self.write_attention_slot(l, x, kept, value)
        return self.linear("out", l, np.stack(outputs))

    def mlp(self, l, x):
        self.write_mlp_slot(l, x)
        return self.linear("down", l, silu(self.linear("gate", l, x)) * self.linear("up", l, x))

    def f(self, i, x):
        """Sublayer i without norm or residual connection."""
        return self.attention(i // 2, x) if i % 2 == 0 else self.mlp(i // 2, x)

    def sublayer_norm(self, i, x):
        name = "attention_norm" if i % 2 == 0 else "mlp_norm"
        return self.norm(x, self.params[name][i // 2])

    def branch(self, i, x):
        """Sublayer i with its norm, without the residual connection; not defined for post."""
        if self.config["placement"] == "pre":
            return self.f(i, self.sublayer_norm(i, x))
        if self.config["placement"] == "reordered":
            return self.sublayer_norm(i, self.f(i, x))
        raise ValueError(self.config["placement"])

    def residual_sublayer(self, i, x):
        if self.config["placement"] == "post":
            return self.sublayer_norm(i, x + self.f(i, x))
        return x + self.branch(i, x)

    def layer(self, l, x):
        return self.residual_sublayer(2 * l + 1, self.residual_sublayer(2 * l, x))

    # Depth slots (moda): row 3 writes the attention's keys and values, row 4 also a projection of
    # the FFN's input, row 5 an own projection for both.

    def visible_slots(self):
        window = self.config.get("window")
        if window is None:
            return self.slots
        length, reserved = len(self.slots), self.config["reserved"]
        return [self.slots[s] for s in range(length) if s < reserved or s >= length - window]

    def writes(self, l):
        return self.config["mechanism"] == "moda" and l in writers(self.config)

    def write_attention_slot(self, l, x, key, value):
        if self.writes(l):
            if self.config["row"] == 5:
                self.write_projected_slot("moda_attention", l, x)
            else:
                self.slots.append((key, value))

    def write_mlp_slot(self, l, x):
        if self.writes(l) and self.config["row"] in (4, 5):
            self.write_projected_slot("moda_ffn", l, x)

    def write_projected_slot(self, name, l, x):
        w = writers(self.config).index(l)
        key = self.key_of_layer(self.linear(name + "_key", w, x), l)
        value = self.split(self.linear(name + "_value", w, x))
        self.slots.append((key, value))

    # Mechanisms: from the embedding output x [T, D] to what the final norm reads [T, D].

    def residual(self, x):
        for l in range(self.config["L"]):
            x = self.layer(l, x)
        return x

    moda = residual  # the slots are read and written inside the sublayers

    def dense(self, x):
        outputs = [x]  # X_0 .. X_l
        for l in range(self.config["L"]):
            begin = l * (l + 1) // 2
            h = 0
            for i in range(l + 1):
                if self.config["form"] == "scalar":
                    h = h + self.params["dense_scalar"][begin + i] * outputs[i]
                else:
                    h = h + outputs[i] @ self.params["dense_matrix"][begin + i]
            outputs.append(self.layer(l, h))
        return outputs[-1]

    def depth_attention(self, x):
        keys, values = [], []
        for l in range(self.config["L"]):
            query = self.split(self.linear("depth_query", l, x))
            keys.append(self.split(self.linear("depth_key", l, x)))
            values.append(self.split(self.linear("depth_value", l, x)))
            h = []
            for t in range(len(x)):
                token_keys = np.stack([key[t] for key in keys])
                token_values = np.stack([value[t] for value in values])
                h.append(attend(query[t], token_keys, token_values))
            x = self.layer(l, np.stack(h))
        return x

    def residual_read(self, i, entries):
        """Softmax-weighted sum of entries, a list of [T, D], with the query and norm of read i."""
        w, scale = self.params["residual_query"][i], self.params["residual_norm"][i]
        h = []
        for t in range(len(entries[0])):
            vectors = np.stack([entry[t] for entry in entries])
            weights = softmax(self.norm(vectors, scale) @ w)
            h.append(weights @ vectors)
        return np.stack(h)

    def attention_residuals(self, x):
        M = 2 * self.config["L"]
        if self.config["form"] == "full":
            entries = [x]
            for i in range(M):
                entries.append(self.branch(i, self.residual_read(i, entries)))
            return self.residual_read(M, entries)
        size = -(-M // self.config["num_blocks"])  # rounded up
        finished, running = [x], []  # running: the current block's sum, once it has a term
        for i in range(M):
            output = self.branch(i, self.residual_read(i, finished + running))
            running = [running[0] + output] if running else [output]
            if (i + 1) % size == 0:
                finished, running = finished + running, []
        return self.residual_read(M, finished + running)

    def hyper_connections(self, x):
        p, n = self.params, self.config["n"]
        streams = np.stack([x] * n, axis=1)  # [T, n, D]
        for i in range(2 * self.config["L"]):
            s_a, s_b = p["hc_scale"][i]
            h, A_r, B = [], [], []
            for H in streams:  # the token's streams [n, D]
                normed = self.norm(H, p["hc_norm"][i])
                A_m = p["hc_mix_bias"][i] + s_a * tanh(normed @ p["hc_mix"][i])
                A_r.append(p["hc_residual_bias"][i] + s_a * tanh(normed @ p["hc_residual"][i]))
                B.append(p["hc_out_bias"][i] + s_b * tanh(normed @ p["hc_out"][i]))
                h.append(A_m @ H)
            output = self.branch(i, np.stack(h))
            streams = np.stack(
                [np.outer(B[t], output[t]) + A_r[t].T @ streams[t] for t in range(len(x))]
            )
        return streams.sum(axis=1)

    def mhc(self, x):
        p, n = self.params, self.config["n"]
        streams = np.stack([x] * n, axis=1)  # [T, n, D]
        for i in range(2 * self.config["L"]):
            alpha_1, alpha_2, alpha_3 = p["mhc_scale"][i]
            h, post, res = [], [], []
            for H in streams:  # the token's streams [n, D]
                normed = rms_norm(H.reshape(-1), self.config["eps"])
                pre = sigmoid(alpha_1 * (normed @ p["mhc_pre"][i]) + p["mhc_pre_bias"][i])
                out = sigmoid(alpha_2 * (normed @ p["mhc_post"][i]) + p["mhc_post_bias"][i])
                post.append(2 * out)
                mix = (normed @ p["mhc_residual"][i]).reshape(n, n)
                res.append(sinkhorn(np.exp(alpha_3 * mix + p["mhc_residual_bias"][i])))
                h.append(pre @ H)
            output = self.branch(i, np.stack(h))
            streams = np.stack(
                [res[t] @ streams[t] + np.outer(post[t], output[t]) for t in range(len(x))]
            )
        return streams.sum(axis=1)


def forward(config, params, tokens, segments, positions):
    """Logits [B, T, V] of tokens [B, T]."""
    logits = []
    for b in range(len(tokens)):
        row = Row(config, params, segments[b], positions[b])
        x = params["embedding"][tokens[b]]
        x = getattr(row, config["mechanism"])(x)
        y = row.norm(x, params["final_norm"]) @ params["head"]
        if config["bias"]:
            y = y + params["head_bias"]
        logits.append(y)
    return np.stack(logits)
