"""The record of what was measured, results.json: one line for each run.

exercises.py alone writes it. The tables in both READMEs are made from it, and tests compare the
figures in the text with it.
"""
import ast
import hashlib
import json
import platform
import re
from pathlib import Path

import torch

RECORD = Path(__file__).with_name('results.json')
ON_EACH_PROCESSOR = ('our text', 'classic corpus')  # groups with a row for each kind of processor


def short_hash(string):
    return hashlib.sha256(string.encode()).hexdigest()[:12]


def code_hash(source, hyperparameters):
    """A hash of what a script does: not of its comments and docstrings, and of each of these
    hyperparameters only the last value, which counts.
    """
    tree, later = ast.parse(source), set()
    for statement in reversed(tree.body):
        names = {target.id for target in getattr(statement, 'targets', ())
                 if isinstance(target, ast.Name) and target.id in hyperparameters}
        if names & later:
            tree.body.remove(statement)
        later |= names
    for node in ast.walk(tree):
        if (isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node) is not None):
            del node.body[0]
    return short_hash(ast.unparse(tree).replace('"', "'"))  # some versions use other quotes


def processor():
    """The name of the processor, and the widest vectors that torch uses on it."""
    try:
        name = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor that has no such line
        name = platform.processor() or platform.machine()
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'


class Record:
    """The rows of a results.json, each a dictionary."""

    def __init__(self, path=RECORD):
        self.path = path
        self.rows = json.loads(path.read_text(encoding='utf-8')) if path.exists() else []

    def find(self, **fields):
        """The rows that have these values."""
        return [row for row in self.rows
                if all(row.get(name) == value for name, value in fields.items())]

    def add(self, row):
        """Puts a row in the place of older ones of the same exercise, variant and seed. (Where each
        processor counts, those of other processors stay, if they are from the same code.)
        """
        def name(row):
            return str(row['exercise']).zfill(2), row['variant'], row['seed']

        def stays(other):
            return name(other) != name(row) or (
                row['exercise'] in ON_EACH_PROCESSOR and other['code'] == row['code']
                and other['processor'] != row['processor'])
        self.rows = [other for other in self.rows if stays(other)] + [row]
        self.rows.sort(key=name)
        lines = ',\n'.join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        new_path = self.path.with_suffix('.json.new')  # renamed when complete
        new_path.write_text(f'[\n{lines}\n]\n', encoding='utf-8')
        new_path.replace(self.path)
