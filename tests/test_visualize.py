"""`moda-jax visualize`: the weights are the softmax's, and the pictures and the page show them."""

import base64
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax.config import DenseConfig, DepthAttentionConfig, MoDAConfig, ResidualConfig
from moda_jax.data.tokenizer import ByteTokenizer
from moda_jax.model import reference
from moda_jax.model.attention_maps import _sink, attention_maps
from moda_jax.ops import attention
from moda_jax.train.metrics import METRICS_FILE
from moda_jax.visualize import command, figures, text_attention
from moda_jax.visualize.mass_by_step import mass_by_step
from moda_jax.visualize.page import dequantize, pack, page_data, quantize, write_page
from moda_jax.visualize.text_attention import TextAttention, look, token_texts
from pallas_kernels import reference as pallas_reference
from tests.models import SMALL, random_model
from tests.runs import save_run
from tests.tolerances import ATTENTION_WEIGHTS

TOKENS = np.random.default_rng(1).integers(0, 37, 7).astype(np.int32)
PLACES = np.arange(len(TOKENS))


def softmaxes(monkeypatch, model):
    """In order of the attention calls of the reference in float64: softmaxes by hand.

    Each is [N, T, slots], [N, T, T] or [N, T, T + slots]: tokens, then slots.
    """
    attend = reference._attention

    def read(params):
        operands = []

        def recorded(query, slots, sequence=None, bias=0.0):
            keys = [key for key, _ in slots]
            bias_1xN = jnp.broadcast_to(bias, (1, query.shape[2]))
            operands.append((query, keys, None if sequence is None else sequence[0], bias_1xN))
            return attend(query, slots, sequence, bias)

        monkeypatch.setattr(reference, "_attention", recorded)
        reference.forward(model.config, params, jnp.asarray(TOKENS)[None])
        return operands

    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), nnx.to_pure_dict(nnx.state(model))
        )
        operands = jax.tree.map(lambda x: np.asarray(x)[0], jax.jit(read)(params))
    return [by_hand(*call) for call in operands]


