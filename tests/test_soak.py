"""A minute of soak.py, and seconds of load.py. Longer runs are made by hand: python tests/soak.py --minutes 20."""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import lab
from program import takes_long

FOLDER = Path(__file__).parent


class ToolCase(unittest.TestCase):
    def run_tool(self, *command, status=0, **environment):
        """Run Python in the folder of the tests; return its output. Stores that are kept are removed."""
        with tempfile.TemporaryDirectory() as folder:
            result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600,
                                    cwd=FOLDER, env={**os.environ, "TMPDIR": folder, **environment})
        self.assertEqual(status, result.returncode, result.stdout + result.stderr)
        return result.stdout


@takes_long
class TestWithoutEngines(ToolCase):
    def test_soak(self):
        out = self.run_tool("soak.py", "--minutes", "0.15", "--seed", "7", "--engine", "none")
        self.assertIn("losses: none", out)

    def test_load(self):
        out = self.run_tool("load.py", "--clients", "20", "--seconds", "3", "--engine", "fake")
        self.assertIn("all is well", out)

    def test_soak_without_lab(self):
        self.run_tool("soak.py", "--engine", "containerd", status=2, LAB_DIR="/nowhere", LAB_IS_UP="")


@takes_long
class TestWithEngine(ToolCase):
    engine = lab.ENGINES["mirrors"]

    def setUp(self):
        lab.require()

    def test_soak(self):
        out = self.run_tool("soak.py", "--minutes", "1", "--seed", "1", "--engine", self.engine.name)
        self.assertIn("losses: none", out)


@takes_long
class TestFindings(ToolCase):
    """Both tools notice what is wrong: a program that says of each tag that it is another one, or answers at random."""

    BROKEN = """
import random, sys, {tool} as tool, program
sys.argv[0] = "{tool}.py"
start = program.Program.__init__
def broken(self, *arguments, **options):
    code = ("import sys; sys.path.insert(0, {folder!r}); import k3d_registry_dockerd as module;"
            "module.Repository.{method} = {replacement}; sys.exit(module.main())")
    start(self, *arguments, **{{**options, "command": [sys.executable, "-c", code]}})
program.Program.__init__ = broken
sys.exit(tool.main())
"""

    def run_broken(self, tool, method, replacement, *arguments):
        code = self.BROKEN.format(tool=tool, folder=str(FOLDER.parent), method=method, replacement=replacement)
        return self.run_tool("-c", code, *arguments, status=1)

    def test_soak_finds_a_deletion_that_was_not_done(self):
        out = self.run_broken("soak", "delete_tag", "lambda self, tag: True", "--minutes", "0.05", "--engine", "none")
        self.assertIn("FINDING", out)

    def test_load_finds_a_wrong_status(self):
        out = self.run_broken("load", "manifest", "lambda self, target: None", "--clients", "4", "--seconds", "1",
                              "--engine", "fake")
        self.assertIn("PROBLEM: GET manifest", out)


if __name__ == "__main__":
    unittest.main()
