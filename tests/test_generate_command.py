"""`moda-jax generate`: what it prints, when it stops, and how it ends."""

import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moda_jax.data.tokenizer import ByteTokenizer, TextStream, decode_continuation
from moda_jax.model import generation
from moda_jax.train import generate_command, trained
from tests.corpora import FUZZ
from tests.models import SMALL, random_model
from tests.runs import save_run

MODEL = {"vocab_size": 257, "num_layers": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose best checkpoint is not its newest."""
    model = random_model(dataclasses.replace(SMALL, **MODEL))
    return save_run(tmp_path_factory.mktemp("saved") / "run", model, {4: 1.0, 8: 2.0})


@pytest.fixture
def drawn(monkeypatch):
    """Replaces the drawing: `drawn(text)` is what the model says; returns the calls' settings."""

    def replace(content: bytes, *, interrupt=False):
        calls = []

        def stream(model, prompt, **settings):
            calls.append({"prompt": prompt, **settings})
            yield from content
            if interrupt:
                raise KeyboardInterrupt

        monkeypatch.setattr(generation, "stream", stream)
        return calls

    return replace


@pytest.fixture
def generate(capfd):
    """Runs the command; its status and what it wrote."""

    def call(*arguments):
        status = generate_command.main([str(x) for x in arguments])
        return (status, *capfd.readouterr())

    return call


def text_of(run, step, prompt, **settings):
    model, tokenizer, _ = trained.load_trained(run, step=step)
    tokens = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    new = generation.stream(model, tokens, stop_tokens=(tokenizer.eos_id,), **settings)
    return decode_continuation(tokenizer, tokens, list(new))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"temperature": 0.0}, marks=pytest.mark.slow),
        {"temperature": 1.5, "top_k": 5, "top_p": 0.7, "seed": 4},
    ],
)
def test_the_stream_is_what_generate_draws(settings):
    model = random_model(SMALL)
    prompt = [3, 1, 4, 1, 5]
    (expected,) = generation.generate(model, [prompt], max_new_tokens=9, **settings)
    assert list(generation.stream(model, prompt, max_new_tokens=9, **settings)) == expected
    stop = expected[4]
    stopped = list(
        generation.stream(model, prompt, max_new_tokens=9, stop_tokens=[stop], **settings)
    )
    assert stopped == expected[: expected.index(stop) + 1]
    assert list(generation.stream(model, prompt, max_new_tokens=0)) == []


def test_the_stream_checks_before_it_draws():
    model = random_model(SMALL)
    with pytest.raises(ValueError, match="top_k: expected None or 1 … 37, got 0"):
        generation.stream(model, [1], max_new_tokens=1, top_k=0)
    with pytest.raises(ValueError, match=f"max_new_tokens: expected at most {2**31 - 128} after"):
        generation.stream(model, [1], max_new_tokens=2**31 - 127)
    generation.stream(model, [1], max_new_tokens=2**31 - 128)


def test_it_prints_the_prompt_and_what_the_chosen_checkpoint_adds(run, generate):
    settings = {"max_new_tokens": 12, "temperature": 0.7, "seed": 5}
    options = ("--max-tokens", 12, "--temperature", 0.7, "--seed", 5)
    newest, best = (text_of(run, step, "def ", **settings) for step in ("newest", "best"))
    assert newest != best
    assert generate(run, "--prompt", "def ", *options) == (0, f"def {newest}\n", "")
    assert generate(run, "--prompt", "def ", *options, "--step", 8)[1] == f"def {newest}\n"
    assert generate(run, "--prompt", "def ", *options, "--step", "best", "--no-echo") == (
        0, f"{best}\n", ""
    )  # fmt: skip


def test_options_reach_the_sampler(run, generate, drawn):
    calls = drawn(b"ok")
    options = ("--top-k", 3, "--top-p", 0.5, "--seed", 9, "--temperature", 0.5)
    assert generate(run, "--prompt", "é", *options, "--max-tokens", 7) == (0, "éok\n", "")
    assert calls == [
        {"prompt": [256, *"é".encode()], "max_new_tokens": 7, "temperature": 0.5, "top_k": 3,
         "top_p": 0.5, "stop_tokens": (256,), "seed": 9}
    ]  # fmt: skip
    generate(run, "--prompt", "a", "--no-document-start")
    assert calls[1]["prompt"] == [97]