def by_hand(query, slots, key, bias):
    """Of query [T, N, H], keys of slots and sequence [T, K, H] or None, bias [N] of slots."""
    heads, size = query.shape[1:]

    def of_each_head(key):
        return np.repeat(key, heads // key.shape[1], axis=1)

    scores = [np.einsum("tnh,tnh->nt", query, of_each_head(x))[:, :, None] for x in slots]
    scores = [score + bias[:, None, None] * size**0.5 for score in scores]
    if key is not None:
        score = np.einsum("tnh,jnh->ntj", query, of_each_head(key))
        scores = [np.where(PLACES[:, None] >= PLACES, score, -np.inf), *scores]
    e = np.exp(np.concatenate(scores, axis=-1) / size**0.5)
    assert e.dtype == np.float64
    return e / e.sum(axis=-1, keepdims=True)


def test_a_bias_on_depth_scores():
    """By hand: of equal scores, two tokens and one slot, a bias of log 2 gives the slot a half."""
    ones = jnp.ones((1, 2, 2, 4))
    options = attention.check(ones, ones, ones, ones[None], ones[None], implementation=None)
    weights = pallas_reference.attention_weights(*options, jnp.log(jnp.array([2.0, 1.0])))
    np.testing.assert_allclose(weights[0, 0], [[1 / 3, 0, 2 / 3], [1 / 4, 1 / 4, 1 / 2]], rtol=1e-6)
    np.testing.assert_allclose(weights[0, 1], [[1 / 2, 0, 1 / 2], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


def close(got, expected):
    return np.abs(np.asarray(got) - expected).max(initial=0.0) < ATTENTION_WEIGHTS


@pytest.mark.parametrize(
    ("depth", "num_visible"),
    [
        pytest.param(MoDAConfig(), [0, 2, 4], id="row4"),
        pytest.param(
            MoDAConfig(attention_kv="project", window=2, reserved=1), [0, 2, 3], id="bounded-row5"
        ),
        pytest.param(
            MoDAConfig(ffn_kv="none", score_bias=-1.0, key_norm="reader"), [0, 1, 2], id="biased"
        ),
        pytest.param(ResidualConfig(), [0, 0, 0], id="plain", marks=pytest.mark.slow),
        pytest.param(MoDAConfig(ffn_kv="none"), [0, 1, 2], id="row3", marks=pytest.mark.slow),
        pytest.param(
            MoDAConfig(attention_kv="project"), [0, 2, 4], id="row5", marks=pytest.mark.slow
        ),
        pytest.param(MoDAConfig(write_every=2), [0, 2, 2], id="every2", marks=pytest.mark.slow),
    ],
)
def test_weights_are_a_softmax_by_hand(monkeypatch, depth, num_visible):
    model = random_model(dataclasses.replace(SMALL, num_layers=3, depth=depth))
    layers, heads = [2, 1, 0], [2, 0, 3]
    maps = attention_maps(model, TOKENS, layers=layers, heads=heads)
    expected = softmaxes(monkeypatch, model)
    visible = np.asarray(maps.visible)
    np.testing.assert_array_equal(visible.sum(axis=1), num_visible)
    np.testing.assert_allclose(maps.weights.sum(axis=-1), 1.0, atol=ATTENTION_WEIGHTS)
    for layer, weights in enumerate(expected):
        sequence, depth = weights[..., :7], weights[..., 7:]
        mass = np.zeros((4, 1 + visible.shape[1]))
        mass[:, 0] = sequence.sum(axis=-1).mean(axis=1)
        mass[:, 1:][:, visible[layer]] = depth.mean(axis=1)
        assert close(maps.mass[layer], mass)
        alone = sequence / sequence.sum(axis=-1, keepdims=True)
        sink = [x[:, 1:, 0].mean(axis=1) for x in (sequence, alone)]
        assert close(maps.sink[layer], np.stack(sink, axis=-1))
        if layer in layers:
            got = maps.weights[layers.index(layer)]
            assert close(got[..., :7], sequence[heads])
            assert close(got[..., 7:][..., visible[layer]], depth[heads])
            assert (np.asarray(got[..., 7:][..., ~visible[layer]]) == 0).all()


def test_depth_attention_has_a_softmax_of_its_own(monkeypatch):
    config = dataclasses.replace(SMALL, num_layers=2, depth=DepthAttentionConfig())
    model = random_model(config)
    maps = attention_maps(model, TOKENS, layers=[0], heads=[1, 3])
    expected = softmaxes(monkeypatch, model)  # depth, then sequence, of each layer
    np.testing.assert_array_equal(maps.visible, [[True, False], [True, True]])
    assert close(maps.weights[0, ..., :7], expected[1][[1, 3]])
    assert close(maps.weights[0, ..., 7:8], expected[0][[1, 3]])
    assert (np.asarray(maps.weights[0, ..., 8]) == 0).all()
    assert close(maps.mass[1, :, 1:], expected[2].mean(axis=1))
    attention = look(model, Letters(), "abcdef", title="", layers=[0], heads=[1, 3])
    assert attention.slots == ["e", "0"]
    assert not attention.is_joint
    assert "a softmax each" in attention.mechanism


def test_a_query_that_looks_at_depth_alone():
    weights = jnp.array([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])  # one head, two tokens, one slot
    np.testing.assert_array_equal(_sink(weights, 2), [[0.0, 0.0]])


def test_a_model_without_slots_has_a_sequence_part_only():
    model = random_model(dataclasses.replace(SMALL, num_layers=1, depth=DenseConfig()))
    attention = look(model, Letters(), "abc", title="")
    assert attention.weights.shape == (1, 4, 4, 4)
    assert attention.slots == []
    assert "sequence part only" in attention.mechanism
    np.testing.assert_allclose(attention.sink[:, 0], attention.sink[:, 1], atol=ATTENTION_WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": TOKENS[:1]}, "tokens: expected at least 2, got 1"),
        ({"tokens": TOKENS + 37}, "tokens: expected"),
        ({"layers": [4]}, r"layers: expected different numbers in 0 … 3, got \[4\]"),
        ({"layers": [1, 1]}, "layers: expected different numbers"),
        ({"heads": []}, r"heads: expected different numbers in 0 … 3, got \[\]"),
        ({"tokens": np.zeros(20_000, np.int32)}, "tokens: expected fewer, or fewer layers"),
    ],
)
def test_bad_maps(changes, message):
    arguments = {"tokens": TOKENS, "layers": [0], "heads": [0]} | changes
    with pytest.raises(ValueError, match=message):
        attention_maps(random_model(SMALL), arguments.pop("tokens"), **arguments)


class Letters(ByteTokenizer):
    """A tokenizer of few enough tokens for `SMALL`."""

    vocab_size, eos_id = 37, 36

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids if i < 26)


def made_up(*, slots=2, own_softmax=False, title="run </script>") -> TextAttention:
    """Random weights of three tokens, two of four layers, and two heads."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3 + slots), (2, 2, 3)).astype(np.float32)
    return TextAttention(
        title=title, mechanism="moda", tokens=["⟨end of document⟩", "<b>", "\n"], layers=[1, 3],
        heads=[0, 2], slots=["0a", "0f"][:slots], weights=weights,
        visible=np.array([[False] * 2, [True, False], [True] * 2, [True] * 2])[:, :slots],
        mass=np.full((4, 1 + slots), 1 / (1 + slots)), sink=np.full((4, 2), 0.123456),
        own_softmax=own_softmax,
    )  # fmt: skip


def data_in(page):
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    return json.loads(data)


def test_the_page_holds_the_weights(tmp_path):
    """Read back as its docstring says, without the code that wrote them."""
    attention = made_up()
    write_page(attention, tmp_path / "page.html")
    data = data_in(tmp_path / "page.html")
    for layer, number in enumerate(attention.layers):
        slots = data["visible"][number]
        for head in range(2):
            codes = np.frombuffer(base64.b64decode(data["maps"][layer][head]), np.uint8)
            got = (codes / 255.0) ** 2
            expected = attention.weights[layer, head]
            assert len(got) == 6 + 3 * len(slots)
            shown = [expected[t, j] for t in range(3) for j in range(t + 1)]
            shown += [expected[t, 3 + s] for t in range(3) for s in slots]
            assert np.all(np.abs(got - shown) <= np.sqrt(shown) / 255 + 4e-6)
    assert data["tokens"] == attention.tokens
    assert data["sink"][0] == [0.1235, 0.1235]
    assert len(data["colours"]) == 256


def test_bytes_of_weights():
    weights = np.concatenate([np.linspace(0, 1, 1001), np.geomspace(1e-8, 1, 100)])
    codes = quantize(weights)
    assert codes.dtype == np.uint8
    assert np.all(np.abs(dequantize(codes) - weights) <= np.sqrt(weights) / 255 + 4e-6)
    np.testing.assert_array_equal(quantize(np.array([0.0, 1.0, 1.0000001])), [0, 255, 255])
    square = np.array([[1.0, 0.0, 0.25], [0.25, 0.0, 0.75]])
    assert base64.b64decode(pack(square, np.array([True]))) == bytes([255, 128, 0, 128, 221])


def test_the_page_needs_nothing_else(tmp_path):
    write_page(made_up(), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text  # the browser itself fetches nothing
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", text)
    assert text.count("</script>") == 2  # no token and no title ends the data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = random_model(dataclasses.replace(SMALL, vocab_size=257, num_layers=2))
    return save_run(tmp_path_factory.mktemp("saved") / "run", model, {4: 1.0, 8: 2.0})


@pytest.fixture
def visualize(capfd):
    def call(*arguments):
        status = command.main([str(x) for x in arguments])
        return (status, *capfd.readouterr())

    return call


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("ab é\n", encoding="utf-8")
    return tmp_path / "text.txt"


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_a_text_of_a_run(run, visualize, text, tmp_path):
    status, out, err = visualize(run, "--text", text, "--output", tmp_path / "new" / "pictures",
                                 "--step", "best", "--layers", 1, 0, "--heads", 2, 0)  # fmt: skip
    assert (status, err) == (0, "")
    written = ["attention.html", "attention.png", "attention_sink.png", "depth_mass.png"]
    folder = tmp_path / "new" / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == written
    assert all(name in out for name in written)
    assert all(is_png(folder / name) for name in written[1:])
    data = data_in(folder / "attention.html")
    assert data["title"] == "run, step 4"
    assert data["tokens"] == [
        "⟨end of document⟩", "a", "b", " ", "⟨token 195⟩", "é", "\n"
    ]  # fmt: skip
    assert (data["layers"], data["heads"]) == ([1, 0], [2, 0])
    assert data["slots"] == ["0a", "0f"]
    assert data["joint"]
    np.testing.assert_allclose(np.sum(data["mass"], axis=1), 1.0, atol=1e-3)
    codes = np.frombuffer(base64.b64decode(data["maps"][0][0]), np.uint8)
    last_row = np.concatenate([codes[21:28], codes[40:42]])  # of layer 1, which sees two slots
    assert abs(dequantize(last_row).sum() - 1) < 0.01


@pytest.mark.parametrize("slots", [0, 2])
def test_pictures_with_and_without_depth(tmp_path, slots):
    attention = made_up(slots=slots, title="a $ run 東\n")  # with what the font does not have
    figures.plot_weights(attention, tmp_path / "weights.png", most_layers=1, most_heads=4)
    figures.plot_sink(attention, tmp_path / "sink.png")
    assert is_png(tmp_path / "weights.png")
    assert is_png(tmp_path / "sink.png")


def test_spread():
    assert figures.spread(3, 4) == [0, 1, 2]
    assert figures.spread(48, 4) == [0, 16, 31, 47]
    assert figures.spread(5, 1) == [0]


def test_names_of_tokens():
    texts = token_texts(ByteTokenizer(), [256, 97, 10, *"é".encode(), 255, 256])
    assert texts == [
        "⟨end of document⟩", "a", "\n", "⟨token 195⟩", "é", "⟨token 255⟩", "⟨end of document⟩"
    ]  # fmt: skip


def test_mass_over_training(visualize, tmp_path):
    records = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "depth_attention_mass": 0.2, "depth_attention_mass/1": 0.1,
         "depth_attention_mass/2": 0.3},
        {"step": 9, "depth_attention_mass": 0.4, "depth_attention_mass/1": 0.5,
         "depth_attention_mass/2": 0.3},
        {"step": 9, "final_depth_attention_mass/1": 0.9},
    ]  # fmt: skip
    steps, layers, mass = mass_by_step(records, tmp_path / METRICS_FILE)
    assert (steps, layers) == ([2, 9], [1, 2])
    np.testing.assert_array_equal(mass, [[0.1, 0.5], [0.3, 0.3]])
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / METRICS_FILE).write_text(lines)
    assert visualize(tmp_path, "--training")[0] == 0
    assert is_png(tmp_path / "pictures" / "depth_mass_by_step.png")


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "none: no validation yet"),
        ([{"step": 1, "depth_attention_mass": 0.5}], "only its mean"),
    ],
)
def test_a_run_without_mass_by_layer(visualize, tmp_path, records, reason):
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(x) + "\n" for x in records))
    status, _, err = visualize(tmp_path, "--training")
    assert (status, err.count("\n")) == (2, 1)
    assert reason in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "moda-jax visualize: expected --text FILE or --training, got neither"),
        (["--text", "none"], "--text: expected a text file, got 'none': No such file"),
        (["--text", "EMPTY"], "--text: expected a text of at least one token, got none"),
        (["--text", "TEXT", "--layers", "2"], "--layers: expected different numbers in 0 … 1"),
        (["--text", "TEXT", "--heads", "0", "0"], "--heads: expected different numbers in 0 … 3"),
        (["--text", "TEXT", "--tokens", "1"], "--tokens: expected a number >= 2, got 1"),
        (["--text", "TEXT", "--step", "5"], '--step: expected "newest", "best" or one of'),
        (["--text", "TEXT", "--output", "TEXT"], "--output: expected a folder that can be w"),
        (["--text", "TEXT", "--output", ""], "--output: expected a folder, got an empty name"),
        (["--training", "--step", "4"], "--step: expected none without --text, got '4'"),
        (["--training", "--layers", "1"], "--layers: expected none without --text, got (1,)"),
        (["--text", "LONG"], "--text: expected at most 2505 tokens for 2 layers and 4 heads (a pa"),
    ],
)
def test_bad_input_is_one_line(run, visualize, text, tmp_path, arguments, message):
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_text("a" * 5000)
    names = {"TEXT": text, "EMPTY": tmp_path / "empty", "LONG": tmp_path / "long"}
    status, out, err = visualize(run, *(names.get(argument, argument) for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")
    assert not list(run.glob("pictures/*"))


def test_what_the_limit_names_fits(monkeypatch):
    monkeypatch.setattr(text_attention, "MAX_PAGE_BYTES", 2000)
    model = random_model(dataclasses.replace(SMALL, num_layers=2))
    long = "a" * 50
    with pytest.raises(ValueError, match="--text: expected at most") as caught:
        look(model, Letters(), long, title="", layers=[0])
    (most,) = re.findall(r"--tokens (\d+) takes", str(caught.value))
    attention = look(model, Letters(), long, title="", layers=[0], most_tokens=int(most))
    assert sum(len(head) for layer in page_data(attention)["maps"] for head in layer) <= 2000
    with pytest.raises(ValueError, match=f"expected at most {most} tokens"):
        look(model, Letters(), long, title="", layers=[0], most_tokens=int(most) + 1)
