"""The picture of the report that the README shows: ``python -m featdiff.report.picture``.

Taken by a headless browser (``$BROWSER``, else chromium or chrome) of ``report/index.html``, with the hash of
``metrics/summary.json`` in it, by which a test sees whether picture and numbers belong together.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from featdiff.artifacts.artifact import sha256_file
from featdiff.config.reading import ConfigError
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.signals import say

PAGE, SUMMARY, PICTURE = Path("report/index.html"), Path("metrics/summary.json"), Path("docs/report.png")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = "1280,1420"
LABEL = "summary"


def label(picture: Path) -> str:
    """The hash that :func:`take` wrote into ``picture``; empty where there is none."""
    from PIL import Image

    with Image.open(picture) as image:
        return str(image.info.get(LABEL, ""))


def take(browser: str) -> None:
    """Write the picture. Raises ConfigError where the browser gives none."""
    from PIL import Image, PngImagePlugin

    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={SIZE}", "--virtual-time-budget=15000"]
        page = PAGE.absolute().as_uri()
        done = subprocess.run([browser, *options, f"--screenshot={shot}", page], capture_output=True, check=False)
        if done.returncode or not shot.is_file():
            raise ConfigError(f"{browser}: gave no picture of {page} (status {done.returncode}); name another in $BROWSER")
        facts = PngImagePlugin.PngInfo()
        facts.add_text(LABEL, sha256_file(SUMMARY))
        with Image.open(shot) as image:
            image.convert("P", palette=Image.Palette.ADAPTIVE, colors=255).save(PICTURE, pnginfo=facts, optimize=True)


def main() -> int:
    """See the module."""
    try:
        named = os.environ.get("BROWSER", "")
        browser = named or next(filter(None, map(shutil.which, BROWSERS)), "")
        if not browser:
            raise ConfigError(f"no browser ({', '.join(BROWSERS)}); install one, or name it in $BROWSER")
        if not PAGE.is_file():
            raise ConfigError(f"{PAGE}: not found; make repro, or make pull STAGE=report")
        take(browser)
    except ConfigError as error:
        say(str(error))
        return EXIT_BAD_INPUT
    print(f"{PICTURE}: taken of {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
