"""The one place that kvgen writes to unasked: its cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_dir() -> Path:
    """Where kvgen keeps what it fetched and built: $KVGEN_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("KVGEN_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else user_cache_path("kvgen", appauthor=False)
