"""Checkpoints in Hugging Face's format: a folder of theirs into a run of ours, and back."""

from pathlib import Path


def modeling_source() -> Path:
    """The PyTorch model that goes along with an exported MoDA model."""
    return Path(__file__).with_name("modeling_moda.py")
