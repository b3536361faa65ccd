"""The README's library example runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_library_example():
    example, loading, custom = re.findall(
        r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    compile(loading, str(README), "exec")  # needs a finished run: test_trainer.py has one
    assert len(example.splitlines()) <= 20
    assert len(custom.splitlines()) <= 20
    exec(compile(custom, str(README), "exec"), {})
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["out"].shape == (2, 16, 4, 32)
    assert names["logits"].shape == (1, 16, 320)
    assert [len(row) for row in names["tokens"]] == [8, 8]
