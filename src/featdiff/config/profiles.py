"""The switch between profiles: params.yaml is always one profile, written out in full.

python -m featdiff.config.profiles use [<profile>] [--discard] [--suites=<folder>]
python -m featdiff.config.profiles check
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from featdiff.config.params import Study, load_study
from featdiff.config.parse import parse
from featdiff.config.published import published
from featdiff.config.reading import (
    DEFAULT_PROFILE,
    PARAMS,
    PROFILES,
    ConfigError,
    closest,
    flatten,
    legible,
    parse_yaml,
    read_text,
    read_yaml,
)

EXTENDS = "extends"
"""What a profile's file calls the profile from which it differs, where that is another than the default."""


def _merge(base: Any, over: dict[str, Any], where: str) -> None:
    """Put the values of ``over`` into the ruamel mapping ``base``, keeping its comments.

    A mapping under a key that ends in ``!`` replaces the old mapping instead of being merged into it."""
    for raw, value in over.items():
        key, replace = raw.removesuffix("!"), raw.endswith("!")
        if key not in base:
            raise ConfigError(f"{where}: {key}: unknown key; {closest(key, base)}")
        if isinstance(value, dict) and isinstance(base[key], dict) and not replace:
            _merge(base[key], value, f"{where}: {key}")
        else:
            base[key] = value


def _lineage(name: str) -> list[Path]:
    """The files that make profile ``name``, each of which changes what those before it say: the default profile, the one that
    ``name`` extends if any, and its own. Raises ConfigError for one that is not there, and for a chain of them."""
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"profile {name!r}: unknown; {closest(name, known)} (conf/profiles/*.yaml)")
    default, path = PROFILES / f"{DEFAULT_PROFILE}.yaml", PROFILES / f"{name}.yaml"
    if name == DEFAULT_PROFILE:
        return [default]
    if (further := read_yaml(path).get(EXTENDS)) is None:
        return [default, path]
    plain = [
        other
        for other in known
        if other not in (name, DEFAULT_PROFILE) and EXTENDS not in read_yaml(PROFILES / f"{other}.yaml")
    ]
    if further not in plain:
        raise ConfigError(
            f"{path}: {EXTENDS}: {legible(str(further))}: no profile that extends none; {closest(str(further), plain)}"
        )
    return [default, PROFILES / f"{further}.yaml", path]


def render_profile(
    name: str, suites: str | None = None, over: dict[str, Any] | None = None, over_from: str = "further overrides"
) -> str:
    """Text of params.yaml under profile ``name``: the default file with the profile's overrides, with those of ``over``, which
    come from ``over_from``, and with ``suites`` in place of ``prepare.suites``.

    The default profile is conf/profiles/organism.yaml word for word; every other file there holds only what differs from it,
    or from the profile that it ``extends``."""
    from io import StringIO

    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    paths = _lineage(name)
    texts = [read_text(path) for path in paths]
    for path, content in zip(paths, texts, strict=True):
        parse_yaml(content, str(path))
    if name == DEFAULT_PROFILE and suites is None and over is None:
        return texts[0]
    round_trip = YAML()
    round_trip.preserve_quotes = True
    round_trip.width = 4096
    try:
        document, *changes = map(round_trip.load, texts)
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{paths[-1]}: not valid YAML: {' '.join(str(error).split())}") from None
    for path, overrides in zip(paths[1:], changes, strict=True):
        overrides.pop(EXTENDS, None)
        _merge(document, overrides, str(path))
    _merge(document, over or {}, over_from)
    if suites is not None:
        document["prepare"]["suites"] = suites
    document["profile"] = name
    out = StringIO()
    round_trip.dump(document, out)
    parse(Study, parse_yaml(out.getvalue(), str(paths[-1])), str(paths[-1]))
    return out.getvalue()


def use_profile(name: str, *, discard_edits: bool = False, suites: str | None = None) -> str:
    """Write params.yaml for ``name``; refuses while params.yaml holds edits by hand. Returns what it did."""
    wanted = render_profile(name, suites)
    if PARAMS.is_dir() or (PARAMS.exists() and not discard_edits):
        current = read_yaml(PARAMS)
        if current == parse_yaml(wanted, name):
            return f"params.yaml: already profile {name}"
        now = str(current.get("profile", DEFAULT_PROFILE))
        clean = flatten(parse_yaml(render_profile(now, current.get("prepare", {}).get("suites")), now))
        found = flatten(current)
        edits = [key for key in clean.keys() | found.keys() if clean.get(key) != found.get(key)]
        if edits:
            raise ConfigError(
                f"params.yaml: holds {len(edits)} edit(s) by hand over profile {now} "
                f"({', '.join(sorted(edits)[:5])}); keep them in a profile of your own under conf/profiles/, "
                f"or add DISCARD=1 to overwrite them"
            )
    temporary = PARAMS.with_suffix(".yaml.tmp")
    temporary.write_text(wanted, encoding="utf-8")
    temporary.replace(PARAMS)
    return f"params.yaml: now profile {name}"


def main(arguments: list[str]) -> None:
    """See the module."""
    parser = _Parser(prog="python -m featdiff.config.profiles", description="The switch between profiles.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="whether every key of params.yaml is known and holds")
    use = commands.add_parser("use", help="write params.yaml for a profile")
    use.add_argument("profile", nargs="?", help="by default the present one")
    use.add_argument("--discard", action="store_true", help="overwrite edits by hand")
    use.add_argument("--suites", help="folder in which suites are found")
    given = parser.parse_args(arguments)
    try:
        if given.command == "use":
            name = given.profile or load_study().profile
            print(use_profile(name, discard_edits=given.discard, suites=given.suites))
        else:
            study = load_study()
            published(study.report.paper_model)
            print(f"params.yaml: profile {study.profile}, all keys known")
    except ConfigError as error:
        _stop(str(error))


class _Parser(argparse.ArgumentParser):
    """Whose mistakes are one line, as everybody else's."""

    def error(self, message: str) -> NoReturn:
        _stop(f"{message} ({self.prog} --help)")


def _stop(message: str) -> NoReturn:
    print(f"featdiff: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
