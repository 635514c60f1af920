"""YAML of params and profiles, read strictly: what is doubtful is refused in one line that names file and place."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

PARAMS = Path("params.yaml")
PROFILES = Path("conf/profiles")
DEFAULT_PROFILE = "organism"


class ConfigError(Exception):
    """Parameters that cannot be used; the message is one line that says what to do."""


def closest(word: str, known: Any) -> str:
    """Advice about an unknown ``word``: the nearest of ``known``, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def legible(text: str, most: int = 120) -> str:
    """``text`` as it may stand in a message of one line: escaped where it is not printable, cut where it is long."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[:most]}…"


MOST_BYTES = 2**20
DEEPEST = 32
_UNWANTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_TEXT, _INTEGER = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Strict(_Loader):
    """Safe YAML in which keys are texts given once, integers fit a machine, and texts hold no control characters."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != _TEXT:
                raise ConstructorError(None, None, "expected a text as key", key.start_mark)
            if (name := key.value.removesuffix("!")) in seen:
                raise ConstructorError(None, None, f"key {legible(name)!r} is given twice; keep one", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        if _UNWANTED.search(str(node.value)):
            raise ConstructorError(None, None, "a control character; remove it", node.start_mark)
        if node.tag == _INTEGER and len(node.value) > 40:
            raise ConstructorError(None, None, "an integer of more than 40 characters", node.start_mark)
        return super().construct_scalar(node)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping that ``text`` describes, plainly: anchors, aliases and tags are refused (params need none, and a few lines
    of them describe more than memory holds), and so is nesting that would exhaust the stack. Raises ConfigError."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            mark: Any = event.start_mark
            place = f"{source}:{mark.line + 1}"
            if depth > DEEPEST:
                raise ConfigError(f"{place}: nested more than {DEEPEST} deep; a study needs 5")
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ConfigError(f"{place}: anchors (&), aliases (*) and tags (!) are not read; write the value out")
        data = yaml.load(text, Loader=_Strict)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none, text with half a character
        said = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError(f"{source}: not valid YAML: {legible(said, 300)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping of sections, found {type(data).__name__}")
    return data


def read_text(path: Path) -> str:
    """Text of a small file; raises ConfigError for one that is absent, large or no text."""
    if not path.exists():
        raise ConfigError(f"{path}: not found; run from the project's top folder")
    if not path.is_file():
        raise ConfigError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}; move it away")
    with path.open("rb") as stream:
        raw = stream.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ConfigError(f"{path}: expected at most {MOST_BYTES} bytes, found more; give a file of params")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}; save it in UTF-8") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The one way in for params and profiles; see :func:`parse_yaml`."""
    return parse_yaml(read_text(path), str(path))


SECRET_NAME = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{16,}|://[^/\s:@]+:[^/\s@]+@")


def refuse_secrets(data: dict[str, Any], source: str) -> None:
    """Raise ConfigError for a value that looks like a key or a password, without repeating it: params go to git, to every
    record and to the report."""
    for key, value in flatten(data).items():
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if any(map(SECRET_VALUE.search, texts)) or (texts and SECRET_NAME.search(key.rpartition(".")[2])):
            raise ConfigError(
                f"{source}: {legible(key)}: looks like a key or a password (not shown); set it in the environment instead"
            )


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        flat |= flatten(value, f"{dotted}.") if isinstance(value, dict) and value else {dotted: value}
    return flat
