"""Complete rows on a Ray cluster, in a pool of Ray Data actors that each load the model once (extra: ray)."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

import torch

from kvgen.errors import KvgenError, UnsupportedError, in_one_line
from kvgen.generation.batch import Batch
from kvgen.generation.settings import Request
from kvgen.loading.load import load
from kvgen.pipeline.complete import Result, complete_rows
from kvgen.pipeline.rows import InputRow, read_row
from kvgen.tokenizer.prompt import PromptFormat

_TASK_ROWS = 64  # rows that a worker gets at a time, and that are repeated if it dies


@dataclass(frozen=True)
class Work:
    """Settings for every worker. load: arguments of `kvgen.load`. The others are as for `Batch` and `complete_rows`.

    chat_template: None for the checkpoint's. max_cache_bytes: None for half of the worker's remaining memory.
    """

    load: Mapping[str, Any]
    defaults: Request
    format: PromptFormat
    chat_template: str | None
    batch_size: int
    max_cache_bytes: int | None
    most_tokens: int | None


class Worker:
    """A Ray actor that completes batches of rows."""

    def __init__(self, work: Work, threads: int) -> None:
        torch.set_num_threads(threads)
        loaded = load(**work.load)
        self._work, self._tokenizer = work, loaded.tokenizer
        if work.chat_template is not None:
            self._tokenizer = loaded.tokenizer.with_chat_template(work.chat_template)
        budget = loaded.cache_budget if work.max_cache_bytes is None else work.max_cache_bytes
        self._batch = Batch(loaded, batch_size=work.batch_size, max_cache_bytes=budget)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        parsed = [read_row(int(index), line) for index, line in zip(rows["index"], rows["line"], strict=True)]
        defaults, format, most_tokens = self._work.defaults, self._work.format, self._work.most_tokens
        results = list(complete_rows(self._batch, self._tokenizer, parsed, defaults, format, most_tokens=most_tokens))
        return {
            "index": [result.row.index for result in results],
            "value": [json.dumps(result.value) for result in results],
            "tokens": [result.tokens for result in results],
        }


def complete_on_ray(
    rows: Iterable[InputRow], work: Work, address: str | None, workers: int | None, notify: Callable[[str], None]
) -> Iterator[Result]:
    """Yield results as they come. A worker that dies is restarted, and its rows are repeated.

    address: of the cluster; None to start one on this machine. workers: number of model copies; None for one per node.
    notify: called with messages for the user.

    Ray prints to stdout and stderr, so it runs in a separate process that only sends results.
    Raises UnsupportedError if Ray is not installed, KvgenError if the cluster cannot be reached or fails.
    """
    if importlib.util.find_spec("ray") is None:
        raise UnsupportedError("--ray needs Ray: pip install 'kvgen[ray]'")
    by_index = {row.index: row for row in rows}
    if not by_index:
        return
    items = [{"index": row.index, "line": row.line} for row in by_index.values()]
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    printed, printing = os.pipe()
    driver = context.Process(target=_drive, args=(sending, DupFd(printing), items, work, address, workers))
    driver.start()
    sending.close()
    os.close(printing)
    threading.Thread(target=_listen, args=(printed, notify), daemon=True).start()
    try:
        while (found := receiving.recv()) is not None:
            if isinstance(found, KvgenError):
                raise found
            yield Result(by_index[found["index"]], json.loads(found["value"]), found["tokens"], None, None)
    except EOFError:
        raise KvgenError("the Ray driver process died; the results it sent before are kept") from None
    finally:
        driver.terminate()
        driver.join()


def _listen(printed: int, notify: Callable[[str], None]) -> None:
    with open(printed, "rb") as lines:
        for line in lines:
            if b"worker died" in line:  # Ray's own message
                notify("a worker died; its rows are repeated")


def _drive(
    sending: Connection,
    printing: Any,
    items: list[dict[str, Any]],
    work: Work,
    address: str | None,
    workers: int | None,
) -> None:
    """Run the rows on the cluster; send the results, then None; or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    output = printing.detach()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    import ray
    import ray.data
    from ray.exceptions import RayError

    try:
        _check_address(address)
        ray.init(address=address, **({"include_dashboard": False} if address is None else {}))
    except (OSError, RuntimeError, ValueError) as error:
        sending.send(KvgenError(f"Ray at {address or 'this machine'} cannot be reached ({in_one_line(error)})"))
        return
    try:
        workers = workers or len(ray.nodes())
        threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)
        ray.data.DataContext.get_current().enable_progress_bars = False
        results = ray.data.from_items(items, override_num_blocks=-(-len(items) // _TASK_ROWS)).map_batches(
            Worker,
            fn_constructor_args=(work, threads),
            batch_size=_TASK_ROWS,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
        )
        for found in results.iter_rows():
            sending.send(found)
        sending.send(None)
    except RayError as error:
        sending.send(KvgenError(f"Ray failed: {in_one_line(error)}"))
    finally:
        ray.shutdown()


def _check_address(address: str | None) -> None:
    """Raise OSError if nothing listens at host:port; Ray would retry for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address or "")
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
