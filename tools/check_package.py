"""Checks of the built package: `metadata WHEEL` compares the wheel with the checkout, `imports FOLDER`
imports the copy installed in FOLDER, `floors PYTHON` looks whether that interpreter has exactly the lowest versions
of settings.ini. Prints what is wrong and exits with 1, or exits with 0. `lowest` prints these versions for pip."""

import pkgutil
import re
import subprocess
import sys
import warnings
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from importlib import import_module
from pathlib import Path
from runpy import run_path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CORE = '''theory model.surgery model.optim core.objects core.sites core.measure methods train.growth train.schedules
    train.flops train.checkpoint'''.split()
HEAVY = {'fastai', 'pandas', 'matplotlib', 'ipywidgets'}


def expected():
    "Every metadata field that the wheel must carry, from pyproject.toml, settings.ini, README.md and the package"
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    facts = settings()
    return {
        'Name': [project['name']],
        'Summary': [project['description']],
        'Requires-Python': [project['requires-python']],
        'Version': [run_path(str(ROOT / 'gradmax_nb' / '__init__.py'))['__version__']],
        'Author': [', '.join(o['name'] for o in project['authors'])],
        'Keywords': [','.join(facts['keywords'][0].split())],
        'Classifier': facts['classifiers'],
        'License-Expression': facts['license'],
        'License-File': ['LICENSE'],
        'Provides-Extra': ['dev'],
        'Requires-Dist': [requirement(o) for o in facts['requirements']]
        + [requirement(o, 'dev') for o in facts['dev_requirements']],
        'Description-Content-Type': ['text/markdown'],
        'Description': [(ROOT / 'README.md').read_text(encoding='utf-8').strip()],
        'entry points': facts['console_scripts'] + ['gradmax_nb=gradmax_nb._modidx:d'],
        'modules': [p.relative_to(ROOT).as_posix() for p in (ROOT / 'gradmax_nb').rglob('*.py')],
    }


def settings():
    "The lists of settings.ini by name"
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return {k: [o.strip() for o in v.splitlines() if o.strip()] for k, v in ini['DEFAULT'].items()}


def lowest():
    "`name==version` of every requirement at its lowest, and what runs the notebooks, as pip reads constraints"
    facts = settings()
    for text in facts['requirements']:
        name, mark, version = text.partition('>=')
        if not mark or not re.fullmatch(r'[0-9.]+', version):
            raise ValueError(f'settings.ini requires {text!r}: give a lowest version, {name}>=...')
        yield f'{name}=={version}'
    yield from (o for o in facts['dev_requirements'] if o.startswith(('nbdev==', 'fastcore==')))


def floors(python):
    "Where the packages of the interpreter `python` are not at their lowest versions"
    from packaging.version import Version

    want = dict(o.split('==') for o in lowest())
    script = 'import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))'
    child = subprocess.run([python, '-c', script, *want], capture_output=True, text=True, check=True)
    for (name, low), have in zip(want.items(), child.stdout.split()):
        if Version(low) != Version(have.partition('+')[0]):
            yield f'{name}: {low} was asked for, {have} is there'


def requirement(text, extra=None):
    "A requirement in one spelling, with the marker of its extra"
    from packaging.requirements import Requirement

    name, _, marker = text.partition(';')
    markers = [o for o in (marker.strip(), extra and f'extra == "{extra}"') if o]
    return str(Requirement(name + (';' + ' and '.join(markers) if markers else '')))


def found(wheel):
    "The same fields as the wheel has them"
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        info = next(o for o in names if o.endswith('.dist-info/METADATA')).rpartition('/')[0]
        meta = message_from_bytes(z.read(f'{info}/METADATA'))
        points = ConfigParser(delimiters=['='])
        points.read_string(z.read(f'{info}/entry_points.txt').decode())
    fields = {k: [str(o) for o in meta.get_all(k)] for k in meta.keys() if k not in ('Metadata-Version', 'Dynamic')}
    fields['Requires-Dist'] = [requirement(o) for o in fields.get('Requires-Dist', [])]
    return {
        **fields,
        'Description': [meta.get_payload(decode=True).decode('utf-8').strip()],
        'entry points': [f'{k}={v}' for s in points.sections() for k, v in points[s].items()],
        'modules': [o for o in names if o.endswith('.py')],
    }


def metadata(wheel):
    "What differs between the wheel and the checkout"
    want, have = expected(), found(wheel)
    for k in sorted({*want, *have}):
        a, b = sorted(want.get(k, [])), sorted(have.get(k, []))
        if a != b:
            yield f'{k}: the checkout says {a}, the wheel says {b}'


def imports(folder):
    "What goes wrong when every module of the package in `folder` is imported, with its own warnings as errors"
    folder = Path(folder).resolve()
    sys.path.insert(0, str(folder))
    warnings.filterwarnings('error', module=r'gradmax_nb(\.|$)')
    package = import_module('gradmax_nb')
    if folder not in Path(package.__file__).resolve().parents:
        yield f'gradmax_nb came from {package.__file__}'
    for path in sorted((folder / 'gradmax_nb').rglob('*.py')):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            compile(path.read_text(encoding='utf-8'), str(path), 'exec')
    names = [m.name for m in pkgutil.walk_packages(package.__path__, 'gradmax_nb.') if not m.name.endswith('__main__')]
    for name in names:
        try:
            import_module(name)
        except Exception as e:
            yield f'{name}: {type(e).__name__}: {e}'
    yield from brought('import gradmax_nb', HEAVY | {'torch'}, folder)
    yield from brought('from gradmax_nb import *', HEAVY, folder)
    for name in CORE:
        yield from brought(f'import gradmax_nb.{name}', HEAVY, folder)


def brought(statement, unwanted, folder):
    "What goes wrong when `statement` is run in a fresh interpreter, or which of the `unwanted` modules it imports"
    script = f'import sys; sys.path.insert(0, {str(folder)!r}); {statement}; print(*{unwanted} & sys.modules.keys())'
    child = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=folder)
    if child.returncode:
        yield f'{statement}, alone: {child.stderr.strip().splitlines()[-1]}'
    elif child.stdout.strip():
        yield f'{statement} imports {child.stdout.strip()}'


def main(check, path):
    problems = list({'metadata': metadata, 'imports': imports, 'floors': floors}[check](path))
    for o in problems:
        print(o)
    return bool(problems)


if __name__ == '__main__':
    if sys.argv[1:] == ['lowest']:
        print('\n'.join(lowest()))
    else:
        sys.exit(main(*sys.argv[1:]))
