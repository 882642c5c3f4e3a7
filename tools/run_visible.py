"""Runs what a page shows: `python tools/run_visible.py [--folded] [NOTEBOOK...]`.

The code cells that a reader sees, and nothing that is hidden or folded (with `--folded`: nothing hidden), become one
script for a fresh interpreter in an empty folder. Without names it runs the home page, Start and the tutorials. Ends
with `N passed, N failed`."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / 'nbs'
HIDDEN = re.compile(r'^#\| *(hide(_input)? *$|include: *false|echo: *false|eval: *false)', re.M)
FOLDED = re.compile(r'^#\| *code-fold', re.M)


def pages():
    "The pages that promise to run as shown"
    return [NBS / 'index.ipynb', *sorted((NBS / 'start').glob('*.ipynb')), *sorted((NBS / 'tutorials').glob('*.ipynb'))]


def shown(path, folded=False):
    "The code that the page of a notebook shows, with or without what lies in a fold"
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    cells = [''.join(c['source']) for c in found if c['cell_type'] == 'code']
    kept = [s for s in cells if not HIDDEN.search(s) and (folded or not FOLDED.search(s))]
    return '\n\n'.join(re.sub(r'^#\|.*\n?', '', s, flags=re.M) for s in kept)


def run(code):
    "What a fresh interpreter says about `code`: an error, or nothing"
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / 'page.py'
        script.write_text(code + '\n', encoding='utf-8')
        done = subprocess.run(
            [sys.executable, script.name], cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    return done.stderr.strip()[-2000:] if done.returncode else ''


def main(*names):
    passed = failed = 0
    folded = '--folded' in names
    for path in [Path(n) for n in names if n != '--folded'] or pages():
        start, error = time.perf_counter(), run(shown(path, folded))
        passed, failed = passed + (not error), failed + bool(error)
        print(f"{'FAILED' if error else 'ok'}: {path.stem} ({time.perf_counter() - start:.0f} s)", flush=True)
        if error:
            print(error)
    print(f'{passed} passed, {failed} failed')
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
