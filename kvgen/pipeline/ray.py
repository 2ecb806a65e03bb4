"""Rows on a Ray cluster: Ray Data's pool of actors, each with the model loaded once (extra: ray)."""

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

_TASK_ROWS = 64  # that a worker gets at a time, and that are completed again if it dies
_DIED = b"worker died"  # what Ray prints of it


@dataclass(frozen=True)
class Work:
    """What every worker is told. load: the arguments of `kvgen.load`. The rest is as for `Batch` and `complete_rows`.

    chat_template: instead of the checkpoint's; None for that. max_cache_bytes: None for half of what a worker has left.
    """

    load: Mapping[str, Any]
    defaults: Request
    format: PromptFormat
    chat_template: str | None
    batch_size: int
    max_cache_bytes: int | None
    most_tokens: int | None


class Worker:
    """Lives on the cluster, and completes rows."""

    def __init__(self, work: Work, threads: int) -> None:
        torch.set_num_threads(threads)
        loaded = load(**work.load)
        tokenizer = loaded.tokenizer
        if work.chat_template is not None:
            tokenizer = tokenizer.with_chat_template(work.chat_template)
        self._work, self._tokenizer = work, tokenizer
        budget = loaded.cache_budget if work.max_cache_bytes is None else work.max_cache_bytes
        self._batch = Batch(loaded, batch_size=work.batch_size, max_cache_bytes=budget)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        given = [read_row(int(index), line) for index, line in zip(rows["index"], rows["line"], strict=True)]
        work = self._work
        results = complete_rows(
            self._batch, self._tokenizer, given, work.defaults, work.format, most_tokens=work.most_tokens
        )
        found = list(results)
        return {
            "index": [result.row.index for result in found],
            "value": [json.dumps(result.value) for result in found],
            "tokens": [result.tokens for result in found],
        }


def complete_on_ray(
    rows: Iterable[InputRow], work: Work, address: str | None, workers: int | None, notify: Callable[[str], None]
) -> Iterator[Result]:
    """The result of each row as it comes. A worker that dies is started again, and its rows are completed again.

    address: of the cluster; None for one on this machine. workers: how many models there are; None for one a node.
    notify: told what happens on the cluster that people should know.

    Ray writes to stdout and stderr as it likes, so it runs in a process of its own, which only sends results.
    Raises UnsupportedError where Ray is not installed, KvgenError if the cluster cannot be reached or gives up.
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
    told = (sending, DupFd(printing), items, work, address, workers)
    driver = context.Process(target=_drive, args=told)
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
        raise KvgenError("the process that speaks with Ray has died; what it sent before is there") from None
    finally:
        driver.terminate()
        driver.join()


def _listen(printed: int, notify: Callable[[str], None]) -> None:
    with open(printed, "rb") as lines:
        for line in lines:
            if _DIED in line:
                notify("a worker died; its rows are completed again")


def _drive(
    sending: Connection,
    printing: Any,
    items: list[dict[str, Any]],
    work: Work,
    address: str | None,
    workers: int | None,
) -> None:
    """Run rows on the cluster and send what comes, then None; or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    output = printing.detach()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    import ray
    import ray.data
    from ray.exceptions import RayError

    try:
        _knock(address)
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
        sending.send(KvgenError(f"Ray gave up: {in_one_line(error)}"))
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Raises OSError if nobody answers at host:port; Ray would try for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address or "")
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