def test_several_prompts_are_each_as_if_alone(run, generate, drawn):
    calls = drawn(b"!")
    status, out, err = generate(run, "--prompt", "a", "--prompt", "")
    assert (status, out, err) == (0, "[1/2]\na!\n[2/2]\n!\n", "")
    assert [call["prompt"] for call in calls] == [[256, 97], [256]]
    assert calls[0]["seed"] == calls[1]["seed"]


def test_a_prompt_from_a_file_or_stdin(run, generate, drawn, tmp_path, monkeypatch):
    calls = drawn(b"")
    (tmp_path / "prompt.txt").write_bytes("ü\n".encode())
    assert generate(run, "--prompt-file", tmp_path / "prompt.txt")[0] == 0
    stdin = types.SimpleNamespace(buffer=io.BytesIO(b"x"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert generate(run, "--prompt-file", "-")[0] == 0
    assert [call["prompt"] for call in calls] == [[256, *"ü\n".encode()], [256, 120]]


def test_the_document_ends_before_the_limit(run, generate, drawn, monkeypatch):
    """The end-of-document token stops the stream and is not shown."""

    def stream(model, prompt, *, stop_tokens, **settings):
        yield from [104, 105, *stop_tokens]

    monkeypatch.setattr(generation, "stream", stream)
    assert generate(run, "--prompt", "a")[1] == "ahi\n"


def test_characters_arrive_whole(run, drawn, monkeypatch):
    drawn("a東🙂é".encode())
    pieces = []
    monkeypatch.setattr(generate_command, "_show", pieces.append)
    assert generate_command.main([str(run), "--prompt", "x"]) == 0
    assert [piece for piece in pieces if piece] == ["x", "a", "東", "🙂", "é", "\n"]


@FUZZ
@given(st.one_of(st.binary(max_size=80), st.text(max_size=30).map(str.encode)), st.text(max_size=4))
def test_pieces_are_the_whole_text(content, prompt):
    """Of any bytes, broken characters included, and whatever was before."""
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, tokenizer.encode(prompt))
    pieces = [stream.push(token) for token in content] + [stream.finish()]
    assert "".join(pieces) == content.decode("utf-8", errors="replace")


def test_pieces_of_a_tokenizer_that_strips_the_first_space():
    model = tokenizers.models.BPE(
        {"▁": 0, "▁a": 1, "b": 2, "<0xC3>": 3, "<0xA9>": 4, "<unk>": 5}, [],
        byte_fallback=True, unk_token="<unk>",
    )  # fmt: skip
    library = tokenizers.Tokenizer(model)
    library.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer = types.SimpleNamespace(decode=library.decode)
    new = [1, 3, 4, 3, 4, 1, 2, 1]
    for prompt in ([1], [2, 3, 4]):
        stream = TextStream(tokenizer, prompt)
        pieces = [stream.push(token) for token in new]
        assert pieces == [" a", "", "é", "", "é", " a", "b", " a"]
        assert "".join(pieces) == decode_continuation(tokenizer, prompt, new)


def test_a_terminal_gets_control_characters_spelled_out(run, drawn, monkeypatch):
    drawn(b"\x1b[2Jok")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    assert generate_command.main([str(run), "--prompt", "é"]) == 0
    assert out.buffer.getvalue() == b"\\xe9\\x1b[2Jok\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [("chat_template.jinja", "{{ x }}"), ("tokenizer_config.json", '{"chat_template": ""}')],
)
def test_a_chat_template_is_named_and_not_applied(run, generate, drawn, tmp_path, file, content):
    calls = drawn(b"ok")
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "huggingface").mkdir()
    (copy / "huggingface" / "tokenizer_config.json").write_text("{}")
    assert generate(copy, "--prompt", "a")[2] == ""
    (copy / "huggingface" / file).write_text(content)
    status, out, err = generate(copy, "--prompt", "a")
    assert (status, out, err.count("\n")) == (0, "aok\n", 1)
    assert err.startswith(f"note: {copy / 'huggingface' / file} is a chat template, which is not")
    assert calls[0] == calls[1]


