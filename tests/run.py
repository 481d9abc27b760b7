"""Runs all tests, those of each engine in a process of its own, several at the same time.

    python tests/run.py [--jobs N] [--quick]

Tests of one engine never run at the same time: some of them stop it, or look at all of its images. --quick leaves out
the tests that need an engine, and those that take long. What fails is run once more when all else is done, since a
machine that does several things at once can be too slow for a test that waits; what passes then is named as unsteady,
to be mended. Exit status: 0 if all tests pass, the first or the second time, 1 if not.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import time
import unittest
from pathlib import Path

import lab

TESTS = Path(__file__).resolve().parent
SLOW = ("test_adoption", "test_browsers", "test_command_line", "test_damage", "test_deadlines", "test_faults",
        "test_fuzz", "test_hostile", "test_kill", "test_soak", "test_start_and_stop", "test_verify")
FREE_LANES = 2
LIMIT = 900  # seconds that a process may take: then it says in which test it is, and ends
COMMAND = ("import faulthandler, sys, unittest; "
           f"faulthandler.dump_traceback_later({LIMIT}, exit=True); unittest.main(module=None)")


def classes(suite):
    """Return the classes of a suite's tests, in order, each once."""
    if isinstance(suite, unittest.TestSuite):
        return list(dict.fromkeys(found for part in suite for found in classes(part)))
    return [type(suite)]


def lanes(found):
    """Return {name: names of test classes}: one for each engine, and FREE_LANES for the tests without any."""
    result, modules = {}, {}
    for case in found:
        engine = getattr(case, "engine", None)
        number = modules.setdefault(case.__module__, len(modules) % FREE_LANES + 1)
        name = engine.name if engine else f"no engine, {number}"
        result.setdefault(name, []).append(f"{case.__module__}.{case.__qualname__}")
    return result


def failed_tests(output, cases):
    """Return the names, as unittest takes them, of the tests that an output says have failed, or of their classes."""
    found = re.findall(r"^(?:FAIL|ERROR): (\w+) \(([\w.]+)\)", output, re.MULTILINE)
    names = []
    for test, where in found:
        if test in ("setUpModule", "tearDownModule"):
            names += [case for case in cases if case.startswith(f"{where}.")]
        else:
            is_whole = test in ("setUpClass", "tearDownClass") or where.endswith(f".{test}")
            names.append(where if is_whole else f"{where}.{test}")
    return list(dict.fromkeys(names))


def run(name, cases):
    """Run the tests of a lane. Return the names of those that fail, or all if the process crashed."""
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", COMMAND, *cases], cwd=TESTS, check=False, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "TESTS": "all", "LAB_NAMESPACE": re.sub(r"\W+", "-", name)})
    passed = result.returncode == 0
    summary = (result.stdout.splitlines() or [""])[-1]
    print(f"--- {name}: {'passed' if passed else 'FAILED'} in {time.monotonic() - begin:.0f} s: {summary}")
    if not passed:
        print(result.stdout)
    sys.stdout.flush()
    return [] if passed else failed_tests(result.stdout, cases) or cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--quick", action="store_true", help="leave out tests that need an engine, or take long")
    arguments = parser.parse_args()
    cases = [case for case in classes(unittest.defaultTestLoader.discover(str(TESTS)))
             if case.__name__ != "ModuleSkipped"]  # unittest's own, for files that need a missing package
    if arguments.quick:
        cases = [case for case in cases if not hasattr(case, "engine") and case.__module__ not in SLOW]
    if lab.is_up():
        os.environ["LAB_IS_UP"] = "yes"
    found = lanes(cases)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        # The longest first: those of the engines, and of them those with the most classes.
        order = sorted(found, key=lambda name: (name.startswith("no engine"), -len(found[name])))
        failed = dict(zip(order, pool.map(lambda name: run(name, found[name]), order), strict=True))
    again = {name: run(name, cases) for name, cases in failed.items() if cases}
    for name, cases in failed.items():
        for case in cases:
            print(f"--- {name}: {'FAILED twice' if again[name] else 'UNSTEADY, passed when run again'}: {case}")
    return 1 if any(again.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
