"""The glossary names classes that exist, and the words that the code is built on."""

from __future__ import annotations

import ast
import re

from tests.docs.blocks import ROOT

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
SOURCES = sorted((ROOT / "src" / "weightferry").rglob("*.py"))
PROJECT_WORDS = "domain leader follower origin piece manifest survey plan heartbeat stage collect relay ring"


def test_every_class_in_the_table_exists() -> None:
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    classes = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    table = GLOSSARY.partition("## Class names in the code")[2]
    named = {name for row in re.findall(r"^\|(.*)$", table, re.MULTILINE) for name in re.findall(r"`([A-Z]\w+)`", row)}
    assert len(named) > 40
    assert named <= classes, f"no such class: {sorted(named - classes)}"


def test_every_word_of_the_project_is_there() -> None:
    rows = re.findall(r"^\| ([^|]*) \|", GLOSSARY, re.MULTILINE)
    words = {word.strip() for row in rows for word in row.split(",")}
    missing = [word for word in PROJECT_WORDS.split() if word not in words]
    assert not missing, f"not explained: {missing}"
