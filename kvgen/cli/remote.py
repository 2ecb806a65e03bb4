"""`--server`: the model of a running `kvgen serve` in place of one that is loaded here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvgen import __version__
from kvgen.cli.groups import ModelOptions
from kvgen.cli.interrupts import raise_interrupts
from kvgen.errors import UsageError

if TYPE_CHECKING:
    from kvgen.client.remote import Remote

API_KEY = "KVGEN_API_KEY"  # environment variable


def changed(group: Any) -> list[str]:
    """Return the names of the options in a group that do not have their default."""
    return [field.name for field in fields(group) if getattr(group, field.name) != field.default]


def connected(address: str, source: ModelOptions, others: Iterable[str] = ()) -> Remote:
    """Connect to a server. others: names of options besides those of `source` that were given in vain.

    Raises UsageError for options that the server decides, KvgenError if there is no server.
    """
    if given := [*changed(source), *others]:
        option = given[0].replace("_", "-")
        raise UsageError(f"--{option} does not go with --server {address}, which has loaded its model: leave one out")
    raise_interrupts()

    from kvgen.client.remote import connect

    return connect(address, os.environ.get(API_KEY), __version__)
