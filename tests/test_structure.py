"""The shape of the module: the standard library only, and sections that name only what is above them."""

import ast
import re
import sys
import unittest

from program import MODULE

SOURCE = MODULE.read_text()


def foreign_imports(source):
    """The modules that a source imports from outside the standard library."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module)
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def sections(source):
    """(line, number) of each banner."""
    lines = source.splitlines()
    return [(at, int(match[1])) for at, line in enumerate(lines, 1)
            if (match := re.match(r"# (\d+)\. \w", line)) and lines[at - 2].startswith("# ====")]


def section_of(line, banners):
    return max((number for at, number in banners if at <= line), default=0)


def definitions(tree, banners):
    """Name -> section, for all that is defined at the top level."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = section_of(node.lineno, banners)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)):
                found[name.id] = section_of(node.lineno, banners)
    return found


def looks_down(source):
    """(line, name) wherever a section names something of a section below it."""
    tree, banners = ast.parse(source), sections(source)
    known = definitions(tree, banners)
    return [(node.lineno, node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)
            and known.get(node.id, 0) > section_of(node.lineno, banners)]


def undocumented(source):
    """Public classes, functions and methods without a docstring."""
    missing = []

    def visit(body, prefix=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    missing.append(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{node.name}.")

    visit(ast.parse(source).body)
    return missing


BAD = '''
import os, requests
from . import sibling
# ====
# 1. First
# ====
def early(x: Late): return LATE
# ====
# 2. Second
# ====
class Late:
    """Documented."""
    def method(self): return early
LATE: int = 1
'''


class TestStructure(unittest.TestCase):
    def test_standard_library_only(self):
        self.assertEqual({"requests", "."}, foreign_imports(BAD))
        self.assertEqual(set(), foreign_imports(SOURCE))

    def test_it_is_python_3_10(self):
        ast.parse(SOURCE, feature_version=(3, 10))

    def test_sections_name_only_what_is_above(self):
        self.assertEqual([(7, "LATE"), (7, "Late")], sorted(looks_down(BAD)))
        self.assertEqual([], looks_down(SOURCE))

    def test_sections_are_in_order(self):
        self.assertEqual([1, 2], [number for _, number in sections(BAD)])
        self.assertEqual(list(range(1, 10)), [number for _, number in sections(SOURCE)])

    def test_all_that_is_public_is_documented(self):
        self.assertEqual(["early", "Late.method"], undocumented(BAD))
        self.assertEqual([], undocumented(SOURCE))

    def test_what_is_exported_exists(self):
        exported = next(ast.literal_eval(node.value) for node in ast.parse(SOURCE).body
                        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
        known = definitions(ast.parse(SOURCE), sections(SOURCE))
        self.assertEqual([], [name for name in exported if name not in known])


if __name__ == "__main__":
    unittest.main()
