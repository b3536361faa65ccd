"""Checks of arguments: what is converted, and errors that name argument, expectation, value."""

import math
import numbers
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np


def fail(name: str, expected: str, got: Any) -> NoReturn:
    """Raises the ValueError of a bad argument."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def check_array(name: str, x: Any, shape: tuple[int | str, ...], dtype: Any = None) -> None:
    """Checks rank, the dimensions given as int (a str only names one), and the dtype.

    Lists are refused: nothing says of what dtype they are.
    """
    wanted = "[" + ", ".join(map(str, shape)) + "]"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        fail(name, f"an array {wanted}", type(x).__name__)
    if len(x.shape) != len(shape):
        fail(name, f"rank {len(shape)}, {wanted}", f"rank {len(x.shape)}, {list(x.shape)}")
    if any(isinstance(n, int) and n != m for n, m in zip(shape, x.shape, strict=True)):
        fail(name, wanted, list(x.shape))
    if dtype is not None and x.dtype != dtype:
        fail(name, f"dtype {dtype}, as query", x.dtype)


def to_jax(x: Any) -> Any:
    """A NumPy array as a JAX array, which traced numbers can index; anything else as it is."""
    return jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x


def check_integers(name: str, x: Any, shape: tuple[int | str, ...]) -> jax.Array:
    """x as int32. Values that do not fit are an error, unless x is traced: then they wrap."""
    check_array(name, x, shape)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        fail(name, "an integer dtype", x.dtype)
    bounds = np.iinfo(np.int32)
    if is_concrete(x) and np.iinfo(x.dtype).max > bounds.max:
        check_range(name, x, bounds.min, bounds.max)
        x = np.asarray(x).astype(np.int32)
    return jnp.asarray(x, jnp.int32)


def check_range(name: str, x: Any, low: int, high: int, where: Any = True) -> None:
    """Raises unless the entries of a concrete x, those at `where`, are in low … high."""
    x = np.asarray(x)
    outside = ((x < low) | (x > high)) & np.asarray(where)
    if outside.any():
        fail(name, f"values in {low} … {high}", x[np.broadcast_to(outside, x.shape)].flat[0])


def is_concrete(*arrays: Any) -> bool:
    """Whether the values are known here and now: not traced, not on other processes' devices."""
    return not any(
        isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
        or not getattr(x, "is_fully_addressable", True)
        for x in arrays
    )


def plain(x: Any) -> Any:
    """A concrete scalar of JAX or NumPy as Python's int, float or bool; anything else as it is."""
    is_array = isinstance(x, np.ndarray | np.generic | jax.Array) and is_concrete(x)
    return x.item() if is_array and x.ndim == 0 else x


def check_int(name: str, x: Any, minimum: int) -> int:
    """A static int, also given as a scalar of JAX or NumPy."""
    value = plain(x)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        fail(name, f"an int >= {minimum}", repr(x))
    return value


def check_number(name: str, x: Any) -> float:
    """A static finite number, also given as a scalar of JAX or NumPy (bfloat16, too)."""
    value = plain(x)
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        fail(name, "None or a finite number", repr(x))
    return float(value)


def check_bool(name: str, x: Any) -> bool:
    """A static bool, also given as a scalar of JAX or NumPy."""
    if not isinstance(plain(x), bool):
        fail(name, "a bool", repr(x))
    return plain(x)
