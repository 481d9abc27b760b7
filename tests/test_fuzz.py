"""A short run of each target of fuzz.py. Longer runs are made by hand: python tests/fuzz.py --seconds 600."""

import subprocess
import sys
import unittest
from pathlib import Path

from program import takes_long

FUZZ = Path(__file__).with_name("fuzz.py")


class TestFuzz(unittest.TestCase):
    def fuzz(self, *arguments):
        return subprocess.run([sys.executable, FUZZ, *arguments], capture_output=True, text=True, timeout=300)

    @takes_long
    def test_all_targets(self):
        result = self.fuzz("--seconds", "0.4")
        self.assertEqual((0, ""), (result.returncode, result.stderr), result.stdout)
        self.assertGreater(result.stdout.count(" inputs, 0 findings\n"), 10)

    def test_findings_fail(self):
        code = ("import sys, fuzz; fuzz.target('x', errors=(ValueError,))(lambda data: {}[data]); "
                "fuzz.TARGETS = {'broken': fuzz.TARGETS['<lambda>']}; sys.exit(fuzz.main())")
        result = subprocess.run([sys.executable, "-c", code, "--seconds", "0.1"], capture_output=True, text=True,
                                timeout=300, cwd=FUZZ.parent)
        self.assertEqual(1, result.returncode, result.stderr)
        self.assertIn("KeyError", result.stdout)
        self.assertIn("(b'x')", result.stdout)

    def test_unknown_target(self):
        self.assertEqual(2, self.fuzz("nothing").returncode)


if __name__ == "__main__":
    unittest.main()
