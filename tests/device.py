"""Where the tests of models compute: `--device` of pytest."""

from __future__ import annotations

import os

DEVICE = os.environ.get("KVGEN_TEST_DEVICE", "cpu")
