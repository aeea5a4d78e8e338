"""Config files as they lie on disk: small regular files of UTF-8 YAML or JSON, without aliases and repeated keys."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import SettingError, printable, shown

MAX_FILE_BYTES = 1 << 20


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and aliases (a small file can expand without bound)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {shown(key)} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused when it repeats a key."""
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"key {shown(name)} is given twice")
        mapping[name] = value
    return mapping


def _parse(text: str, is_json: bool) -> Any:
    return json.loads(text, object_pairs_hook=unique_keys) if is_json else yaml.load(text, _UniqueKeyLoader)


def _read_bytes(path: str) -> bytes:
    """What stands in a regular file; of anything else (a pipe would wait for a writer) nothing is read."""
    name, file = "--cache-dit-config", Path(path)
    if not file.is_file():
        what = "a folder, expected a file" if file.is_dir() else "not a file" if file.exists() else "no such file"
        raise SettingError(name, path, "command line", what)
    with file.open("rb") as source:
        content = source.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise SettingError(name, path, "command line", f"larger than {MAX_FILE_BYTES} bytes")
    return content


def load_file(path: str) -> Any:
    """The parsed YAML or JSON of ``path``; SettingError for anything that is not one."""
    origin, name = f"--cache-dit-config {path}", "--cache-dit-config"
    try:
        # The mark that some editors put first is no part of the text.
        text = _read_bytes(path).decode("utf-8-sig")
        parsed = _parse(text, path.endswith(".json"))
    except SettingError:
        raise
    except UnicodeDecodeError:
        raise SettingError(name, path, "command line", "not UTF-8 text") from None
    except OSError as error:
        raise SettingError(name, path, "command line", error.strerror or "unreadable") from None
    except Exception as error:
        # Besides YAMLError: PyYAML's constructors raise KeyError, IndexError and AttributeError for
        # scalars that are not what their tag says, such as ``!!bool maybe``.
        raise SettingError(name, path, "command line", f"not valid YAML or JSON: {error}") from None
    if parsed is None:
        raise SettingError(name, path, origin, "the file is empty")
    return parsed


def file_label(path_or_mapping: str | Mapping[str, Any] | None) -> str:
    """How origins name a config file."""
    if not isinstance(path_or_mapping, str):
        return "cache_dit_config"
    # Reports carry it: a name that is not text must not spoil their encoding.
    return printable(os.path.basename(path_or_mapping))
