"""Caches of a server in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvgen
from kvgen.errors import KvgenError
from kvgen.server.saved import SavedCaches

TEXTS = ("one two three", "four five six seven", "eight nine ten eleven twelve")


def caches_of(loaded: kvgen.Loaded) -> list[Any]:
    batch = kvgen.Batch(loaded, max_kept=len(TEXTS))
    for text in TEXTS:
        list(batch.complete(kvgen.Request(loaded.tokenizer.encode(text), max_tokens=1)))
    return batch.kept


@pytest.fixture
def loaded(smollm2: kvgen.Loaded) -> kvgen.Loaded:
    return smollm2


def test_caches_come_back_in_their_order_and_within_the_bound(loaded: kvgen.Loaded, tmp_path: Path) -> None:
    caches, notes = caches_of(loaded), list[str]()
    with_three = SavedCaches(tmp_path, loaded, notes.append)
    with_three.save(caches)
    found = with_three.load(None)
    assert [cache.tokens.tolist() for cache in found] == [cache.tokens.tolist() for cache in caches]
    newest = with_three.load(found[1].nbytes + found[2].nbytes)
    assert [cache.tokens.tolist() for cache in newest] == [cache.tokens.tolist() for cache in caches[1:]]
    with_three.save([caches[2], caches[1]])  # one was dropped meanwhile, and another used last
    assert [cache.tokens.tolist() for cache in with_three.load(None)] == [
        cache.tokens.tolist() for cache in (caches[2], caches[1])
    ]
    assert not notes


def test_a_saved_cache_is_continued(loaded: kvgen.Loaded, tmp_path: Path) -> None:
    saved = SavedCaches(tmp_path, loaded, print)
    saved.save(caches_of(loaded))
    batch = kvgen.Batch(loaded, kept=saved.load(None), max_kept=3)
    request = kvgen.Request(loaded.tokenizer.encode(TEXTS[1]), max_tokens=1)
    assert [chunk.step.computed for chunk in batch.complete(request)] == [1]


def test_other_models_damaged_files_and_other_servers(loaded: kvgen.Loaded, tmp_path: Path) -> None:
    other = replace(loaded, files=loaded.files[:1] * 2)
    caches, notes = caches_of(loaded), list[str]()
    saved = SavedCaches(tmp_path, loaded, notes.append)
    saved.save(caches)
    with pytest.raises(KvgenError, match="another server uses this folder"):
        SavedCaches(tmp_path, other, notes.append)
    del saved
    theirs = SavedCaches(tmp_path, other, notes.append)
    assert theirs.load(None) == []
    theirs.save([])
    files = sorted(tmp_path.glob("*.cache"))
    assert len(files) == 3
    del theirs
    files[0].write_bytes(files[0].read_bytes()[:-9])
    key = files[0].name.partition("-")[0]
    (tmp_path / f"{key}-a.cache").mkdir()
    (tmp_path / f"{key}-b.cache").symlink_to(tmp_path / "nowhere")
    ours = SavedCaches(tmp_path, loaded, notes.append)
    assert len(ours.load(None)) == 2
    assert len(notes) == 1 and str(files[0]) in notes[0]
    ours.save(caches[1:])
    assert len(ours.load(None)) == 2


def test_a_new_folder_is_private(loaded: kvgen.Loaded, tmp_path: Path) -> None:
    SavedCaches(tmp_path / "new", loaded, print)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_used_is_named(loaded: kvgen.Loaded, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(KvgenError, match=f"--prompt-cache {file}"):
        SavedCaches(file, loaded, print)
