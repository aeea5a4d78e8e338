"""Config files that nobody should write: each is refused in one line, soon, and nothing of it takes effect."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_cachedit_plugin.config import effective
from sglang_cachedit_plugin.config.effective import Defaults
from sglang_cachedit_plugin.config.sources import MAX_FILE_BYTES, MAX_NAME, load_file, read_file
from sglang_cachedit_plugin.errors import SettingError
from sglang_cachedit_plugin.integration import startup

GOOD = "cache_config: {max_warmup_steps: 2}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MANY = ", ".join(f'"key{number}": 1' for number in range(40_000))

CONTENTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "the file is empty"),
    "only a comment": ("# nothing\n", "the file is empty"),
    "a word": ("cache_config", "expected sections"),
    "a list": ("[1, 2]", "expected sections"),
    "broken": ("cache_config: [", "not valid YAML or JSON"),
    "tabs": ("cache_config:\n\tmax_warmup_steps: 2\n", "not valid YAML or JSON"),
    "two documents": (GOOD + "---\n" + GOOD, "not valid YAML or JSON"),
    "bomb of aliases": (BOMB, "aliases are not allowed"),
    "alias of itself": ("a: &a {b: *a}", "aliases are not allowed"),
    "merged alias": ("base: &b {max_warmup_steps: 2}\ncache_config: {<<: *b}", "aliases are not allowed"),
    "merge key": ("cache_config: {<<: {max_warmup_steps: 2}}", "not valid YAML or JSON"),
    "python object": ("cache_config: !!python/object:os.environ {}", "could not determine"),
    "python name": ("cache_config: !!python/name:os.system", "could not determine"),
    "python tuple": ("cache_config: {max_warmup_steps: !!python/tuple [1]}", "could not determine"),
    "own tag": ("cache_config: !include other.yaml", "could not determine"),
    "tag that does not fit": ("cache_config: {strict: !!bool maybe}", "not valid YAML or JSON"),
    "number that is none": ("cache_config: {max_warmup_steps: !!int x}", "not valid YAML or JSON"),
    "binary": ("cache_config: {max_warmup_steps: !!binary aGk=}", "max_warmup_steps = b'hi'"),
    "date": ("cache_config: {max_warmup_steps: 2026-01-01}", "max_warmup_steps = datetime.date"),
    "bad date": ("cache_config: {max_warmup_steps: 2026-99-99}", "not valid YAML or JSON"),
    "set": ("cache_config: !!set {max_warmup_steps}", "cache_config = {'max_warmup_steps'}"),
    "repeated key": ("cache_config: {strict: true, strict: false}", "'strict' is given twice"),
    "repeated section": (GOOD + GOOD, "'cache_config' is given twice"),
    "long repeated key": (f"{{{'a' * 900}: 1, {'a' * 900}: 2}}", "is given twice"),
    "key that is a list": ("? [1, 2]\n: 3\n", "not valid YAML or JSON"),
    "key that is null": ("? \n: 3\n", "None = 3"),
    "yaml nan": ("cache_config: {residual_diff_threshold: .nan}", "residual_diff_threshold = nan"),
    "yaml infinity": ("cache_config: {residual_diff_threshold: -.inf}", "residual_diff_threshold = -inf"),
    "truth for a number": ("cache_config: {max_warmup_steps: yes}", "max_warmup_steps = True"),
    "text for a number": ("cache_config: {max_warmup_steps: '2'}", "max_warmup_steps = '2'"),
    "number for a truth": ("cache_config: {strict: 1}", "strict = 1"),
    "huge integer": ("cache_config: {max_warmup_steps: " + "9" * 6000 + "}", "not valid YAML or JSON"),
    "huge hexadecimal": ("cache_config: {max_warmup_steps: 0x" + "f" * 6000 + "}", "max_warmup_steps = <int>"),
    "deep list": ("[" * 20_000, "not valid YAML or JSON"),
    "deep mapping": ("{a: " * 20_000, "not valid YAML or JSON"),
    "latin 1": ("cache_config: # für alle\n".encode("latin-1"), "not UTF-8 text"),
    "utf 16": (GOOD.encode("utf-16"), "not UTF-8 text"),
    "cut off in a character": ("cache_config: ä".encode()[:-1], "not UTF-8 text"),
    "null bytes": (b"cache_config: \0\0", "not valid YAML or JSON"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not UTF-8 text"),
    "control characters": ("cache_config: {max_warmup_steps: \x1b[31m}", "not valid YAML or JSON"),
    "half a character in a name": ('profiles: {"\\ud800": {}}', "a profile's name"),
    "name with a line break": ('profiles: {"a\\nb": {}}', "a profile's name"),
    "name that is too long": (f"profiles: {{{'n' * (MAX_NAME + 1)}: {{}}}}", "a profile's name"),
    "name that is empty": ('profiles: {"": {}}', "a profile's name"),
    "path for a section": ("cache_config: ../other.yaml", "cache_config = '../other.yaml'"),
    "path for a value": ("cache_config: {steps_computation_mask: ../../etc/passwd}", "expected"),
    "json with nan": ('{"cache_config": {"residual_diff_threshold": NaN}}', "residual_diff_threshold = nan"),
    "json with a repeated key": ('{"cache_config": {"strict": true, "strict": true}}', "'strict' is given twice"),
    "json with many keys": (f'{{{MANY}, "key39999": 1}}', "'key39999' is given twice"),
    "json cut off": ('{"cache_config": {', "not valid YAML or JSON"),
    "json with a huge integer": (f'{{"cache_config": {{"strict": {"9" * 6000}}}}}', "not valid YAML or JSON"),
    "deep json": ('{"cache_config": ' * 20_000, "not valid YAML or JSON"),
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The settings in force before; they must stay the ones in force."""
    monkeypatch.setattr(effective, "_current", Defaults(file=read_file({"cache_config": {"max_warmup_steps": 7}})))
    return effective.current()


