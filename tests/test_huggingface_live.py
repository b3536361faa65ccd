"""Import and export against Hugging Face transformers itself: `pip install -e ".[torch]"`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moda_jax import generate, load_trained
from moda_jax.config import MoDAConfig, ResidualConfig
from moda_jax.huggingface.exporting import export_checkpoint
from moda_jax.huggingface.importing import import_checkpoint
from moda_jax.huggingface.weights import parameters_of
from moda_jax.train.losses import next_token_loss
from tests.attention_suite import assert_close
from tests.checkpoints import save_run, write_tokenizer
from tests.models import FLOAT32, SMALL, random_model
from tests.tolerances import TRANSFORMERS

torch = pytest.importorskip("torch", reason='pip install -e ".[torch]" brings it')
transformers = pytest.importorskip("transformers", reason='pip install -e ".[torch]" brings it')

pytestmark = [
    pytest.mark.slow,
    # Its own deprecations, and code of ours that it opens: no business of this project.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

QUIET = {"say": lambda line: None}


@pytest.fixture(autouse=True, name="no_network")
def no_network_fixture(tmp_path, monkeypatch):
    """Nothing is looked up, and code of ours is copied into the test's folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(tmp_path / "m"))


def random_theirs(kind, kv_heads, tied, folder):
    """A random model of transformers, saved in several files."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=43, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8, rms_norm_eps=1e-3,
        tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=None, eos_token_id=1,
        pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    write_tokenizer(folder / "tokenizer.json")
    return model


def their_numbers(model, tokens, targets):
    """Logits, mean loss and gradients by name."""
    logits = model(torch.from_numpy(tokens).long()).logits
    wanted = torch.from_numpy(targets).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted)
    loss.backward()
    # The first layer has no slots, so a bias on their scores is not used.
    grads = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in model.named_parameters()
    }
    return logits.detach().numpy(), loss.item(), grads


def our_numbers(model, tokens, targets):
    """The same, under their names."""
    model.execution = FLOAT32
    graph, state = nnx.split(model)
    batch = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(targets)}
    batch["segment_ids"] = jnp.ones_like(batch["tokens"])
    batch["positions"] = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def mean_loss(state):
        model = nnx.merge(graph, state)
        return next_token_loss(model, batch, z_loss=0.0)[0] / tokens.size, model(batch["tokens"])

    (loss, logits), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(state)
    found = {}
    for parameter, grad in zip(parameters_of(model.config), jax.tree.leaves(grads), strict=True):
        parts = np.asarray(grad) if parameter.stacked else np.asarray(grad)[None]
        found |= {n: parameter.to_theirs(x) for n, x in zip(parameter.names, parts, strict=True)}
    return logits, loss, found


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, False), (1, True)])
@pytest.mark.parametrize("kind", ["olmo2", "llama", "qwen3"])
def test_logits_loss_gradients_and_the_way_back(kind, kv_heads, tied, tmp_path):
    theirs = random_theirs(kind, kv_heads, tied, tmp_path / "in")
    import_checkpoint(tmp_path / "in", tmp_path / "run", **QUIET)
    ours = load_trained(tmp_path / "run").model
    tokens, targets = np.random.default_rng(0).integers(0, 43, (2, 2, 11)).astype(np.int32)
    logits, loss, grads = their_numbers(theirs, tokens, targets)
    our_logits, our_loss, our_grads = our_numbers(ours, tokens, targets)
    assert_close("logits", our_logits, logits, TRANSFORMERS)
    assert_close("loss", our_loss, np.float32(loss), TRANSFORMERS)
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert_close(name, our_grads[name], grad, TRANSFORMERS)

    assert export_checkpoint(tmp_path / "run", tmp_path / "out", **QUIET) == kind
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == torch.float32
    again_logits = again(torch.from_numpy(tokens).long()).logits.detach().numpy()
    np.testing.assert_array_equal(again_logits, logits)


MODELS = {
    "row3-pre-head": {
        "depth": MoDAConfig(ffn_kv="none"),
        "norm_placement": "pre",
        "qk_norm": "head",
        "tie_embeddings": True,
    },
    "row4": {},
    "row5-post-bias": {
        "depth": MoDAConfig(attention_kv="project"),
        "norm_placement": "post",
        "qk_norm": "none",
        "use_bias": True,
    },
    "every2": {"depth": MoDAConfig(write_every=2), "use_bias": True, "tie_embeddings": True},
    "bounded": {"depth": MoDAConfig(window=3, reserved=1)},
    "score-bias": {"depth": MoDAConfig(score_bias=-0.5)},
    "plain-post": {"depth": ResidualConfig(), "norm_placement": "post"},
}


@pytest.mark.parametrize("name", MODELS)
def test_moda_models_open_in_transformers_and_generate_the_same(name, tmp_path):
    model = random_model(dataclasses.replace(SMALL, vocab_size=300, **MODELS[name]))
    run = save_run(tmp_path / "run", model)
    assert export_checkpoint(run, tmp_path / "out", shard_bytes=20_000, **QUIET) == "moda"
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = theirs.eval()
    tokens, targets = np.random.default_rng(0).integers(0, 256, (2, 2, 11)).astype(np.int32)
    logits, loss, grads = their_numbers(theirs, tokens, targets)
    our_logits, our_loss, our_grads = our_numbers(model, tokens, targets)
    assert_close("logits", our_logits, logits, TRANSFORMERS)
    assert_close("loss", our_loss, np.float32(loss), TRANSFORMERS)
    for weight, grad in our_grads.items():
        assert_close(weight, grad, grads[weight], TRANSFORMERS)
    labels = torch.from_numpy(tokens).long()
    shifted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(theirs(labels, labels=labels).loss, shifted)
    assert theirs.accepts_loss_kwargs is False  # so Trainer does not ask for another mean
    for name in ("output_attentions", "output_hidden_states", "num_items_in_batch"):
        with pytest.raises(ValueError, match=f"{name}: expected none, as it is not implemented"):
            theirs(labels, **{name: True})

    # Prompts of two lengths: padding stands on the left there.
    prompts = [tokens[0, :7].tolist(), tokens[1, :4].tolist()]
    padded = torch.tensor([prompts[0], [0] * 3 + prompts[1]])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    generated = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert generate(model, prompts, max_new_tokens=8) == generated[:, 7:].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = "Größe \n x"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 256
