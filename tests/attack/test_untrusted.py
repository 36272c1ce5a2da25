"""Files and texts from strangers: each is read or refused in one line, without a crash, a hang or a large allocation.

The short form draws few inputs; the exhaustive one (marker ``slow``) draws 2,000 of each class. Both are seeded.
"""

import contextlib
import csv
import errno
import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from noisysam import cli
from noisysam.core.errors import UserError
from noisysam.core.text import csv_cell, inert, printable
from noisysam.core.untrusted import check_file, unusable
from noisysam.data.datasets import ARRAYS, load_npz, read_npz
from noisysam.noise import labels as label_files
from noisysam.noise.observed import _read_released
from noisysam.noise.tables import read_labels
from noisysam.runs.config import RunConfig, validate
from noisysam.runs.record import RunFolder
from noisysam.studies import study_file

LIMIT = 10  # seconds of processor time that any input may take
WAIT = 120  # seconds on the clock, in which even a busy machine gets so far: more is waiting for something

COUNTS = [50, pytest.param(2000, marks=pytest.mark.slow)]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Fail an input that takes too long."""

    def stop(*_: object) -> None:
        raise AssertionError(f"no end within {LIMIT} s of work, or {WAIT} s of waiting")

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, LIMIT), signal.ITIMER_REAL: (signal.SIGALRM, WAIT)}
    before = {number: signal.signal(number, stop) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def refused(call: Callable[[], object]) -> bool:
    """Whether a call ends with a UserError of one line; other exceptions are faults."""
    with limited():
        try:
            call()
        except UserError as error:
            message = str(error)
            assert len(message.splitlines()) == 1, message
            assert printable(message) == message
            message.encode()
            return True
    return False


def attack(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Check ``count`` drawn inputs, the same ones each time."""
    checked = given(strategy)(check)
    settings(
        max_examples=count, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )(checked)()  # fmt: skip


# study files

STUDY = """\
include: other.yaml
base: {dataset: digits, model: resnet8, noise: 0.4, epochs: 2}
grid: {noise: [0.2, 0.4], lr: [0.1]}
rows:
  SGD: {opt: sgd}
  SAM: &sam {opt: sam, rho: 0.1, noise: {0.4: {rho: 0.05}}}
  again: {<<: *sam, seeds: [0]}
seeds: [0, 1]
claims: [{better: SAM, than: SGD}]
"""
WORDS = [
    "base", "grid", "rows", "seeds", "include", "claims", "noise", "rho", "opt", "sam", "epochs", "SAM", "<<", "*sam",
    "&sam", "*x", "&x", "{", "}", "[", "]", ",", ":", "? ", "- ", "|", ">", "!!", "!!python/object:os.system", "!!int",
    "!!set", "!!binary", "!!timestamp", "%YAML 9.9", "---", "...", "#", "'", '"', "\\ud800", "\\0", "\n", "\n  ", "\t",
    "1e999", "-0", "0x" + "f" * 2000, "9" * 5000, "1:1:1:1", "2020-99-99", "~", ".nan", "\x07", "\u2028", "é",
    "../../x",
    "/dev/zero",
]  # fmt: skip


def trees() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
    inner = st.recursive(
        leaves, lambda part: st.lists(part, max_size=4) | st.dictionaries(leaves, part, max_size=4), max_leaves=12
    )
    names = st.sampled_from(["base", "grid", "rows", "seeds", "include", "claims", "retries", "published"])
    return st.dictionaries(names, inner, max_size=6)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """A sound file with pieces that were cut, doubled or replaced."""
    text = STUDY
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + draw(st.sampled_from(WORDS) | st.just(text[start : start + 40])) + text[stop:]
    return text.encode()


def dumped(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass")


def yaml_files() -> st.SearchStrategy[bytes]:
    joined = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join).map(lambda t: t.encode(errors="replace"))
    return edited() | trees().map(dumped) | joined | st.binary(max_size=60)


@pytest.mark.parametrize("count", COUNTS)
def test_study_files(count: int, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            study = study_file.read(path)
            for values in study.rows.values():
                validate({**study.base, **values})

        refused(read)

    attack(count, yaml_files(), check)
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "merged": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
    "deep list": "base: " + "[" * 50_000,
    "deep mapping": "base: " + "{a: " * 50_000,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(500)),
    "an alias of itself": "base: &x {a: *x}\nrows: {a: {}}",
    "a list of itself": "base: &x [*x]\nrows: {a: {}}",
    "many keys": "base:\n" + "".join(f"  a{n}: 1\n" for n in range(24_000)),
    "a long number": f"base: {{epochs: {'9' * 5000}}}\nrows: {{a: {{}}}}",
    "a long hexadecimal number": f"base: {{epochs: 0x{'f' * 5000}}}\nrows: {{a: {{}}}}",
    "half a surrogate pair": 'base: {dataset: "\\ud800"}\nrows: {a: {}}',
    "null character": 'base: {dataset: "npz:a\\0b"}\nrows: {a: {}}',
    "no date": "base: {dataset: 2020-99-99}\nrows: {a: {}}",
    "a tag of Python": "base: !!python/object/apply:os.system ['touch here']\nrows: {a: {}}",
    "too large": "#" * 2**18 + "\n",
    "a key of a list": "? [a, b]\n: 1",
    "an empty number": "!!int",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(BOMBS[name])
    assert refused(lambda: study_file.read(path))
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