def refused(path: str, capsys) -> str:
    """The one line of a start with this file; it must end with status 2 and change nothing."""
    before = effective.current()
    with pytest.raises(SystemExit) as left:
        startup.before_launch(SimpleNamespace(cache_dit_config=path, backend="sglang"))
    assert left.value.code == 2
    assert effective.current() is before
    error = capsys.readouterr().err
    assert error.startswith("cache-dit: error: ") and error.endswith("\n")
    line = error[:-1]
    assert line.isprintable() and len(line) < 2100
    line.encode("utf-8")
    return line


@pytest.mark.parametrize("name", CONTENTS)
def test_a_bad_file_is_one_line(name, tmp_path, capsys):
    content, words = CONTENTS[name]
    path = tmp_path / ("bad.json" if "json" in name else "bad.yaml")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused(str(path), capsys)


def test_nothing_of_a_tag_runs(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(f"cache_config: !!python/object/apply:os.mkdir ['{tmp_path}/taken']")
    assert "could not determine" in refused(str(tmp_path / "bad.yaml"), capsys)
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_large_file_is_not_parsed(suffix, tmp_path, capsys):
    path = tmp_path / f"large.{suffix}"
    path.write_bytes(GOOD.encode() + b"# " + b"x" * (10 << 20))
    assert f"larger than {MAX_FILE_BYTES} bytes" in refused(str(path), capsys)


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.yaml")
    return folder / "pipe.yaml"


def link(folder: Path, target: str) -> Path:
    (folder / "link.yaml").symlink_to(target)
    return folder / "link.yaml"


def listening(folder: Path) -> Path:
    path = folder / "socket.yaml"
    here = os.getcwd()
    # The name of a socket must be short.
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(path.name)
    finally:
        os.chdir(here)
    return path


PLACES = {
    "missing": (lambda folder: folder / "no.yaml", "no such file"),
    "a folder": (lambda folder: folder, "a folder, expected a file"),
    "a pipe that nobody writes into": (pipe, "not a file"),
    "a socket": (listening, "not a file"),
    "a device": (lambda folder: Path("/dev/zero"), "not a file"),
    "a link to nothing": (lambda folder: link(folder, "no.yaml"), "no such file"),
    "a link to itself": (lambda folder: link(folder, "link.yaml"), "no such file"),
    "a link to a folder": (lambda folder: link(folder, "."), "a folder, expected a file"),
    "a link to a pipe": (lambda folder: link(folder, str(pipe(folder))), "not a file"),
    "beneath a file": (lambda folder: Path(__file__) / "no.yaml", "no such file"),
    "a name that is too long": (lambda folder: folder / ("n" * 300), "File name too long"),
    "a name with a null byte": (lambda folder: f"{folder}/a\0b", "no such file"),
    "a name with a line break": (lambda folder: folder / "a\nb.yaml", "no such file"),
    "a name that is not UTF-8": (lambda folder: folder / "a\udcff.yaml", "no such file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_one_line_and_nothing_waits(name, tmp_path, capsys):
    make, words = PLACES[name]
    assert words in refused(str(make(tmp_path)), capsys)


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "own.yaml").write_text(GOOD)
    assert load_file(str(link(tmp_path, "own.yaml"))) == {"cache_config": {"max_warmup_steps": 2}}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_mark_that_editors_put_first_does_no_harm(suffix, tmp_path):
    content = {"cache_config": {"max_warmup_steps": 2}}
    (tmp_path / f"own.{suffix}").write_text(json.dumps(content), encoding="utf-8-sig")
    assert load_file(str(tmp_path / f"own.{suffix}")) == content


def test_a_name_that_is_not_utf_8_does_not_spoil_the_answers(tmp_path):
    path = tmp_path / "a\udcff.yaml"
    path.write_text(GOOD)
    effective.install(Defaults(file=read_file(str(path))))
    assert json.dumps(effective.current().describe(), ensure_ascii=False).encode()


def test_names_of_other_languages_are_names():
    file = read_file({"profiles": {"brouillon été": {"max_warmup_steps": 1}, "下書き": {}}})
    assert set(file.profiles) == {"brouillon été", "下書き"}


TOKENS = st.sampled_from([
    "cache_config", "profiles", "secondary", "max_warmup_steps", "strict", ": ", ":", " ", "\n", "  ", "- ", "[", "]",
    "{", "}", ",", "&a ", "*a", "!!python/object:os.system ", "!!int ", "!x ", "|", ">", "'", '"', "\\", "#", "---",
    "...", "%YAML 1.1", "? ", "<<", "~", "1", "-1", "1e999", ".nan", "0x", "1_0", "true", "no", "\t", "\0", "\ufeff",
    "\u2028", "é", "\x85", "@",
])


@settings(max_examples=400)
@given(text=st.lists(TOKENS, max_size=25).map("".join) | st.text(max_size=60), suffix=st.sampled_from(["yaml", "json"]))
def test_any_text_is_read_or_refused_in_one_line(text, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_text(text, encoding="utf-8")
    _one_line_or_defaults(path)


@settings(max_examples=200)
@given(content=st.binary(max_size=80), suffix=st.sampled_from(["yaml", "json"]))
def test_any_bytes_are_read_or_refused_in_one_line(content, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"bytes.{suffix}"
    path.write_bytes(content)
    _one_line_or_defaults(path)


def _one_line_or_defaults(path: Path) -> None:
    try:
        file = read_file(str(path))
    except SettingError as error:
        line = str(error)
        assert line.isprintable() and line.encode("utf-8") and len(line) <= 2000
        return
    # What is accepted can be served and shown.
    assert json.dumps(Defaults(file=file).describe(), ensure_ascii=False).encode()
