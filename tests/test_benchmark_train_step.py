"""benchmarks/train_step.py on tiny models, and its search for the largest batch."""

import contextlib
import json
from pathlib import Path

import jax
import pytest

from benchmarks import train_step

SMOKE = ["--smoke", "--seq-len", "16", "--steps", "1"]


@pytest.mark.slow
def test_smoke_run_writes_both_files(tmp_path, capsys):
    output = tmp_path / "deep" / "result"
    arguments = [*SMOKE, "--batch-size", "2", "--remat", "full", "--slot-gradients", "add"]
    assert train_step.main([*arguments, "--output", str(output)]) == 0
    record = json.loads(output.with_suffix(".json").read_text())
    assert [result["name"] for result in record["results"]] == list(train_step.CONFIGS)
    assert "--slot-gradients add" in record["command"]
    for result in record["results"]:
        assert result["tokens_per_second"] == pytest.approx(2 * 16 / result["step_ms"] * 1e3)
        assert result["attention"] == "xla"
        assert result["compiled_bytes"] > 4 * 3 * result["parameters"]  # weights, two moments
    table = output.with_suffix(".md").read_text()
    assert record["command"] in table
    assert table.count("| moda_700m_row") == 2
    assert "| 100.0% |" in capsys.readouterr().out


def test_longest_kernels(monkeypatch, capsys):
    """Of a trace with a stream and another line; on a CPU the real profiler may crash."""
    events = "".join(
        f"events {{ metadata_id: {kind} duration_ps: {ms}000000000 }}"
        for kind, ms in ((1, 2), (2, 5), (1, 4))
    )
    names = "".join(
        f'event_metadata {{ key: {kind} value {{ id: {kind} name: "{name}" }} }}'
        for kind, name in ((1, "moda_forward(float*)"), (2, "gemm"))
    )
    space = f"""planes {{ name: "/device:GPU:0" {names}
        lines {{ name: "Stream #1" {events} }} lines {{ name: "XLA Ops" {events} }} }}"""
    space = jax.profiler.ProfileData.text_proto_to_serialized_xspace(space)

    @contextlib.contextmanager
    def trace(folder):
        yield
        (Path(folder) / "host.xplane.pb").write_bytes(space)

    monkeypatch.setattr(jax.profiler, "trace", trace)
    arguments = [*SMOKE, "--batch-size", "2", "--configs", "olmo2_700m_36", "--kernels", "1"]
    assert train_step.main(arguments) == 0
    head, line, _ = capsys.readouterr().out.splitlines()
    assert head == "olmo2_700m_36: kernels take 11.0 ms"
    assert line.split() == ["6.00", "ms", "2x", "moda_forward"]


def test_no_kernels(tmp_path):
    assert train_step.kernel_table("m", tmp_path, 3) == "m: the profiler saw no kernels of a GPU"


def test_a_config_that_fails_does_not_stop_the_others(capsys):
    arguments = [*SMOKE, "--batch-size", "2", "--configs", "missing,moda_700m_row3"]
    assert train_step.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("missing: ModuleNotFoundError: ")
    assert captured.err.count("\n") == 1
    assert "moda_700m_row3" in captured.out


def test_a_device_without_an_account_of_its_memory_needs_a_batch_size(capsys, monkeypatch):
    class Device:
        @staticmethod
        def memory_stats():
            return None

    monkeypatch.setattr(train_step.jax, "local_devices", lambda: [Device])
    assert train_step.main([*SMOKE, "--configs", "moda_700m_row3"]) == 1
    assert "batch_size: expected a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("needed", "limit", "expected"),
    [
        (lambda n: 10 + 5 * n, 100, 18),
        (lambda n: 10 + 5 * n, 15, 1),
        (lambda n: 10 + 5 * n + n * n, 100, 7),  # the line is above the border
        (lambda n: 10 + 4 * n - n // 3, 100, 24),  # and below
    ],
)
def test_largest_batch(needed, limit, expected):
    sizes = []

    def counted(size):
        sizes.append(size)
        return needed(size)

    assert train_step.largest_batch(counted, limit) == expected
    assert needed(expected) <= limit < needed(expected + 1)
    assert len(set(sizes)) <= 9


def test_largest_batch_when_nothing_fits():
    with pytest.raises(ValueError, match="batch_size: one row needs 15 bytes, 14 are there"):
        train_step.largest_batch(lambda n: 10 + 5 * n, 14)
