"""The protocol of every way of using depth: how sublayers are connected, and what they remember.

A model is  start → (read → attention → write → read → FFN → write) × L → finish.  A mechanism says
what those four words mean. It may keep two things: a *carry*, a pytree of fixed size that goes from
sublayer to sublayer (the residual stream, or several), and an append-only *history* of entries that
later sublayers read. Small examples: `moda_jax.depth.hyper_connections` has parameters and no
history, `moda_jax.depth.attention_residuals` a history.

What a mechanism must keep to, as the stack's backward replays layers over the final history:

- It reads the history by `history.read`, `custom`, `parameter` or `step.attend` only, and returns
  the history that they give back. What is taken from `history.buffers` directly has no gradient.
- Slots that are not written yet may hold NaN: a read masks them.
- The carry has the same structure, shapes and dtypes after every sublayer. Parameters arrive in
  float32, those named `kernel` and `bias` in the compute dtype: results are cast back.
- A product that the backward needs goes through `step.keep(x, name)`, under a name that is unique
  in a layer: with the sublayer in it, if both make one. Otherwise it is computed again.
- Norms are the layer's: `layer.join` adds a branch to a stream, and norms the sum in post-norm.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import jax
from flax import nnx

from moda_jax.config import DepthConfig, ModelConfig
from moda_jax.ops.history import History

if TYPE_CHECKING:
    from moda_jax.model.layer import Layer

ATTENTION, FFN = 0, 1
"""The two sublayers of a layer; sublayer i of the model is 2 · layer + one of them."""

Carry = Any
Settings = TypeVar("Settings", bound=DepthConfig)


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer of one pass: where it stands, and what differs between passes."""

    layer: jax.Array
    """int32 scalar, 0 … L−1; traced."""
    positions: jax.Array
    """[B, T] int32, where the tokens stand in their document."""
    rope: Any
    """cos and sin [B, T, 1, H/2]; None where the layers rotate by themselves, if at all."""
    keep: Callable[[jax.Array, str], jax.Array]
    """keep(x, name) is x. Training's forward may save it under that name, unique in a layer, for
    the backward, which then does not compute it again; with `remat="save_attention"` only products
    that become depth keys, named `*_key`."""
    attend: Callable[..., tuple[jax.Array, History]]
    """attend(query, key, value, history, depth=DepthView or None) -> (o [B, T, N, H], history)."""


class DepthView(NamedTuple):
    """Which history entries an attention call reads, as keys and values; static but `length`."""

    length: jax.Array | None
    """Slots before it are visible; None: all."""
    window: int | None = None
    reserved: int = 0
    own_slot: jax.Array | None = None
    """The slot that will hold the call's own key and value; None: no slot does."""
    score_bias: jax.Array | None = None
    """[N] float32, added to the scores of these entries; None: nothing is."""


class Output(NamedTuple):
    """What a sublayer gives to `write`."""

    branch: jax.Array
    """[B, T, D], f of what was read; normed where the placement is reordered."""
    source: jax.Array
    """[B, T, D], what the sublayer's projections read (in pre-norm the normed input)."""
    key: jax.Array | None = None
    """[B, T, K, H], attention's own key after QK-norm and RoPE, and its value."""
    value: jax.Array | None = None


class GatherLayout(NamedTuple):
    """Which slots the layers write, where only attention reads the history."""

    per_layer: int
    """s, slots that a writing layer appends."""
    write_every: int
    num_slots: int
    """S, slots that some layer reads."""
    window: int | None = None
    """Bounded slots: the newest that a layer reads; None: all."""
    has_score_bias: bool = False
    """Whether attention adds a bias to the slots' scores, so that they are not gathered."""


class Mechanism(Generic[Settings]):
    """A way of using depth. Without overrides: a plain residual stream, no history, no parameters.

    Attributes:
      config: the model's.
      settings: `config.depth`, of the mechanism's own class.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.settings: Settings = config.depth  # type: ignore[assignment]

    def __hash__(self) -> int:
        return hash(self.config)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.config == other.config

    # What it computes.

    def start(self, x: jax.Array, history: History) -> tuple[Carry, History]:
        """The carry before the first layer, from the embedded tokens [B, T, D].

        Linear in x and without parameters: the backward replays it at x = 0, as no gradient of a
        linear function depends on x.
        """
        return x, history

    def read(
        self, step: Step, weights: Any, sublayer: int, carry: Carry, history: History
    ) -> tuple[jax.Array, Carry, History]:
        """What a sublayer reads, [B, T, D]; `weights` are the layer's `layer_parameters`."""
        return carry, carry, history

    def depth_view(self, step: Step, weights: Any, history: History) -> DepthView | None:
        """The entries that the layer's attention reads beside the sequence; None: none."""
        return None

    def write(
        self,
        step: Step,
        weights: Any,
        sublayer: int,
        layer: "Layer",
        carry: Carry,
        history: History,
        output: Output,
    ) -> tuple[Carry, History]:
        """The carry after a sublayer."""
        return layer.join(carry, output.branch, sublayer), history

    def finish(self, carry: Carry, history: History) -> tuple[jax.Array, History]:
        """What the final norm and the head read, [B, T, D]."""
        return carry, history

    # What it needs.

    @property
    def num_entries(self) -> int:
        """History entries that somebody reads (S)."""
        return 0

    @property
    def capacity(self) -> int:
        """Slots of a training pass's buffers: `num_entries`, and room for entries nobody reads."""
        return self.num_entries

    def entry_shapes(self, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of one entry's arrays, each [B, T, ...]; in the compute dtype."""
        return ()

    def inference_capacity(self) -> int:
        """Slots of a pass that is not differentiated."""
        return self.capacity

    def gather_layout(self) -> GatherLayout | None:
        """Which slots are written, if attention alone reads the history; else None.

        The gradients of keys and values that only attention reads can be gathered.
        """
        return None

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """One layer's own parameters; they are stacked [L, ...]."""
        return None

    def initialize(self, stacked: Any) -> None:
        """Sets what differs between layers in the stacked `layer_parameters` at the start."""

    def shared_parameters(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """Parameters outside of the layers, by name; layers take theirs by an index on axis 0."""
        return {}

    # How it describes itself.

    def num_parameters(self) -> int:
        """Parameters beyond the plain model's."""
        return 0

    def projection_flops(self, seq_len: int) -> int:
        """Forward FLOPs of one row in the mechanism's own matrices."""
        return 0

    def read_flops(self, seq_len: int) -> int:
        """Forward FLOPs of one row that reading entries or streams costs, without matrices."""
        return 0

    def describe(self) -> str:
        """A few words for the first screen."""
        return "no depth"

    def visible_slots(self) -> list[int]:
        """Slots that each layer's attention reads beside the sequence."""
        return [0] * self.config.num_layers

    def slot_labels(self) -> list[str]:
        """One name per entry that attention reads, for pictures; empty if it reads none."""
        return []

    def own_softmax_labels(self) -> list[str]:
        """One name per entry that an attention over depth alone reads; empty if there is none."""
        return []
