"""`kvgen inspect`: describe a checkpoint and say whether kvgen runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Argument

from kvgen.cli import options
from kvgen.cli.errors import exiting_with
from kvgen.cli.interrupts import raise_interrupts
from kvgen.cli.render import download_progress, format_bytes, write_json
from kvgen.cli.tables import print_facts

if TYPE_CHECKING:
    from kvgen.backends.adapter import Adapter
    from kvgen.loading.inspect import Inspection

_RUNS_ON = {"native": "kvgen's decoder", "x-transformers": "x-transformers (library)"}


def inspect(
    model: Annotated[str | None, Argument(metavar="MODEL", help=options.CHECKPOINT, show_default="smollm2")] = None,
    adapter: options.Adapter = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a checkpoint's architecture, sizes, tokenizer and KV cache, without reading its weights.

    The exit code is 0 if kvgen runs it, else 1, with the reason.
    """
    from kvgen.loading.inspect import as_data
    from kvgen.loading.inspect import inspect as inspect_checkpoint

    raise_interrupts()
    with download_progress(quiet=quiet) as progress:
        inspection = inspect_checkpoint(model, adapter=adapter, progress=progress)
    with exiting_with(1 if inspection.backend is None or inspection.vocabulary is None else 0):
        if json:
            write_json(as_data(inspection))
        else:
            print_facts(_facts(inspection))


def _parameters(inspection: Inspection) -> str:
    active = inspection.active_parameters
    less = active is not None and active < inspection.parameters
    return f"{inspection.parameters:,}" + (f", of which a token uses {active:,}" if less else "")


def _describe_adapter(adapter: Adapter) -> str:
    """Describe an adapter in a line."""
    targets = ", ".join(adapter.targets) or "none"
    text = f"{adapter.kind} of rank {adapter.rank}, alpha {adapter.alpha:g}; {len(adapter.low_rank)} weights: {targets}"
    whole = f"; {len(adapter.replaced)} whole tensors" if adapter.replaced else ""
    return f"{text}{whole}; {format_bytes(adapter.nbytes)} in {adapter.path}"


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    types = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in inspection.types.items())
    facts = [
        ("path", str(inspection.path)),
        ("kind", f"{inspection.kind} ({inspection.format})"),
        ("runs on", _RUNS_ON.get(inspection.backend or "", "not supported")),
    ]
    if inspection.cpu_engine is not None:
        facts.append(("on a CPU", inspection.cpu_engine))
    if inspection.adapter is not None:
        facts.append(("adapter", _describe_adapter(inspection.adapter)))
    if inspection.obstacle:
        facts.append(("obstacle", inspection.obstacle))
    if inspection.note:
        facts.append(("note", inspection.note))
    facts += [
        ("parameters", _parameters(inspection)),
        ("size", f"{format_bytes(inspection.nbytes)}: {types}"),
        *inspection.mechanisms.items(),
    ]
    if inspection.config is not None and inspection.cache_bytes_per_token is not None:
        context, full = inspection.config.context_length, inspection.cache_bytes_full
        at_full = "" if full is None else f", {format_bytes(full)} at full context"
        size = f"{format_bytes(inspection.cache_bytes_per_token)} per token{at_full}"
        facts += [
            ("context", "unlimited" if context is None else f"{context:,} tokens"),
            ("KV cache", f"{size} (float32; half of it in bfloat16)"),
        ]
    if inspection.snapshot_bytes:
        facts.append(("snapshot", f"{format_bytes(inspection.snapshot_bytes)}: the state of all recurrent layers"))
    tokenizer = inspection.tokenizer_obstacle or f"{inspection.vocabulary:,} tokens"
    return [*facts, ("tokenizer", tokenizer), ("chat template", "yes" if inspection.has_chat_template else "no")]
