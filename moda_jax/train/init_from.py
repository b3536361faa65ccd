"""A new run that begins with the parameters of another run's checkpoint (`Config.init_from`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from moda_jax.config import MoDAConfig, ModelConfig, from_json, to_json
from moda_jax.config.files import flatten
from moda_jax.model.transformer import Transformer
from moda_jax.train.checkpoint import checkpoint_steps
from moda_jax.train.manifest import find_damage
from moda_jax.train.processes import on_main
from moda_jax.train.trained import READ_ITEMS, read_params, read_run, saved_tokenizer

SUGGESTED_BIAS = -24.0
"""`MoDAConfig.score_bias` for a plain model; docs/pytorch.md has what was measured."""


class InitialParams(NamedTuple):
    """What `load_initial_params` finds."""

    params: nnx.State
    source: str
    """Which checkpoint of which run, for the start screen."""
    notes: list[str]
    """A line for every setting of the model that is another one here, although all shapes agree."""
    is_changed: bool
    """Whether the model may compute another function than that of the source."""


def load_initial_params(
    source: str, model: ModelConfig, target: nnx.State, *, tokenizer: str, seed: int = 0
) -> InitialParams:
    """Reads the parameters of another run, nothing else of it, onto the devices of this one.

    A plain model's (depth residual) serve a MoDA model too: what that has besides, projections and
    score biases, starts as in a fresh run.

    Args:
        source: the run's folder, of which the newest checkpoint is taken, or RUN/checkpoints/STEP.
        model: of this run.
        target: its parameters' shapes, dtypes and shardings.
        tokenizer: fingerprint of this run's tokenizer.
        seed: of what the source has no parameters for.

    Raises:
        ValueError: there is no such checkpoint, it is damaged (no older one is taken in its place:
            nobody asked for that), its depth mechanism or a parameter's shape is another, or it was
            trained with another tokenizer.
    """
    # One process reads and hashes for all.
    folder = Path(on_main(lambda: str(_find(source))))
    run = read_run(folder)
    where = f"Config.init_from: checkpoint {folder.name} of {str(folder.parent.parent)!r}"
    try:
        there = from_json(run["config"]["model"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    differing = _differing_fields(there, model)
    adds_depth = there.depth.name == "residual" and model.depth.name == "moda"
    if there.depth.name != model.depth.name and not adds_depth:
        raise ValueError(
            f"{where}: expected a model with model.depth {model.depth.name!r}, got "
            f"{there.depth.name!r}; another mechanism has other parameters"
        )
    read, added = _split(target) if adds_depth else (target, nnx.State({}))
    if different := _differing_shape(_shapes_of(there), _shapes(read)):
        raise ValueError(
            f"{where}: expected parameters of this model's shapes, got others: "
            f"{'; '.join([*differing, different])}"
        )
    if (trained_with := saved_tokenizer(run)) != tokenizer:
        raise ValueError(
            f"{where}: expected a model trained with this run's tokenizer (fingerprint "
            f"{tokenizer}), got one trained with another ({trained_with}); choose its tokenizer "
            f"with --data.tokenizer"
        )
    params = read_params(folder, read)
    notes = [
        f"{line}: the same parameters, another function of them"
        for line in differing
        if not (adds_depth and line.startswith("model.depth."))
    ]
    if adds_depth:
        params = nnx.merge_state(params, _fresh(model, added, seed))
        notes.append(_describe_added(model, added))
    where = f"parameters of {folder.parent.parent}, step {folder.name}"
    return InitialParams(params, where, notes, bool(differing))


_ADDED = ("depth", "depth_layers")
"""Where a model keeps the parameters that its mechanism has besides the plain model's."""


def _split(target: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The plain model's parameters, and the mechanism's own."""
    return (
        nnx.State({name: part for name, part in target.items() if name not in _ADDED}),
        nnx.State({name: part for name, part in target.items() if name in _ADDED}),
    )


def _fresh(model: ModelConfig, added: nnx.State, seed: int) -> nnx.State:
    """The parameters `added`, as a fresh run has them; the compiler drops all others."""

    def make() -> nnx.State:
        return _split(nnx.state(Transformer(model, rngs=nnx.Rngs(seed))))[1]

    shardings = jax.tree.map(lambda leaf: leaf.sharding, added)
    return jax.jit(make, out_shardings=shardings)()


def _describe_added(model: ModelConfig, added: nnx.State) -> str:
    """What a MoDA model adds to the plain one, and what that does to its function."""
    assert isinstance(model.depth, MoDAConfig)
    names = ", ".join(_shapes(added)) or "no parameter"
    bias = model.depth.score_bias
    if bias is None:
        effect = "scores of depth slots compete with the sequence's from step 0 on"
        remedy = f"; --model.depth.score-bias {SUGGESTED_BIAS:g} lets them begin near 0"
    else:
        effect = f"weights on depth slots begin e^{bias:g} times as large as their scores say"
        remedy = ""
    return (
        f"depth moda in place of residual: {names} added; {effect}, and the validation of step 0 "
        f"shows with what loss{remedy}"
    )


def _find(source: str) -> Path:
    """The folder of the chosen checkpoint, which is whole."""
    given = Path(source).expanduser().absolute()
    if given.parent.name == "checkpoints" and given.name.isdecimal():
        folder, wanted = given.parent, int(given.name)
    else:
        folder, wanted = given / "checkpoints", None
    steps = checkpoint_steps(folder) if folder.is_dir() else []
    if not steps:
        raise ValueError(
            f"Config.init_from: expected a run's folder with checkpoints in it, or "
            f"RUN/checkpoints/STEP, got {source!r} (no checkpoint is there)"
        )
    step = steps[0] if wanted is None else wanted
    if step not in steps:
        raise ValueError(
            f"Config.init_from: expected one of the steps {steps[::-1]}, got {source!r}"
        )
    if problem := find_damage(folder / str(step), step, READ_ITEMS):
        others = ", ".join(str(folder / str(other)) for other in steps if other != step)
        raise ValueError(
            f"Config.init_from: expected a checkpoint that is whole, got {step}, which is damaged: "
            f"{problem}; {f'there are others: {others}' if others else 'there is no other'}"
        )
    return folder / str(step)


def _differing_fields(there: ModelConfig, here: ModelConfig) -> list[str]:
    before, now = flatten(to_json(there)), flatten(to_json(here))
    return [
        f"model.{name} {before.get(name)!r} there, {now.get(name)!r} here"
        for name in (before | now)
        if before.get(name) != now.get(name)
    ]


def _shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return _shapes(nnx.state(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))))


def _shapes(params: nnx.State) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(nnx.as_pure(params))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x.shape for path, x in leaves}


def _differing_shape(
    there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> str | None:
    """A line about the first parameter that is not the same; None if all are."""
    for name in [*here, *(name for name in there if name not in here)]:
        if there.get(name) != here.get(name):
            return (
                f"parameter {name} {there.get(name, 'none')} there, {here.get(name, 'none')} here"
            )
    return None