ODD_VALUES = [[], {}, [[]], {"a": []}, {"q": {}}, True, -1, 1.5, 10**9, "x", "", "a,b", "1,x", [1, "x"], [None]]


@pytest.mark.parametrize("beside", [{}, {"preset": "published", "method": "elr"}, {"preset": "foret"}])
def test_every_field_with_values_of_other_types(beside: dict[str, Any]) -> None:
    for name in RunConfig.model_fields:
        for value in ODD_VALUES:
            refused(lambda name=name, value=value: validate({"dataset": "digits", **beside, name: value}))


# npz files


def npz(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def npy(header: str, data: bytes, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    text = header.encode("latin1", errors="replace")
    size = len(text) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version == b"\x01\x00" else 4, "little") + text + data


DTYPES = ["|u1", "<i8", ">i4", "|O", "<U5", "|S0", "<U0", "|V3", "<f8", "<c16", "|b1", "<M8[ns]", "<m8", "x", "", "O8"]


@st.composite
def members(draw: st.DrawFn) -> bytes:
    sizes = st.integers(0, 12) | st.sampled_from([-1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30])
    shape: Any = draw(st.tuples() | st.tuples(sizes) | st.tuples(sizes, sizes) | st.tuples(*[sizes] * 4))
    descr: Any = draw(st.sampled_from(DTYPES) | st.just([("a", "<i4"), ("b", "|O")]))
    header = draw(
        st.just(repr({"descr": descr, "fortran_order": draw(st.booleans()), "shape": shape}))
        | st.sampled_from(["{" * 3000, "(" * 9000, "{}", "{'descr': 1}", "__import__('os')", "", "9" * 9000])
    )  # fmt: skip
    version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x00\x00", b"\xff\xff"]))
    length = draw(st.none() | st.sampled_from([0, 1, 65535]))
    content = npy(header + "\n", draw(st.binary(max_size=64)), version, length)
    return draw(st.just(content) | st.binary(max_size=20).map(lambda junk: junk + content))


@st.composite
def npz_files(draw: st.DrawFn) -> bytes:
    names = st.sampled_from(
        [*(f"{a}.npy" for a in ARRAYS), "class_names.npy", "train_images", "../../evil.npy", "/a.npy"]
    )
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    chosen = [(f"{a}.npy", draw(members())) for a in ARRAYS] if draw(st.booleans()) else []
    content = npz(chosen + draw(st.lists(st.tuples(names, members()), max_size=3)), method)
    place = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(["whole", "cut", "flipped"]))
    if how == "cut":
        return content[:place]
    return content if how == "whole" else content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("count", COUNTS)
def test_npz_files(count: int, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for name in ARRAYS:
            with contextlib.suppress(UserError), limited():
                assert read_npz(path, (name,))[name].nbytes <= 1032 * len(content)
        refused(lambda: load_npz(path))
        refused(lambda: label_files.load(path))

    attack(count, npz_files(), check)
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_an_array_that_the_file_cannot_hold(tmp_path: Path) -> None:
    """1.8 MB that claim to be 2^40 elements, in the header of the array and in that of the archive."""
    header = repr({"descr": "|u1", "fortran_order": False, "shape": (2**30, 32, 32, 1)}) + "\n"
    rest = [(f"{name}.npy", npy("{}", b"")) for name in ARRAYS[1:]]
    content = npz([(f"{ARRAYS[0]}.npy", npy(header, os.urandom(1_800_000))), *rest])
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="more than the file holds"):
        load_npz(path)
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size
    path.write_bytes(content.replace(size.to_bytes(4, "little"), (2**32 - 2).to_bytes(4, "little")))
    assert refused(lambda: load_npz(path))


# files that are no files


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.npz"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path, tmp_path / "a\0b", Path("a" * 5000)):
        assert refused(lambda path=path: check_file(path))
        assert refused(lambda path=path: load_npz(path))
        assert refused(lambda path=path: study_file.read(path))
        assert refused(lambda path=path: label_files.load(path))
        assert refused(lambda path=path: read_labels(path))
        assert refused(lambda path=path: _read_released(path, ("clean_label",)))
        assert refused(lambda path=path: validate({"plugin": path, "dataset": "digits"}))
    (tmp_path / "large").write_bytes(b"12345")
    check_file(tmp_path / "large", 5)
    assert refused(lambda: check_file(tmp_path / "large", 4))


# texts

