"""A comparison as a JUnit XML report for CI systems: a test for each right pattern and each use of the cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from kvgen.comparison.crosscheck import Agreement
from kvgen.comparison.verdict import ACCEPTABLE

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class _Test:
    """failure, skipped: why; "" if it is not."""

    name: str
    failure: str = ""
    skipped: str = ""
    seconds: float = 0.0


def as_junit(report: dict[str, Any]) -> str:
    """Return the XML of a report of `kvgen compare`: a suite for each prompt, without patterns wrong on purpose."""
    root = ElementTree.Element("testsuites", name="kvgen compare")
    for comparison in report["comparisons"]:
        tests = [test for pattern in comparison["patterns"] for test in _tests(pattern, len(comparison["text_ids"]))]
        if check := comparison.get("cross_check"):
            tests.append(_cross_check(check))
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=_printable(f"{report['backend']}: {comparison['prompt']}"),
            tests=str(len(tests)),
            failures=str(sum(bool(test.failure) for test in tests)),
            errors="0",
            skipped=str(sum(bool(test.skipped) for test in tests)),
            time=f"{sum(test.seconds for test in tests):.3f}",
        )
        for test in tests:
            classname = _printable(report["model"])
            case = ElementTree.SubElement(
                suite, "testcase", classname=classname, name=test.name, time=f"{test.seconds:.3f}"
            )
            for kind in ("failure", "skipped"):
                if reason := getattr(test, kind):
                    ElementTree.SubElement(case, kind, message=_printable(reason))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _cross_check(check: dict[str, Any]) -> _Test:
    why = " ".join(f"{found['text']} ({found['evidence']})" for found in check["findings"])
    failed = check["verdict"] == Agreement.DIFFERENT.value
    return _Test(f"against {check['reference']}", failure=f"{check['verdict']}. {why}" if failed else "")


def _tests(pattern: dict[str, Any], steps: int) -> Iterator[_Test]:
    if pattern["write_instead"] or pattern["pattern"] == "uncached":
        return
    name, verdict, speed = pattern["pattern"], pattern["verdict"], pattern["tokens_per_second"]
    reasons = [pattern["reason"], *(f"{found['text']} ({found['evidence']})" for found in pattern["findings"])]
    why = f"{verdict}. {' '.join(filter(None, reasons))}"
    failed = verdict not in {accepted.value for accepted in ACCEPTABLE}
    yield _Test(name, failure=why if failed else "", seconds=steps / speed if speed else 0.0)
    for probe in pattern["probes"]:
        if probe["wrong"]:
            far = "the cache failed" if probe["ratio"] is None else f"{probe['ratio']:.3g} times the noise"
            yield _Test(f"{name}: {probe['name']}", failure=f"{probe['finding'][1]} ({probe['note'] or far})")
        else:
            yield _Test(f"{name}: {probe['name']}", skipped=probe["note"])


def _printable(text: str) -> str:
    """Replace characters that XML cannot hold."""
    return _NOT_IN_XML.sub("\ufffd", text)
