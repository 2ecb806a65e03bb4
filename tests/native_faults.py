"""Ways to break the cache of kvgen's own decoder, tiny or real, on torch or on the kernels.

`Faulty` is what a user would bring: something to call with the contract's signature. Its uncached calls are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvgen.model.cache import KVCache
from kvgen.model.causal_lm import CausalLM
from kvgen.model.layers import RotaryTables, rotate

# fault -> the findings that name it rightly; `unexplained` is never wrong, and never a name.
FAULTS: dict[str, set[str]] = {
    "positions restart at 0": {"offset lost"},
    "offset one too far": {"offset wrong"},
    "offset one too short": {"offset wrong"},
    "position stays at the prompt's end": {"offset wrong"},
    "context dropped": {"context lost"},
    "newest token never stored": {"stale context", "short context", "lookup wrong"},
    "edit keeps the old suffix": {"edits not noticed"},
    "rows of a batch rolled": {"rows mixed"},
    "8-bit cache": {"lower precision"},
    "key-value heads swapped": {"values wrong"},
    "keys and values of another layer": {"values wrong"},
    "one layer not cached": {"values wrong", "lookup wrong"},
    "cached keys rotated twice": {"lookup wrong"},
    "logits of the position before": {"stale context"},
    "logits with noise": {"not deterministic"},
    # What a short text, one sequence and one token a call do not show:
    "one cache for all sequences": {"sequences mixed"},
    "beyond 128 prompt tokens": {"longer texts"},
    "beyond 40 steps": {"longer texts"},
    "a buffer that grows at 64": {"longer texts"},
    "a buffer that grows at 128": {"longer texts"},
    "a buffer that grows at 256": {"longer texts"},
    "chunks of 2": {"multi-token calls"},
    "chunks of 3": {"multi-token calls"},
    "chunks of 7": {"multi-token calls"},
    "rewinds by 1": {"edits not noticed"},
    "rewinds by 2 or 3": {"edits not noticed"},
    "rewinds by 8": {"edits not noticed"},
    "batches of three": {"rows mixed"},
    "a special token": {"special tokens"},
    # Faults that look like others:
    "newest key turned one too far in one layer": {"lookup wrong"},
    "rope base off by a thousandth": {"lookup wrong"},
    "a race in one call of 30": {"not deterministic"},
    "NaN": {"not a number"},
    "NaN beyond 60 positions": {"longer texts"},
    "infinities": {"not a number"},
}

SPECIAL = 3


@dataclass
class _State:
    ids: Tensor  # (B, n)
    kv: KVCache
    prompt: int
    calls: int


class Faulty:
    """A right use of a decoder's cache, with one fault. None is right."""

    rewinds = True

    def __init__(self, decoder: CausalLM, fault: str | None, special: int = SPECIAL) -> None:
        assert fault is None or fault in FAULTS
        self.decoder, self.fault, self.special = decoder, fault, special
        self.vocab_size, self.context_length = decoder.config.vocab_size, decoder.config.context_length
        self.changes_at = ()
        self.shared: KVCache | None = None
        self.calls = 0

    @torch.inference_mode()
    def __call__(self, ids: Tensor, state: _State | None = None, positions: Tensor | None = None) -> Any:
        self.calls += 1
        if state is None:
            return self.begin(ids)
        known = self.known(ids, state)
        new = ids[:, known:]
        if self.fault == "context dropped":
            logits, _ = self.decoder.append(new, None, start=known)
            return logits, _State(ids.clone(), state.kv, state.prompt, state.calls + 1)
        if self.fault == "logits of the position before" and new.shape[1] == 1:
            return self.decoder.forward(ids[:, :-1])[0], _State(ids.clone(), state.kv, state.prompt, state.calls + 1)
        kv = self.shared if self.fault == "one cache for all sequences" and self.shared else state.kv
        self.damage(kv, known, new)
        self.rewind(kv, known, state.ids.shape[1])
        start = self.start(known, new, state) if positions is None else int(positions[known])
        logits, kv = self.decoder.append(new, kv, start=start)
        if self.fault == "newest token never stored":
            kv.trim(kv.length - new.shape[1])
        self.round(kv, known, ids.shape[1])
        return self.broken(logits, ids), _State(ids.clone(), kv, state.prompt, state.calls + 1)

    def begin(self, ids: Tensor) -> tuple[Tensor, _State]:
        _, kv = self.decoder.append(ids, None, start=0)
        self.shared = kv
        n = ids.shape[1]
        if self.fault == "beyond 128 prompt tokens" and n > 128:
            kv.trim(n - 1)
            self.decoder.append(ids[:, -1:], kv, start=n)
        self.round(kv, 0, n)
        return self.decoder.all_logits(ids), _State(ids.clone(), kv, n, 0)

    def known(self, ids: Tensor, state: _State) -> int:
        limit = min(state.ids.shape[1], ids.shape[1] - 1)
        if self.fault == "edit keeps the old suffix":
            return limit
        same = (state.ids[:, :limit] == ids[:, :limit]).all(0)
        return int(same.long().cumprod(0).sum())

    def rewind(self, kv: KVCache, known: int, before: int) -> None:
        """Go back to `known` positions."""
        counts = {"rewinds by 1": (1,), "rewinds by 2 or 3": (2, 3), "rewinds by 8": (8,)}.get(self.fault or "", ())
        if before - known not in counts and known < kv.length:
            kv.trim(known)

    def start(self, known: int, new: Tensor, state: _State) -> int:
        count = new.shape[1]
        faults = {
            "positions restart at 0": 0,
            "offset one too far": known + 1,
            "offset one too short": known - 1,
            "position stays at the prompt's end": state.prompt,
            "beyond 40 steps": known + (state.calls >= 40),
            "chunks of 2": known + (count == 2),
            "chunks of 3": known + (count == 3),
            "chunks of 7": known + (count == 7),
            "a special token": known + bool((new == self.special).any()),
            "a race in one call of 30": known + (self.calls % 30 == 11),
        }
        return faults.get(self.fault or "", known)

    def damage(self, kv: KVCache, known: int, new: Tensor) -> None:
        """Change what is stored, before it is read."""
        rooms = kv.held()
        fault = self.fault or ""
        for size in (64, 128, 256):
            if fault == f"a buffer that grows at {size}" and known <= size < known + new.shape[1]:
                for room in rooms:
                    room.values[:, :, size - 1] = 0
        if fault == "rows of a batch rolled" or (fault == "batches of three" and len(new) >= 3):
            for room in rooms:
                room.keys.copy_(room.keys.roll(1, 0))
                room.values.copy_(room.values.roll(1, 0))
        if fault == "key-value heads swapped":
            for room in rooms:
                room.values.copy_(room.values.flip(1))
        if fault == "keys and values of another layer":
            for room, other in zip(rooms, [*rooms[1:], rooms[0]], strict=True):
                room.values.copy_(other.values.clone())
        if fault == "one layer not cached":
            rooms[1].keys.zero_()
            rooms[1].values.zero_()
        if fault == "cached keys rotated twice":
            self.turn(rooms, torch.arange(rooms[0].keys.shape[2]), 1.0)

    def round(self, kv: KVCache, begin: int, end: int) -> None:
        """Change what was stored last, after it was read."""
        rooms = [room for room in kv.held() if room.keys.shape[2] == end]
        if not rooms:
            return
        if self.fault == "8-bit cache":
            for room in rooms:
                for stored in (room.keys, room.values):
                    new = stored[:, :, begin:end]
                    scale = new.abs().amax(-1, keepdim=True) / 127
                    new.copy_((new / scale).round() * scale)
        positions = torch.arange(begin, end)
        if self.fault == "newest key turned one too far in one layer":
            self.turn(rooms[:1], torch.ones(end - begin, dtype=torch.int64), 1.0, begin)
        if self.fault == "rope base off by a thousandth":
            self.turn(rooms, positions, 1e-3, begin)

    def turn(self, rooms: Any, positions: Tensor, by: float, begin: int = 0) -> None:
        """Rotate stored keys further, by a part of the angle of `positions`."""
        tables = RotaryTables(self.decoder.config.rotaries[0])
        tables.frequencies = tables.frequencies * by
        cos, sin = tables(positions)
        for room in rooms:
            for row in room.keys:  # (H_kv, n, D)
                turned = rotate(row[:, begin:].transpose(0, 1), cos[:, None], sin[:, None]).transpose(0, 1)
                row[:, begin:] = turned

    def broken(self, logits: Tensor, ids: Tensor) -> Tensor:
        if self.fault == "NaN" or (self.fault == "NaN beyond 60 positions" and ids.shape[1] > 60):
            return logits * torch.nan
        if self.fault == "infinities":
            return torch.where(torch.arange(logits.shape[-1]) == 5, torch.inf, logits)
        if self.fault == "logits with noise":
            return logits + torch.randn_like(logits)
        return logits
