"""Runs the notebooks as tests: `python tools/run_tests.py`, or with names: `00_sites tutorials/01_ten_lines`.

The work is done by nbdev-test in a child process; the last line counts notebooks: `N passed, N failed`."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fastcore.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells

ROOT = Path(__file__).resolve().parent.parent


def select(names):
    "All notebooks, or those whose path below nbs/ ends with one of `names` (the extension may be left out)"
    paths = {
        p.relative_to(ROOT / 'nbs').with_suffix('').as_posix(): p for p in sorted(nbglob(ROOT / 'nbs', as_path=True))
    }
    if not names:
        return list(paths.values())
    found = []
    for name in names:
        name = name.removesuffix('.ipynb').removeprefix('nbs/')
        hits = [p for k, p in paths.items() if f'/{k}'.endswith(f'/{name}')]
        if not hits:
            sys.exit(f'no notebook {name!r}; there are: {", ".join(paths)}')
        found += [p for p in hits if p not in found]
    return found


def run(paths):
    "Run nbdev-test on `paths`, pass on what it prints; returns what finished, what failed, the exit code"
    pattern = '|'.join(f'{re.escape(str(p))}$' for p in paths)
    workers = min(len(paths), os.cpu_count() or 1)
    bins = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    cmd = [
        shutil.which('nbdev-test', path=bins),
        '--do-print',
        '--path-re',
        pattern,
        '--n-workers',
        str(workers if workers > 1 else 0),
    ]
    # One thread a worker: the workers share the cores.
    env = {'OMP_NUM_THREADS': '1', **os.environ, 'PYTHONUNBUFFERED': '1'}
    child = subprocess.Popen(
        cmd, cwd=ROOT, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    began, finished, failed = {}, set(), []
    for line in child.stdout:
        # Two workers may write into one line, so look for every mark in it.
        marks = re.findall(r'(Starting|- Completed) (.+?\.ipynb)', line)
        for mark, path in marks:
            if mark == 'Starting':
                began[path] = time.time()
            else:
                finished.add(path)
                print(f'{time.time() - began[path]:6.1f} s  {Path(path).relative_to(ROOT / "nbs")}', flush=True)
        failed += re.findall(r'^\t(\S+\.ipynb)$', line)
        if not marks:
            print(line, end='', flush=True)
    return finished, failed, child.wait()


def count(paths, flags):
    "How many cells of `paths` run, are skipped by `flags`, and are marked `eval: false`"
    run_, all_ = (sum(len(nb_test_cells(p, o)) for p in paths) for o in (flags, None))
    code = sum(c.cell_type == 'code' and bool(c.source.strip()) for p in paths for c in read_nb(p).cells)
    return run_, all_ - run_, code - all_


def main(names):
    os.chdir(ROOT)
    paths, flags = select(names), get_config().tst_flags.split()
    tests = [p for p in paths if nb_test_cells(p, flags)]
    if not tests:
        sys.exit('no notebook has a cell to run')
    finished, failed, code = run(tests)
    n_failed = max(len(failed), len(tests) - len(finished), int(code != 0))
    cells, flagged, off = count(paths, flags)
    print(
        f'{len(paths)} notebooks, {len(paths) - len(tests)} of them without code to run; '
        f'{cells} cells to run, {flagged} skipped by flags ({", ".join(flags)}), {off} marked eval: false'
    )
    print(f'{len(tests) - n_failed} passed, {n_failed} failed')
    return bool(n_failed)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