ODD = st.text(
    st.sampled_from("ab \n[](){}<>:!*_`|=+-@'\"\\/#&;\t\r\x00\x1b\x07\x9b\u202e\u2066\ufeff\ud800é"), max_size=30
)
LINKS = st.sampled_from([
    "[x](javascript:alert(1))", "<javascript:alert(1)>", "[x]: javascript:alert(1)", "![x](javascript:a)", "[x][y]",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](<javascript:a>)", "]\n(javascript:a)", "`[x](y)`",
    "[x]\x00(javascript:a)", "[x]\u202e(javascript:a)", "\\[x](javascript:a)", "[[x]](javascript:a)",
])  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_texts(count: int) -> None:
    parser = MarkdownIt("commonmark").enable("table")

    def check(parts: list[str]) -> None:
        text = "".join(parts)
        clean = printable(text)
        clean.encode()
        assert not any(ord(c) < 32 and c not in "\t\n" for c in clean)
        assert not set("\x1b\x9b\u202e\u2066\ud800") & set(clean)
        line = inert(text)
        assert "\n" not in line
        for document in (line, f"- {line}\n", f"## {line}\n", f"{line}\n\n[x] [y]\n", f"a `{line}` b"):
            tokens = [t for block in parser.parse(document) for t in (block, *(block.children or ()))]
            assert not {t.type for t in tokens} & {"link_open", "image", "html_block", "html_inline"}, document
        cell = csv_cell(text)
        buffer = io.StringIO()
        csv.writer(buffer).writerow([cell])
        assert isinstance(cell, str)
        assert not cell.lstrip().startswith(("=", "+", "@"))

    attack(count, st.lists(LINKS | ODD, max_size=4), check)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("=1+1", "'=1+1"), ("+a", "'+a"), ("@SUM(A1)", "'@SUM(A1)"), ("-cmd", "'-cmd"), ("  =1", "'  =1"),
     ("\t=1", "'\t=1"), ("\x1b=1", "'=1"), ("-0.5", "-0.5"), ("SAM", "SAM"), (-0.5, -0.5), (None, None),
     ("a=b", "a=b")],
)  # fmt: skip
def test_cells(value: object, expected: object) -> None:
    assert csv_cell(value) == expected


def test_values_of_a_configuration() -> None:
    for value in ("a\0b", "\x1b[31m", "\ud800", 2**63, "9" * 5000, {"q": "\n"}, [Path("a\0b")], {"\0": 1}):
        assert unusable(value) is not None
    for value in ("npz:own data.npz", "é", 0, -1, 0.5, None, True, {"q": [0.7]}):
        assert unusable(value) is None


# programs


def test_a_plugin_may_not_end_the_program(tmp_path: Path) -> None:
    for number, line in enumerate(("import sys; sys.exit(0)", "raise SystemExit", "exit()", "raise GeneratorExit")):
        path = tmp_path / f"plugin{number}.py"
        path.write_text(line)
        assert refused(lambda path=path: validate({"plugin": path, "dataset": "digits"}))


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    """Even if the first one is being handled, and nothing handles the second."""
    code = (
        "import signal, sys, time; from noisysam import cli\n"
        "def slow(arguments):\n"
        "    try: print('ready', flush=True); time.sleep(600)\n"
        "    except KeyboardInterrupt: print('first', flush=True); time.sleep(600)\n"
        "cli._run = slow; cli.main([])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    for word in ("ready", "first"):
        assert process.stdout.readline().strip() == word
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().startswith("noisysam: stopped at once; the same command resumes")


# stores and data that are unusual, but sound

RUN = ["run", "--dataset", "digits", "--model", "resnet8", "--epochs", "1", "--no-track", "--width", "0.25",
       "--train-subset", "60", "--batch", "16"]  # fmt: skip


def test_a_finished_run_in_a_store_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli._run(RUN) == 0
    shown = capsys.readouterr().out

    def refuse(_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(RunFolder, "lock", refuse)  # root may write anywhere
    assert cli._run(RUN) == 0
    assert capsys.readouterr().out == shown
    assert cli._run([*RUN, "--seed", "1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "noisysam: [Errno 30] Read-only file system"


@pytest.mark.parametrize("augment", ["none", "standard", "color", "rand"])
def test_constant_images(augment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.arange(60) % 4
    images = np.full((60, 8, 8, 1), 9, np.uint8)
    np.savez("own.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    began = time.monotonic()
    assert cli._run([*RUN, "--dataset", "npz:own.npz", "--augment", augment]) == 0
    assert time.monotonic() - began < 60


NOBODY = [
    "--noise 1e-9", "--noise 1 --noise-type symmetric-exclusive", "--noise 1 --method co-teaching",
    "--noise 1 --method jocor", "--noise 1 --method o2u", "--noise 1 --method incv", "--noise 1 --method mentornet",
    "--noise 1 --noise-type symmetric-exclusive --method co-teaching",
    "--noise 1 --noise-type symmetric-exclusive --method jocor",
]  # fmt: skip


@pytest.mark.parametrize("flags", NOBODY)
def test_rates_that_select_nobody(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli._run([*RUN, *flags.split(" ")])
    lines = capsys.readouterr().err.splitlines()
    assert code in (0, 1, 2)
    assert not [line for line in lines if "unexpected" in line or "Traceback" in line]
