"""Making untrusted text safe to show on a terminal."""

from __future__ import annotations

import re

# C0 and C1 controls but newline and tab; line and paragraph separators; the marks that reorder text (bidi).
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    r"""`text` with every character that could steer a terminal as `\xNN` or `\uNNNN`."""
    return _CONTROLS.sub(lambda match: _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
