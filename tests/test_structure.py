"""The structure of the module: it imports only the standard library, and chapters use what their banners list."""

import ast
import re
import sys
import unittest

from program import MODULE

SOURCE = MODULE.read_text()


def foreign_imports(source):
    """Return the modules that a source imports from outside the standard library."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module)
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


class Chapter:
    """A chapter of the module. Its banner describes it and lists the chapters that it uses."""

    BANNER = re.compile(r"# =+\n# (\d+)\. ([^:\n]+): [^\n]+\n(?:# Uses: ([^.]+)\.\n)?# =+\n")

    def __init__(self, match, source):
        self.number, self.name = int(match[1]), match[2].lower()
        self.uses = set(re.split(r",\s(?:# )?", match[3])) if match[3] else set()
        self.line = source.count("\n", 0, match.start()) + 1
        self.end = 0


def chapters_of(source):
    found = [Chapter(match, source) for match in Chapter.BANNER.finditer(source)]
    for chapter, following in zip(found, found[1:] + [None], strict=True):
        chapter.end = following.line if following else source.count("\n") + 1
    return found


def chapter_at(line, chapters):
    return next((chapter.name for chapter in chapters if chapter.line <= line < chapter.end), "")


def definitions(tree, chapters):
    """Return {name: chapter} for everything that is defined at the top level."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = chapter_at(node.lineno, chapters)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)):
                found[name.id] = chapter_at(node.lineno, chapters)
    return found


GROUND_FLOOR = {"vocabulary", "references", "manifests"}  # all chapters may use these


def used(source):
    """Return {chapter: chapters whose names its code uses}, except itself and GROUND_FLOOR."""
    tree, chapters = ast.parse(source), chapters_of(source)
    known = definitions(tree, chapters)
    found = {chapter.name: set() for chapter in chapters}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and known.get(node.id) and chapter_at(node.lineno, chapters):
            found[chapter_at(node.lineno, chapters)].add(known[node.id])
    return {name: names - {name} - GROUND_FLOOR for name, names in found.items()}


def undocumented(source):
    """Return the public classes, functions and methods without a docstring."""
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
# 1. First: the one
# Uses: third.
# ====
def early(x: Late): return LATE
# ====
# 2. Second: the other
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

    def test_syntax_is_python_3_10(self):
        ast.parse(SOURCE, feature_version=(3, 10))

    def test_banners_list_the_used_chapters(self):
        self.assertEqual({"first": {"second"}, "second": {"first"}}, used(BAD))
        self.assertEqual({"first": {"third"}, "second": set()}, {c.name: c.uses for c in chapters_of(BAD)})
        said = {chapter.name: chapter.uses - GROUND_FLOOR for chapter in chapters_of(SOURCE)}
        self.assertEqual(said, used(SOURCE))

    def test_chapters_use_only_chapters_above(self):
        order = [chapter.name for chapter in chapters_of(SOURCE)]
        for chapter in chapters_of(SOURCE):
            with self.subTest(chapter.name):
                self.assertEqual(set(), chapter.uses - set(order[:chapter.number - 1]))

    def test_chapters_are_in_order(self):
        self.assertEqual([1, 2], [chapter.number for chapter in chapters_of(BAD)])
        self.assertEqual(list(range(1, len(chapters_of(SOURCE)) + 1)), [c.number for c in chapters_of(SOURCE)])
        self.assertEqual(len(re.findall(r"(?m)^# \d+\. ", SOURCE)), len(chapters_of(SOURCE)))

    def test_no_chapter_is_long_or_short(self):
        self.assertEqual([], [(c.name, c.end - c.line) for c in chapters_of(SOURCE)
                              if not 120 <= c.end - c.line <= 500])

    def test_docstring_lists_the_chapters(self):
        listed = re.findall(r"(?m)^ {4,5}(\d+) ([a-z-]+(?: [a-z]+)?)  +\S", ast.get_docstring(ast.parse(SOURCE), False))
        self.assertEqual([(str(c.number), c.name) for c in chapters_of(SOURCE)], listed)

    def test_public_names_are_documented(self):
        self.assertEqual(["early", "Late.method"], undocumented(BAD))
        self.assertEqual([], undocumented(SOURCE))

    def test_exported_names_exist(self):
        exported = next(ast.literal_eval(node.value) for node in ast.parse(SOURCE).body
                        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
        known = definitions(ast.parse(SOURCE), chapters_of(SOURCE))
        self.assertEqual([], [name for name in exported if name not in known])


if __name__ == "__main__":
    unittest.main()
