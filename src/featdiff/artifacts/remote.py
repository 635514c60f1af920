"""Where results are shared: DVC's default remote, proved by use.

``set URL [--endpoint URL]``   install what such a remote needs, write, read and remove a probe, make it the default
``push``                       copy what it lacks of the results of dvc.lock to the remote
``pull [STAGE …]``             fetch the results of dvc.lock, or of these stages alone
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from featdiff.config.reading import ConfigError

NAME = "store"
EXTRAS = {"s3": "s3", "ssh": "ssh", "gs": "gs", "azure": "azure", "": "", "file": ""}
"""The optional dependency that a kind of address needs, which is also the name of DVC's plugin for it."""
BAD_INPUT = 2
HOW = "make remote URL=<folder, s3://bucket/path, ssh://user@host/path, gs://bucket/path or azure://container/path>"


def install(extra: str) -> None:
    """Install the optional dependency ``extra``, unless it is there, in the versions of the constraints file."""
    if not extra or importlib.util.find_spec(f"dvc_{extra}"):
        return
    print(f"remote: installing the extra {extra}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "--editable", f".[{extra}]"]
    if subprocess.run(pip, check=False).returncode:
        raise ConfigError(f"{extra}: pip could not install it; see above")


def settings(url: str, endpoint: str) -> dict[str, str]:
    """DVC's settings of a remote at ``url``. Raises ConfigError for an address of no known kind and for one that holds a
    password, which would go to git."""
    parts = urlsplit(url)
    if not url or parts.scheme not in EXTRAS:
        raise ConfigError(f"{parts.scheme or 'URL'}: no kind of address that is known; {HOW}")
    if parts.password or ("@" in parts.netloc and parts.scheme != "ssh"):
        raise ConfigError(
            f"URL: holds a password or key (not shown), and .dvc/config goes to git; leave it out and say "
            f"dvc remote modify --local {NAME} <option> <value> instead"
        )
    place = url if EXTRAS[parts.scheme] else str(Path(parts.path).absolute())
    return {"url": place} | ({"endpointurl": endpoint} if endpoint else {})


def probe(found: dict[str, str]) -> None:
    """Write, read and remove a small object in a remote with these settings. Raises ConfigError where that fails."""
    from dvc.repo import Repo

    step = "open"
    try:
        with Repo(config={"core": {"remote": NAME}, "remote": {NAME: found}}) as repo:
            remote = repo.cloud.get_remote(NAME)
            place, sent = remote.fs.join(remote.path, f"probe-{uuid4().hex}"), uuid4().bytes
            step = "write to"
            remote.fs.makedirs(remote.path, exist_ok=True)
            remote.fs.pipe_file(place, sent)
            step = "read from"
            if remote.fs.cat_file(place) != sent:
                raise ConfigError(f"{found['url']}: gives back other bytes than were written")
            step = "remove from"
            remote.fs.remove(place)
    except ConfigError:
        raise
    except Exception as error:  # each kind of remote has errors of its own
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{found['url']}: cannot {step} it: {said}; nothing was changed") from None


def make_default(found: dict[str, str]) -> None:
    """Write the settings into .dvc/config, which goes to git, so that whoever clones the repository has them."""
    _dvc("remote", "add", "--quiet", "--force", "--default", NAME, found["url"])
    for option, value in found.items():
        if option != "url":
            _dvc("remote", "modify", "--quiet", NAME, option, value)


def default() -> str:
    """Name of the default remote. Raises ConfigError where there is none."""
    from dvc.repo import Repo

    with Repo() as repo:
        name = repo.config["core"].get("remote")
    if not name:
        raise ConfigError(f"none is set; whoever ran the study says {HOW} once, and commits .dvc/config")
    return str(name)


def _dvc(*words: str) -> None:
    if subprocess.run([sys.executable, "-m", "dvc", *words], check=False).returncode:
        raise ConfigError(f"dvc {words[0]} failed; see above")


def main(arguments: list[str]) -> int:
    """See the module."""
    try:
        match arguments:
            case ["set", url, *rest] if not rest or (rest[0] == "--endpoint" and len(rest) == 2):
                found = settings(url, rest[1] if rest else "")
                install(EXTRAS[urlsplit(url).scheme])
                probe(found)
                make_default(found)
                print(f"remote: {found['url']} can be written, read and cleaned; commit .dvc/config, then make push")
            case ["push"]:
                name = default()
                _dvc("push")
                print(f"remote: {name} has every result of dvc.lock; a clone of this commit gets them by make pull")
            case ["pull", *stages] if all(re.fullmatch(r"[a-z][a-z0-9_@]*", stage) for stage in stages):
                default()
                _dvc("pull", *stages)
                print(f"remote: pulled {', '.join(stages) or 'all results of dvc.lock; dvc repro has nothing to do'}")
            case _:
                raise ConfigError(f"what to do is set, push or pull [STAGE …]; {HOW}")
    except ConfigError as error:
        print(f"remote: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
