"""One optimizer step and one validation step, each compiled once for the whole run."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moda_jax.config import Config
from moda_jax.model.execution import Resolved, device_memory, resolve_execution
from moda_jax.model.flops import count_parameters
from moda_jax.model.transformer import Transformer
from moda_jax.ops.sharding import batch_sharding, constrain, state_shardings
from moda_jax.train.losses import next_token_loss
from moda_jax.train.optimizer import make_optimizer, num_updates

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that an optimizer step changes; its arrays are donated to the step."""

    step: jax.Array
    """int32 scalar, steps done: batches seen, those of skipped steps included."""
    params: nnx.State
    """float32 parameters."""
    optimizer: Any
    """optax state; moments are shaped and placed like the parameters."""


class TrainFunctions(NamedTuple):
    """The compiled functions of a run. Call them under `jax.set_mesh(mesh)`."""

    execution: Resolved
    """How the model is computed, and why."""

    graphdef: nnx.GraphDef
    """`nnx.merge(graphdef, params)` is the model."""
    abstract_state: TrainState
    """Shapes, dtypes and shardings of the state, as a restore needs them."""
    init: Callable[[], TrainState]
    """A fresh state from `config.seed`, each part computed on the device that keeps it."""
    begin_with: Callable[[nnx.State], TrainState]
    """A fresh state around parameters that are given, and donated."""
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    """Batch of global int32 arrays [B, T]; metrics are float32 scalars, replicated.

    A loss or gradient norm that is not finite leaves parameters and moments as they are.
    """
    eval_step: Callable[[nnx.State, Batch], Metrics]
    """Sums over a batch: "cross_entropy" and "targets"."""
    attention_mass: Callable[[nnx.State, Batch], jax.Array]
    """Mean attention mass [L, 1 + S] on the sequence | each depth slot."""
    is_finite: Callable[[TrainState], jax.Array]
    """Whether every parameter and optimizer moment is."""


def make_train_functions(config: Config, mesh: Mesh) -> TrainFunctions:
    """Builds the model and optimizer of `config` for `mesh`, without allocating either."""
    optimizer, schedule = make_optimizer(config.optimizer, steps=config.steps)
    resolved = resolve(config, mesh)

    def make_model() -> Transformer:
        return Transformer(config.model, rngs=nnx.Rngs(config.seed), execution=resolved.execution)

    def begin_with(params: nnx.State) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def init() -> TrainState:
        return begin_with(nnx.state(make_model()))

    graphdef = nnx.graphdef(nnx.eval_shape(make_model))
    shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, mesh)
    rows, replicated = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    # XLA's CPU backend takes 14 s to optimise the code of these random numbers, 2.5 s not to.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    quick = {"xla_backend_optimization_level": 0} if on_cpu else None
    reads: dict[str, Any] = {
        "in_shardings": (shardings.params, rows),
        "out_shardings": replicated,
    }
    return TrainFunctions(
        execution=resolved,
        graphdef=graphdef,
        abstract_state=jax.tree.map(_with_sharding, shapes, jax.tree.broadcast(shardings, shapes)),
        init=jax.jit(init, out_shardings=shardings, compiler_options=quick),
        begin_with=jax.jit(
            begin_with,
            in_shardings=(shardings.params,),
            out_shardings=shardings,
            donate_argnums=0,
            compiler_options=quick,
        ),
        train_step=jax.jit(
            functools.partial(_train_step, graphdef, optimizer, schedule, config),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
            compiler_options=compiler_options(mesh.devices.flat[0]),
        ),
        eval_step=jax.jit(functools.partial(_eval_step, graphdef), **reads),
        attention_mass=jax.jit(functools.partial(_attention_mass, graphdef), **reads),
        is_finite=jax.jit(_is_finite, in_shardings=(shardings,), out_shardings=replicated),
    )


