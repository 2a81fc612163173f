"""A Chromium that is there already, and how to start it so that it asks nobody for anything by itself."""

from __future__ import annotations

import shutil
import subprocess


def _running(name: str) -> str | None:
    """The path of a browser that starts; Ubuntu has one in name only, where there is no snap."""
    path = shutil.which(name)
    return path if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0 else None


CHROMIUM = next(filter(None, map(_running, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium here; install one: apt-get install chromium"
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE = {"width": 360, "height": 740}