def test_a_cache_that_does_not_fit_is_one_line(run, generate, monkeypatch):
    def stream(model, prompt, **settings):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        yield

    monkeypatch.setattr(generation, "stream", stream)
    status, out, err = generate(run, "--prompt", "a", "--max-tokens", 1000)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --max-tokens: expected a cache that fits in memory, got 1000")


def test_ctrl_c_ends_with_one_line(run, generate, drawn):
    drawn(b"half", interrupt=True)
    assert generate(run, "--prompt", "a ") == (130, "a half\n", "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "--prompt: expected a text to continue, or --prompt-file FILE"),
        (["RUN", "--prompt", "a", "--prompt-file", "b"], "--prompt-file: expected no --prompt"),
        (["RUN", "--prompt-file", "none"], "--prompt-file: expected a text file, got 'none': No"),
        (["RUN", "--prompt-file", "BINARY"], "--prompt-file: expected UTF-8 text"),
        (["RUN", "--prompt", "\udcff"], "--prompt: expected a text that UTF-8 can encode"),
        (["RUN", "--prompt", "a", "--max-tokens", "0"], "--max-tokens: expected a number >= 1"),
        (["RUN", "--prompt", "a", "--max-tokens", "3000000000"], "--max-tokens: expected at most"),
        (["RUN", "--prompt", "a", "--temperature", "-1"], "--temperature: expected a number >= 0"),
        (["RUN", "--prompt", "a", "--temperature", "1e39"], "--temperature: expected a number >="),
        (["RUN", "--prompt", "a", "--top-p", "2"], "--top-p: expected None or 0 < top_p <= 1"),
        (
            ["RUN", "--prompt", "a", "--temperature", "0", "--top-k", "3"],
            "--top-k: expected none beside --temperature 0, which draws nothing, got 3",
        ),
        (
            ["RUN", "--prompt", "a", "--step", "7"],
            '--step: expected "newest", "best" or one of [4, 8]',
        ),
        (["RUN", "--prompt", "a", "--step", "last"], "--step: expected newest, best or a step's"),
        (["RUN", "--prompt", "", "--no-document-start"], "--prompt: expected a text of at least"),
        (["RUN", "--chat"], "--chat: chat templates are not applied here"),
        (["RUN", "--prompt", "a", "--chat_template=x"], "--chat-template: chat templates are not"),
        (["nothing", "--prompt", "a"], "RUN: expected a run's folder"),
        (["RUN", "--promt", "a"], "Unrecognized options: --promt"),
    ],
)
def test_bad_input_is_one_line(run, generate, tmp_path, arguments, message):
    (tmp_path / "binary").write_bytes(b"\xff")
    names = {"RUN": str(run), "BINARY": str(tmp_path / "binary")}
    status, out, err = generate(*(names.get(argument, argument) for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")


def test_a_damaged_checkpoint_is_named_and_passed_over(run, generate, drawn, tmp_path):
    drawn(b"ok")
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoints" / "8" / "params" / "_METADATA").write_bytes(b"")
    status, out, err = generate(copy, "--prompt", "a")
    assert (status, out, err.count("\n")) == (0, "aok\n", 1)
    assert err.startswith("warning: ")
    assert "checkpoint 8 is damaged" in err
    assert "checkpoint 4 is loaded instead" in err


def test_a_checkpoint_that_the_training_removes_meanwhile(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy")
    read = trained.read_run

    def remove_first(folder):
        if folder.name == "8":
            shutil.rmtree(folder)
        return read(folder)

    monkeypatch.setattr(trained, "read_run", remove_first)
    assert trained.load_trained(copy).step == 4
    with pytest.raises(ValueError, match=r'step: expected "newest", "best" or one of \[4\], got 8'):
        trained.load_trained(copy, step=8)


def start(run, *arguments):
    program = "import sys; from moda_jax.cli import command; sys.exit(command())"
    return subprocess.Popen(
        [sys.executable, "-c", program, "generate", str(run), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_reader_that_goes_away_and_a_signal(run):
    """In processes of their own: quiet after a broken pipe, one line after SIGINT."""
    endless = ("--prompt", "a", "--max-tokens", "100000", "--temperature", "2")
    with start(run, *endless) as process:
        assert process.stdout.read(3)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    with start(run, *endless) as process:
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, err) == (130, b"interrupted\n")
    assert out.endswith(b"\n")
    out.decode("utf-8")  # no half character
