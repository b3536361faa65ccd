"""Preparation and loading of text, without a model: tokens per second.

    python -m benchmarks.data [--workers 1,2] [--megabytes 64] [--output docs/benchmarks/data]

The text is the Python standard library's: cut into short documents of about 400 bytes, and joined
into books of about 500 KB. Each is prepared with bytes and with a 16K byte-level BPE that is
trained on it, by each number of worker processes, beside what the tokenizer alone encodes on one
core. Then one process reads batches of 131,072 tokens from the shards, rows of 512 and of 4096.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moda_jax.config import DataConfig
from moda_jax.data.loader import load_data
from moda_jax.data.prepare import prepare
from moda_jax.data.tokenizer import Tokenizer, load_tokenizer
from moda_jax.data.tokenizer_training import train_tokenizer
from moda_jax.data.units import list_stdlib

_BATCH_TOKENS = 1 << 17
_BYTES = {"short": 400, "book": 500_000}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Of one tokenizer and kind of document; tokens per second where nothing else is said."""

    documents: str
    tokenizer: str
    megabytes: float
    tokens: int
    alone: float
    """The tokenizer on one core, text in memory."""
    prepared: dict[int, float]
    """By the number of workers."""
    loaded: dict[int, float]
    """By row length."""
    first_batch: dict[int, float]
    """Seconds from opening prepared text to the first batch, by row length."""


def main(argv: list[str] | None = None) -> int:
    """Returns 0."""
    args = _arguments().parse_args(argv)
    workers = [int(count) for count in args.workers.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, size in _BYTES.items():
            source = folder / f"{kind}.jsonl"
            write_text(source, size, int(args.megabytes * 1e6))
            bpe = folder / f"{kind}.json"
            train_tokenizer([str(source)], bpe, vocab_size=args.vocab_size)
            for label, tokenizer in (("bytes", "bytes"), ("BPE 16K", str(bpe))):
                result = measure(kind, label, source, tokenizer, workers, folder)
                results.append(result)
                print(row(result), flush=True)
    if args.output:
        write(args, results)
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workers", default="1,2", help="numbers of processes that prepare")
    parser.add_argument("--megabytes", type=float, default=64, help="of text, each kind")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    return parser


def write_text(path: Path, document_bytes: int, total_bytes: int) -> None:
    """A .jsonl of documents of about `document_bytes`, the standard library again and again."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in list_stdlib()]
    text = "\n".join(texts)
    written = start = 0
    with path.open("w", encoding="utf-8") as file:
        while written < total_bytes:
            part = text[start : start + document_bytes]
            start = start + len(part) if len(part) == document_bytes else written % 997
            file.write(json.dumps({"text": part}) + "\n")
            written += len(part)


def measure(
    kind: str, label: str, source: Path, tokenizer: str, workers: list[int], folder: Path
) -> Measurement:
    """Prepares and loads one text."""
    prepared = {}
    output = folder / "none"
    for count in workers:
        output = folder / f"{kind}-{label}-{count}".replace(" ", "")
        start = time.perf_counter()
        summary = prepare(str(source), output, tokenizer=load_tokenizer(tokenizer), workers=count,
                          say=lambda line: None)  # fmt: skip
        prepared[count] = summary.tokens / (time.perf_counter() - start)
    config = DataConfig(source=str(output), tokenizer=tokenizer)
    loaded, first = {}, {}
    for seq_len in (512, 4096):
        loaded[seq_len], first[seq_len] = _load(dataclasses.replace(config, seq_len=seq_len))
    alone = _encode_alone(source, load_tokenizer(tokenizer))
    megabytes = source.stat().st_size / 1e6
    return Measurement(kind, label, megabytes, summary.tokens, alone, prepared, loaded, first)


def _encode_alone(source: Path, tokenizer: Tokenizer, at_most: int = 1 << 24) -> float:
    texts, size = [], 0
    for text in _texts(source):
        texts.append(text)
        size += len(text)
        if size > at_most:
            break
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start = time.perf_counter()
    count = sum(map(len, tokenizer.encode_batch(texts)))
    return count / (time.perf_counter() - start)


def _texts(source: Path) -> Iterator[str]:
    with source.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _load(config: DataConfig, seconds: float = 5.0) -> tuple[float, float]:
    """(tokens per second, seconds to the first batch)."""
    start = time.perf_counter()
    data = load_data(config, batch_size=_BATCH_TOKENS // config.seq_len, vocab_size=1 << 16, seed=0,
                     cache_dir=Path("unused"))  # fmt: skip
    next(data.train)
    first = time.perf_counter() - start
    start, count = time.perf_counter(), 0
    for batch in itertools.takewhile(lambda _: time.perf_counter() - start < seconds, data.train):
        count += int(np.count_nonzero(batch["segment_ids"]))
    speed = count / (time.perf_counter() - start)
    data.train.close()
    return speed, first


HEADER = (
    "| documents | tokenizer | MB | tokenizer alone | prepared (workers: tokens/s) | of one core's "
    "| loaded, T 512 | loaded, T 4096 | first batch, s |\n|---|---|---|---|---|---|---|---|---|"
)


def row(result: Measurement) -> str:
    """A line of the table under `HEADER`."""
    prepared = ", ".join(f"{count}: {speed:,.0f}" for count, speed in result.prepared.items())
    share = result.prepared[min(result.prepared)] / min(result.prepared) / result.alone
    return (
        f"| {result.documents} | {result.tokenizer} | {result.megabytes:.0f} | {result.alone:,.0f} "
        f"| {prepared} | {share:.0%} | {result.loaded[512]:,.0f} | {result.loaded[4096]:,.0f} | "
        f"{max(result.first_batch.values()):.2f} |"
    )


def write(args: argparse.Namespace, results: list[Measurement]) -> None:
    """OUTPUT.json has everything, OUTPUT.md the table and the command."""
    command = f"python -m benchmarks.data --workers {args.workers} --megabytes {args.megabytes:g}"
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    record = {
        "command": command,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "peak_rss_mb_of_a_process": peak / 1024,
        "results": [dataclasses.asdict(result) for result in results],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = (
        f"# Preparing and loading text\n\n`{command}`, {os.cpu_count()} cores; tokens per second. "
        f"Largest process: {peak / 1024:,.0f} MB.\n\n" + "\n".join([HEADER, *map(row, results)])
    )
    args.output.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
