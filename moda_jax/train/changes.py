"""Which settings of a resumed run are not those of its checkpoint, and what that does."""

from collections.abc import Mapping
from typing import Any

from moda_jax.config import Config, dataclass_from_json, to_json
from moda_jax.config.files import flatten
from moda_jax.train.optimizer import learning_rate_schedule

_CURVE = "the learning rate goes on from this step's place on the new curve"
_MOMENTS = "from this step on; the optimizer's moments stay as they are"
_ROUNDING = "the same function, computed in another way: other rounding"
_VALIDATION = "validation losses before and after this step are of different batches"
_WRITTEN = "what is written, not what is trained"
_SAME_TEXT = "the same documents, found elsewhere"

EFFECTS = {
    "optimizer.learning_rate": _CURVE,
    "optimizer.schedule": _CURVE,
    "optimizer.decay_fraction": _CURVE,
    "optimizer.final_fraction": _CURVE,
    "optimizer.warmup_steps": _CURVE,
    "steps": _CURVE,
    "optimizer.beta1": _MOMENTS,
    "optimizer.beta2": _MOMENTS,
    "optimizer.eps": _MOMENTS,
    "optimizer.momentum": _MOMENTS,
    "optimizer.weight_decay": "from this step on",
    "optimizer.clip_norm": "from this step on",
    "optimizer.z_loss": "from this step on another loss is minimised",
    "accumulation_steps": "the same batches in other parts: other rounding",
    "mesh": _ROUNDING,
    "execution": _ROUNDING,
    "eval_every": "validations come at other steps",
    "eval_batches": _VALIDATION,
    "checkpoint_every": "checkpoints come at other steps",
    "keep_last": "from the next checkpoint on",
    "max_skipped_steps": "from this step on",
    "init_from": "no effect: the run goes on from its own checkpoint",
    "compilation_cache": "where compiled programs are kept, not what they compute",
    "prepared_dir": _SAME_TEXT,
    "log_every": _WRITTEN,
    "profile": _WRITTEN,
    "sample_prompt": _WRITTEN,
    "sample_tokens": _WRITTEN,
    "wandb": _WRITTEN,
    "data.source": _SAME_TEXT,
    "data.text_field": _SAME_TEXT,
    "data.tokenizer": "the same tokenizer, found elsewhere",
    "data.eos_token": "the same token under another name",
    "data.sources": _SAME_TEXT,
    "data.validation": _SAME_TEXT,
    "data.validation_fraction": "the same documents are held out",
    "data.on_error": "from this step on",
    "batch_size": "the same rows in the same order, so many a step",
}
"""By name of a setting, or of its group."""

REFUSED = {
    "model",
    "optimizer.name",
    "seed",
    "data.seq_len",
    "data.packing",
    "data.shuffle_tokens",
}
"""Settings, or groups, that a checkpoint does not let be changed: the model would be another, the
optimizer would find the moments of another, or the data could not go on exactly. A change of `data`
that gives other texts is refused too."""

PLACE = {"name", "output_dir"}
"""Where the folder is, which it knows itself."""


def describe_changes(saved: Mapping[str, Any], config: Config, step: int) -> list[str]:
    """A line for every setting that is not as it was when the checkpoint of `step` was written.

    Args:
        saved: the checkpoint's config, as nested dicts.
        config: what the run goes on with.
        step: optimizer steps done.
    """
    before = dataclass_from_json(saved, Config)
    there, here = flatten(to_json(before)), flatten(to_json(config))
    changed = [name for name in here if there.get(name) != here[name] and name not in PLACE]
    values = {name: f"{name} {there[name]} -> {here[name]}" for name in changed}
    if step >= config.steps and changed:
        return [f"nothing is trained, so the run's settings stay: {', '.join(values.values())}"]
    lines = [f"changed at step {step}: {values[name]}: {_effect(name)}" for name in changed]
    if any(_effect(name) == _CURVE for name in changed):
        lines.append(_describe_curve(before, config, step))
    return lines


def _effect(name: str) -> str:
    return EFFECTS.get(name) or EFFECTS.get(name.partition(".")[0]) or "from this step on"


def _describe_curve(before: Config, config: Config, step: int) -> str:
    old, new = (
        float(learning_rate_schedule(run.optimizer, steps=run.steps)(step))
        for run in (before, config)
    )
    return f"learning rate of step {step + 1}: {new:.3e}, on the old curve {old:.3e}"
