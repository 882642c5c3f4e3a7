"""What holds for the whole house: `python tools/house.py` prints what breaks its rules and exits with 1, or with 0.

Modules import earlier ones only, in the reading order of the notebooks, and nobody's private names; each says its one
job in its first line; none is longer than 400 lines but the two that are to be replaced; only its wings import fastai,
matplotlib and ipywidgets; exported lines have at most 120 columns; a notebook runs its first example within ten code
cells and has no long run of definitions."""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WINGS = '.', 'model', 'core', 'methods', 'train', 'show', 'experiments'
LAST = ('cli',)  # the command line uses everything
LONG = 'core.sites', 'core.measure'
EXPERIMENTS = 2000  # lines of all experiments together, without blanks and cell marks
HEAVY = {
    'fastai': ('train', 'show', 'experiments'),
    'matplotlib': ('show', 'experiments'),
    'ipywidgets': ('show', 'experiments'),
}


def notebooks(folder='.'):
    "The notebooks of one folder below nbs/ in reading order"
    return sorted(p for p in (ROOT / 'nbs' / folder).glob('*.ipynb') if not p.name.startswith('_'))


def cells(path):
    "`(source, exported)` of every code cell of a notebook"
    found = [
        ''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'
    ]
    return [(s, bool(re.match(r'#\| *export', s))) for s in found if s.strip()]


def reading_order():
    "The modules of the library, `train.growth` and so on, as people read them"
    found = [
        m[1]
        for wing in WINGS
        for p in notebooks(wing)
        for s, _ in cells(p)
        if (m := re.match(r'#\| *default_exp +(\S+)', s))
    ]
    return [n for n in found if n not in LAST] + [n for n in found if n in LAST]


def source(module):
    "The text of a module"
    return (ROOT / 'gradmax_nb' / Path(*module.split('.'))).with_suffix('.py').read_text(encoding='utf-8')


def imported(module):
    "`(module, names)` of every import of this package in `module`, those inside functions too"
    parts = module.split('.')
    for node in ast.walk(ast.parse(source(module))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            path = [*parts[: len(parts) - node.level], *filter(None, [node.module])]
        elif (node.module or '').split('.')[0] == 'gradmax_nb':
            path = node.module.split('.')[1:]
        else:
            continue
        yield '.'.join(path), [o.name for o in node.names]


def arrows(order):
    "Imports of later modules, and of private names"
    for i, module in enumerate(order):
        for other, names in imported(module):
            if other in order:
                targets = [other]
            else:  # names are modules of a wing, or what its `__init__` passes on
                named = [o for n in names if (o := f'{other}.{n}'.strip('.')) in order]
                targets = named or [o for o in order if other and o.startswith(f'{other}.')]
            late = [n for n in targets if order.index(n) > i]
            if other == '' and names == ['__version__']:
                continue
            if late:
                yield f'{module} imports {late[0]}, which comes later'
            for n in names:
                if n.startswith('_') and n != '__version__':
                    yield f'{module} imports the private name {n} of {other}'


def rooms(order):
    "Modules without a sentence on their job, too long, or with an import that belongs elsewhere"
    for module in order:
        text = source(module)
        tree, lines, wing = ast.parse(text), text.splitlines(), module.split('.')[0]
        if not (ast.get_docstring(tree) or '').strip():
            yield f'{module} does not say its job in its first line'
        if len(lines) > 400 and module not in LONG:
            yield f'{module} has {len(lines)} lines'
        head = text[: text.find('\n# %% ', text.find('__all__'))].count('\n') if '__all__' in text else 0  # nbdev's own
        for i, line in enumerate(lines, 1):
            if len(line) > 120 and (i == 1 or i > head):
                yield f'{module}, line {i}: {len(line)} columns'
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        roots = {
            n.split('.')[0]
            for o in top
            for n in ([o.module or ''] if isinstance(o, ast.ImportFrom) else [a.name for a in o.names])
        }
        for heavy, wings in HEAVY.items():
            if heavy in roots and wing not in wings:
                yield f'{module} imports {heavy}'


def size(order):
    "The experiments, if they have too many lines"
    texts = [source(m) for m in order if m.startswith('experiments.')]
    n = sum(bool(o.strip()) and not o.startswith('# %%') for t in texts for o in t.splitlines())
    if n > EXPERIMENTS:
        yield f'the experiments have {n} lines'


def pages():
    "Notebooks that begin with code that only defines, or define too much at a stretch"
    for path in (p for wing in (*WINGS, 'start', 'promises', 'tutorials') for p in notebooks(wing)):
        name, run, first = path.relative_to(ROOT / 'nbs'), 0, None
        for i, (text, exported) in enumerate(cells(path)):
            passive = bool(re.match(r'#\| *(default_exp|hide)|(import|from) ', text))
            if not exported and not passive and first is None:
                first = i
            run = run + exported if exported or passive else 0
            if run > 6 and exported:
                yield f'{name}: more than six exported cells in a row, up to cell {i}'
                run = 0
        if first is None or first >= 10:
            yield f'{name}: the first example is code cell {first}'


def problems():
    "Everything that breaks a rule, in words"
    order = reading_order()
    return [*arrows(order), *rooms(order), *size(order), *pages()]


if __name__ == '__main__':
    found = problems()
    print('\n'.join(found))
    sys.exit(bool(found))