def resolve(config: Config, mesh: Mesh) -> Resolved:
    """How a training step of `config` is computed on `mesh`, and why."""
    device, sizes = mesh.devices.flat[0], config.mesh
    shards = sizes.fsdp * sizes.tensor
    return resolve_execution(
        config.model,
        config.execution,
        rows=config.batch_size // (config.accumulation_steps * sizes.data * sizes.fsdp),
        seq_len=config.data.seq_len,
        memory=device_memory(device),
        parameters=count_parameters(config.model).total,
        shards=shards,
    )


def compiler_options(device: jax.Device) -> dict[str, Any] | None:
    """XLA's options for a training step on `device`.

    cuBLAS's matrix products add to a sum and read a layer's part of a stacked array where it lies;
    Triton's, which autotuning picks where they are as fast alone, do neither. Without them a step
    of the 700M models takes 1.3% less on an H200, row 4's 0.9% (docs/benchmarks/train_step.md).
    """
    on_hopper = getattr(device, "compute_capability", None) == "9.0"
    return {"xla_gpu_enable_triton_gemm": False} if on_hopper else None


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    config: Config,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    z_loss = config.optimizer.z_loss
    loss = functools.partial(_loss, graphdef, z_loss)
    gradients, sums = _sum_gradients(loss, state.params, batch, config.accumulation_steps)
    # Sums over the whole step, divided once: a microbatch with few targets counts for few.
    # A step without any target has zero sums, so its loss and gradient are 0, not 0/0.
    targets = jnp.maximum(sums["targets"], 1.0)
    gradients = jax.tree.map(lambda gradient: gradient / targets, gradients)
    loss_value, grad_norm = sums["cross_entropy"] / targets, optax.tree.norm(gradients)
    is_good = jnp.isfinite(loss_value) & jnp.isfinite(grad_norm)
    updates, optimizer_state = optimizer.update(
        gradients, state.optimizer, state.params, is_good=is_good
    )
    updated = optax.apply_updates(state.params, updates)
    params = jax.tree.map(functools.partial(jnp.where, is_good), updated, state.params)
    metrics = {
        "loss": loss_value,
        "z_loss": z_loss * sums["z"] / targets,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "targets": sums["targets"],
        "skipped_steps": (state.step + 1 - num_updates(optimizer_state)).astype(jnp.float32),
    }
    return TrainState(state.step + 1, params, optimizer_state), metrics


def _loss(
    graphdef: nnx.GraphDef, z_loss: float, params: nnx.State, batch: Batch
) -> tuple[jax.Array, Metrics]:
    return next_token_loss(nnx.merge(graphdef, params), batch, z_loss=z_loss)


def _eval_step(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> Metrics:
    _, sums = _loss(graphdef, 0.0, params, batch)
    return {name: sums[name] for name in ("cross_entropy", "targets")}


def _attention_mass(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.attention_mass(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )


def _is_finite(state: TrainState) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]))


def _sum_gradients(
    loss: Callable[[nnx.State, Batch], tuple[jax.Array, Metrics]],
    params: nnx.State,
    batch: Batch,
    parts: int,
) -> tuple[nnx.State, Metrics]:
    """Gradients and loss terms, summed over all targets of `batch`, computed in `parts` parts."""
    part_gradients = jax.grad(loss, has_aux=True)
    if parts == 1:  # without the scan there is no second copy of the gradients
        return part_gradients(params, batch)

    def add_part(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, part_gradients(params, part)), None

    microbatches = jax.tree.map(lambda rows_BxT: _split_rows(rows_BxT, parts), batch)
    first = jax.tree.map(lambda rows: rows[0], microbatches)
    shapes = jax.eval_shape(part_gradients, params, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(add_part, zeros, microbatches)
    return sums


def _split_rows(rows_BxT: jax.Array, parts: int) -> jax.Array:
    """[B, T] -> [parts, B / parts, T], each device's rows dealt out to all parts.

    Part i takes rows i, i + parts, ...: consecutive rows would lie on few of the devices, and every
    part would have to move between them.
    """
    split = rows_BxT.reshape(-1, parts, rows_BxT.shape[1]).swapaxes(0, 1)
    return constrain(split, None, "batch", None)
