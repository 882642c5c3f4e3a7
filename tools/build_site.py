"""Renders the notebooks of nbs/ to the static site in docs/: `python tools/build_site.py`, or FOLDER.
The home page is also written as README.md.

nbdev runs imports, exports and `show_doc`; this script rewrites the result for Sphinx (myst-nb, furo) and checks it.
All other outputs are the ones stored in the notebooks, and the same notebooks always give the same bytes."""

import inspect
import json
import os
import re
import shutil
import sys
import warnings
from base64 import b64decode
from functools import partial
from importlib import import_module
from operator import attrgetter
from io import StringIO
from pathlib import Path

os.environ.setdefault('SOURCE_DATE_EPOCH', '315532800')
os.environ['IN_TEST'] = '1'

import nbdev.processors
import nbdev.showdoc
from fastcore.docments import docments
from fastcore.nbio import read_nb
from nbdev.config import nbpath2html
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.frontmatter import FrontmatterProc
from sphinx.application import Sphinx
from sphinx.util.console import nocolor

import check_pages
import house

ROOT = Path(__file__).resolve().parent.parent
NBS, DOCS, SITE, HTML = ROOT / 'nbs', ROOT / 'docs', ROOT / '_proc' / 'site', ROOT / '_proc' / 'html'
SECTIONS = {  # caption -> its folders or single pages, in the order of the navigation
    'Start': ('start',),
    'Tutorials': ('tutorials',),
    'Learn': ('theory',),
    'Experiments': ('experiments',),
    'API': ('api', 'cli'),
    'API: the model': ('model',),
    'API: sites and measuring': ('core',),
    'API: methods': ('methods',),
    'API: training': ('train',),
    'API: pictures': ('show',),
    'API: what is promised, and proved': ('promises',),
}
EMPTY = inspect.Parameter.empty
WIDGETS = 'application/vnd.jupyter.widget-state+json'
PROBLEMS = []  # what is found while the pages are written
METADATA = {
    'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'},
    'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'},
}


class Filter(nbdev.processors.FilterDefaults):
    "nbdev's processing, less the front matter (it drops the prose below a title)"

    def base_procs(self):
        skip = FrontmatterProc, nbdev.processors.insert_warning
        return [o for o in super().base_procs() if o not in skip]


def process(path):
    "The notebook at `path` with its `show_doc` cells executed and its hidden cells removed"
    nb = read_nb(path)
    for c in nb.cells:  # exported definitions are shown, folded, below their signature
        if re.search(r'^(def|class) ', c.source, re.M):
            c.set_source(re.sub(r'^#\| *export *$', '#| exports', c.source, flags=re.M))
    exported = re.search(r'^#\| *default_exp +(\S+)', '\n'.join(c.source for c in nb.cells), re.M)
    Entry.module = import_module(f'gradmax_nb.{exported[1]}') if exported else None
    try:
        Filter()(nb)
    except Exception as e:
        sys.exit(f'{path.relative_to(ROOT)}: {e}')
    return nb


class Entry(nbdev.showdoc.BasicMarkdownRenderer):
    "What `show_doc` shows of an exported name: signature, docstring, table of parameters; the source is folded below"

    module = None  # exported by the page that is processed; its cells define the same names anew

    def _repr_markdown_(self):
        try:
            self.sym = attrgetter(self.nm)(self.module)
        except AttributeError:
            pass
        title = f"{'#' * self.title_level} {self.nm}"
        call = f'```python\n{signature(self.sym, self.nm)}\n```'
        return f"{title}\n\n{call}\n\n*{inspect.getdoc(self.sym) or ''}*\n\n{table(self.sym, self.nm)}"


def page_of(module):
    "The page of a module as a path below the package: `experiments/demo`"
    return '/'.join(module.__name__.split('.')[1:])


def parameters(sym):
    "Name -> annotation, default, meaning; none for a protocol, or where its library's class takes them"
    owner = next((c for c in sym.__mro__ if '__init__' in vars(c)), None) if inspect.isclass(sym) else sym
    if getattr(sym, '_is_protocol', False) or not getattr(owner, '__module__', '').startswith('gradmax_nb'):
        return {'return': None}
    out = {k: dict(v) for k, v in docments(owner, full=True).items() if k != 'self'}
    for base in (
        sym.__mro__[1:-1] if inspect.isclass(sym) else ()
    ):  # fields of a dataclass are explained where they were defined
        for k, v in docments(base, full=True).items() if base.__module__.startswith('gradmax_nb') else ():
            if k in out:
                out[k]['docment'] = out[k]['docment'] or v['docment']
    return out


def shown(value):
    "A default value or an annotation as people write it"
    text = value if isinstance(value, str) else getattr(value, '__name__', None) or repr(value)
    text = re.sub(
        r' at 0x[0-9a-f]+|\b(?:typing|torch\.nn\.modules\.\w+|gradmax_nb\.\w+|matplotlib\.\w+|fastai\.\w+)\.(?=\w)',
        '',
        text,
    ).replace('<factory>', '...')
    return re.sub(r'(?<=\w)\(.*\)', '(...)', text) if len(text) > 70 else text  # a record of records


def signature(sym, name):
    "A call with parameters and defaults; their types are in the table"
    if isinstance(inspect.getattr_static(sym, 'fget', None), property) or isinstance(sym, property):
        return name
    stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    args = [
        stars.get(v['kind'], '') + k + ('' if v['default'] is EMPTY else f"={shown(v['default'])}")
        for k, v in parameters(sym).items()
        if k != 'return'
    ]
    line = f"{'class ' if inspect.isclass(sym) else ''}{name}({', '.join(args)})"
    return (
        line
        if len(line) <= check_pages.COLUMNS
        else re.sub(r'\(.*\)$', lambda _: '(\n    ' + ',\n    '.join(args) + '\n)', line, flags=re.S)
    )


def table(sym, name):
    "The parameters with type, default and meaning, shapes and units included"
    if isinstance(sym, property):
        return ''
    params = parameters(sym)
    out = params.pop('return', None)
    returns = out and (out.get('docment') or out.get('anno') not in (None, EMPTY))
    rows = [(f'`{k}`', v['anno'], v['default'], v['docment']) for k, v in params.items()] + (
        [('**returns**', out['anno'], EMPTY, out['docment'])] if returns and not inspect.isclass(sym) else []
    )
    cells = [
        (
            k,
            '' if a in (None, EMPTY) else f'`{shown(a)}`',
            '' if d is EMPTY else f'`{shown(d)}`',
            (m or '').replace('\n', ' '),
        )
        for k, a, d, m in rows
    ]
    if not any(meaning for *_, meaning in cells):  # the signature has said it all
        return ''
    kept = [i for i in range(4) if any(row[i] for row in cells)]
    lines = [
        '| ' + ' | '.join(row[i].replace('|', r'\|') for i in kept) + ' |'
        for row in [('parameter', 'type', 'default', 'meaning'), ('---',) * 4, *cells]
    ]
    return '\n'.join(lines)


def undocumented():
    "Exported names without a docstring, and parameters that neither a docment nor the docstring explains"
    for module in modules():
        for name in module.__all__:
            sym = getattr(module, name)
            if not callable(sym):
                continue
            if not (sym.__doc__ or '').strip():
                yield f'{module.__name__}: {name} has no docstring'
            for k, v in parameters(sym).items():
                if k != 'return' and not v['docment'] and f'`{k}`' not in sym.__doc__:
                    yield f'{module.__name__}: the parameter {k} of {name} has no meaning'


def modules():
    "The modules of the package in reading order"
    return [import_module(f'gradmax_nb.{n}') for n in house.reading_order()]


def slug(title):
    "Anchor of a heading: names keep their dots and underscores, as in nbdev's links"
    title = title.strip().lower()
    return title if re.fullmatch(r'[\w.]+', title) else re.sub(r'[^\w\- ]', '', title).replace(' ', '-')


def show_doc_text(cell):
    "What `show_doc` wrote in `cell`, or None for any other cell"
    if cell.cell_type == 'code' and re.search(r'^show_doc\(', cell.source, re.M):
        return ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.outputs)


def anchors(nb):
    "Anchors of all headings of a processed notebook"
    texts = [show_doc_text(c) or (c.source if c.cell_type == 'markdown' else '') for c in nb.cells if c.get('source')]
    return {slug(o) for t in texts for o in re.findall(r'^#+ +(.+?)(?: *\{#.*\})?$', t, re.M)}


def callout(m):
    "A Quarto call-out as a MyST admonition"
    title = re.search(r'title="([^"]*)"', m[2])
    return f'::::{{admonition}} {title[1] if title else m[1].capitalize()}\n:class: {m[1]}\n\n{m[3].strip()}\n::::'


SYNTAX = [  # what nbdev and Quarto write, and what MyST reads
    (r'\A---\n', ''),
    (r'\A(# .+)\n\s*((?:^>.*\n?)+)', lambda m: f"{m[1]}\n\n{{.lead}}\n{re.sub(r'^> ?', '', m[2], flags=re.M)}\n"),
    (r'^::: *\{\.callout-(\w+)(.*?)\}\n((?s:.*?))^:::$', callout),
    (r'^(#+ .*?) *\{#([\w-]+)\}$', r'(\2)=\n\1'),
    (r'\$\$ *\{#(eq-[\w-]+)\}', r'$$ (\1)'),
    (
        r'(?:\A|(?<=\n\n))\\begin\{(align|gather)\*?\}((?s:.*?))\\end\{\1\*?\}(?=\n\n|\Z)',
        r'$$\\begin{\1ed}\2\\end{\1ed}$$',
    ),
    (
        r'^(\$\$(?s:.+?)\$\$(?: \([\w-]+\))?)[ ]*$',
        r'\n\1\n',
    ),  # a display that follows a line of text is one all the same
    (r'(?<![\w`])@(eq-[\w-]*\w)', r'{eq}`\1`'),
    (r'(?<![\w`])@(sec-[\w-]*\w)', r'{ref}`\1`'),
    (r'(\]\([^()\s]*?)\d+[a-zA-Z0-9]*_([^()/\s]+\.ipynb)', r'\1\2'),
]


def relink(text, page, known):
    "Links of nbdev and links to files of the repository, made relative to `page`"
    up = '../' * len(page.parts)

    def api(m):
        label, target, name = m.groups()
        anchor = next((o for o in (name, name.split('.')[0]) if o in known.get(target, ())), None)
        if anchor is None and not label.strip('`').rpartition('.')[2].startswith('_'):
            PROBLEMS.append(f'{page}: {label} is exported, but {target} has no entry for it')
        return f'[{label}](/{target}.ipynb#{anchor})' if anchor else label

    def file(m):
        target = Path(os.path.normpath(NBS / page.parent / m[2].split('#')[0]))
        if target.is_relative_to(NBS) and target.suffix in ('.ipynb', '.md', '.png', ''):
            return m[0]
        label = re.sub(r'`([^`]*)`', r'<code class="docutils literal">\1</code>', m[1])
        if target.is_relative_to(DOCS):
            address = os.path.relpath(target, DOCS / page.parent)
        else:  # docs/ lies beside nbs/: the same way up leads to the checkout
            address = f'{up}{target.relative_to(ROOT).as_posix()}'
        return f'<a href="{address}">{label}</a>'

    text = re.sub(r'\[(`[^`]*`)\]\(/([\w/]+)\.html#([^)\s]+)\)', api, text)
    return re.sub(r'(?<!!)\[([^\]]*)\]\((?!\w+:|[/#])([^)\s]+)\)', file, text)


def sources(nb, path, page):
    "Links to the notebook of a page, for download, and to the module that is exported from it"
    up = '../' * len(page.parts)
    out = [f'<a href="{up}{path.relative_to(ROOT).as_posix()}" download>Download this page as a notebook</a>']
    exported = re.search(r'^#\| *default_exp +(\S+)', '\n'.join(c.source for c in nb.cells), re.M)
    if exported:
        file = f"gradmax_nb/{exported[1].replace('.', '/')}.py"
        out.append(f'module <a href="{up}{file}"><code class="docutils literal">{file}</code></a>')
    return f'<p class="sources">{" · ".join(out)}</p>'


def markdown(text, page, known):
    "`text` in MyST syntax; fenced code blocks stay as they are"
    parts = re.split(r'(^```.*?^```$)', text, flags=re.M | re.S)
    for pattern, new in SYNTAX:
        parts[::2] = [re.sub(pattern, new, o, flags=re.M) for o in parts[::2]]
    parts[::2] = [relink(o, page, known) for o in parts[::2]]
    return ''.join(parts)


def code(cell, page, alt):
    "A code cell without directives; those that hide something become tags"
    options = dict(re.findall(r'^#\| *([\w-]+): *(.*?) *$', cell.source, re.M))
    if options.get('include') == 'false':
        return None
    tags = ['remove-input'] * (options.get('echo') == 'false') + ['hide-input'] * ('code-fold' in options)
    tags += ['remove-output'] * (options.get('output') == 'false')
    for o in cell.outputs:
        html = o.get('data', {}).get('text/html')
        if html:
            o['data']['text/html'] = framed(re.sub(r'<link[^>]*https?://[^>]*>', '', ''.join(html)))
        png = o.get('data', {}).get('image/png')
        if o['output_type'] == 'error':
            PROBLEMS.append(f"{page}: a stored traceback: {o.get('ename')}: {o.get('evalue')}")
        if png:
            o['data'] = {'image/png': png}
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    return dict(
        cell_type='code',
        source=source,
        outputs=cell.outputs,
        execution_count=None,
        metadata={'tags': tags, 'mystnb': {'image': {'alt': alt}}},
    )


def framed(html):
    "Data frames and other tables of an output look like the tables of the text, and scroll on their own"
    html = re.sub(r'<style scoped>.*?</style>\s*', '', html, flags=re.S)
    html = re.sub(r'<table border="1" class="dataframe">', '<table class="docutils dataframe align-default">', html)
    frame = r'<div class="table-wrapper docutils container">\g<0></div>'
    return re.sub(r'<table\b.*?</table>', frame, html, flags=re.S)


def picture_text(cell, before):
    "A text for the pictures of a code cell: its `fig-alt`, the title it gives them, or the last sentence `before` it"
    said = re.search(r'^#\| *fig-alt: *"?(.+?)"? *$', cell.source, re.M)
    if said:
        return said[1]
    title = re.search(r"""(?:title=|set_title\(|suptitle\()f?(['"])(.+?)\1""", cell.source)
    prose = re.sub(r'\$[^$]*\$|[`*|#\[\]]|\([^)]*\)', '', before).strip().splitlines() or ['']
    return 'Figure: ' + (
        title[2] if title else re.split(r'(?<=[.:?]) ', prose[-1])[-1].rstrip(' :') or 'output of the cell above'
    )


def rewrite(nb, page, known):
    "The processed notebook `nb` as a valid notebook for myst-nb"
    cells, prose = [], ''
    for c in nb.cells:
        if not c.get('source') or c.cell_type == 'raw':
            continue
        text = show_doc_text(c) or (c.source if c.cell_type == 'markdown' else None)
        if c.cell_type == 'markdown':
            prose = c.source
        cells.append(
            code(c, page, picture_text(c, prose))
            if text is None
            else dict(cell_type='markdown', source=markdown(text, page, known), metadata={})
        )
    state = {WIDGETS: nb.metadata['widgets'][WIDGETS]} if widget_state(nb) else None
    return dict(
        cells=[{'id': f'c{i}', **c} for i, c in enumerate(filter(None, cells))],
        metadata={**METADATA, **({'widgets': state} if state else {})},
        nbformat=4,
        nbformat_minor=5,
    )


def widget_state(nb):
    "State of the widgets stored in `nb`, empty without widgets"
    return nb.metadata.get('widgets', {}).get(WIDGETS, {}).get('state', {})


def contents(pages):
    "The hidden tables of contents that make up the navigation"

    def tree(title, parts):
        inside = {o: [p.as_posix() for p in pages if p.parent == Path(o)] for o in parts}
        names = [n for o in parts for n in inside[o] or [o]]
        return '\n'.join(['```{toctree}', ':hidden:', f':caption: {title}', '', *names, '```'])

    return '\n\n'.join(tree(*o) for o in SECTIONS.items())


def write_api(known):
    "The page that lists every exported name with what it is"
    out = [
        '# All names',
        '',
        '{.lead}',
        'Every exported name, by module in reading order. A name leads to its entry, with parameters and examples; '
        '`from gradmax_nb.all import *` brings those of the library.',
        '',
    ]
    for module in modules():
        path = page_of(module)
        first = (module.__doc__ or '').strip().splitlines()
        names = {n: getattr(module, n) for n in module.__all__}
        # what comes from elsewhere is listed where it is made
        names = {n: o for n, o in names.items() if getattr(o, '__module__', None) in (None, module.__name__)}
        out += [f'## {path}', '', f"{first[0] if first else ''} [Page]({path}.ipynb).", '']
        out += ['| name | what it is |', '|---|---|'] if names else []
        for name, sym in names.items():
            label = f'[`{name}`]({path}.ipynb#{name.lower()})' if name.lower() in known.get(path, ()) else f'`{name}`'
            if label[0] != '[' and callable(sym):
                PROBLEMS.append(f'api: {name} of {path} has no entry')
            doc = inspect.getdoc(sym) if callable(sym) else None
            out.append(f"| {label} | {doc.splitlines()[0] if doc else 'a value'} |")
        out.append('')
    (SITE / 'api.md').write_text('\n'.join(out), encoding='utf-8')


def write_pages():
    "Process and rewrite all notebooks into SITE; returns the Sphinx settings that depend on them"
    paths = sorted(nbglob(NBS, as_path=True))
    files = {nbpath2html(p.relative_to(NBS)).with_suffix(''): p for p in paths}
    pages = {page: process(p) for page, p in files.items()}
    if len(pages) < len(paths):
        sys.exit('two notebooks in one folder differ only in their number')
    known = {p.as_posix(): anchors(nb) for p, nb in pages.items()}
    shutil.copytree(NBS, SITE, ignore=shutil.ignore_patterns('_*', '.*', '*.ipynb', '*.md'))
    write_api(known)
    tokens = check_pages.words(
        ''.join(p.read_text(encoding='utf-8') for d in ('gradmax_nb', 'tools') for p in (ROOT / d).rglob('*.py'))
    )
    for p in paths:
        tokens |= check_pages.words('\n'.join(c.source for c in read_nb(p).cells if c.cell_type == 'code'))
    for p in paths:
        for c in read_nb(p).cells:
            if c.cell_type == 'markdown':
                PROBLEMS.extend(f'{p.relative_to(NBS)}: {o}' for o in check_pages.unresolved(c.source, tokens))
    for page, nb in pages.items():
        out = rewrite(nb, page, known)
        if page != Path('index'):
            first = next(c for c in out['cells'] if c['cell_type'] == 'markdown')
            first['source'] = re.sub(
                r'\{\.lead\}\n.+?(?=\n\n|\s*\Z)',
                lambda m, line=sources(read_nb(files[page]), files[page], page): f'{m[0]}\n\n{line}',
                first['source'],
                count=1,
                flags=re.S,
            )
        if page == Path('index'):
            out['cells'].append(dict(id='toc', cell_type='markdown', source=contents(pages), metadata={}))
        (SITE / page).with_suffix('.ipynb').write_text(json.dumps(out), encoding='utf-8')
    return dict(nb_ipywidgets_js={'widgets/embed.js': {}} if any(map(widget_state, pages.values())) else {})


def render(**settings):
    "Run Sphinx on SITE; returns its warnings"
    log, title = StringIO(), 'gradmax_nb'
    nocolor()
    app = Sphinx(
        SITE,
        None,
        HTML,
        ROOT / '_proc' / 'doctrees',
        'html',
        status=None,
        warning=log,
        freshenv=True,
        confoverrides=dict(
            project=title,
            html_title=title,
            html_theme='furo',
            html_show_copyright=False,
            html_show_sphinx=False,
            html_copy_source=False,
            html_show_sourcelink=False,
            html_use_index=False,
            extensions=['myst_nb', 'sphinx.ext.mathjax'],
            suppress_warnings=['myst.header'],
            nb_execution_mode='off',
            nb_output_stderr='remove',
            nb_merge_streams=True,
            nb_code_prompt_show='Show the {type}',
            nb_code_prompt_hide='Hide the {type}',
            myst_enable_extensions=['dollarmath', 'colon_fence', 'attrs_inline', 'attrs_block', 'deflist'],
            myst_heading_anchors=4,
            myst_heading_slug_func='build_site.slug',
            myst_update_mathjax=False,
            html_static_path=[str(NBS / '_vendor')],
            html_css_files=['katex/katex.min.css', 'site.css'],
            html_js_files=['katex/katex.min.js', 'katex/auto-render.min.js'],
            mathjax_path='katex/init.js',
            **settings,
        ),
    )
    app.build(force_all=True)
    return log.getvalue().splitlines()


FINISH = [
    (r'<a href="https://github.com/pradyunsg/furo">(Furo)</a>', r'\1'),
    (r'<pre>(?=<span></span>)', '<pre tabindex="0">'),  # code that is too wide can be scrolled with the keyboard
    (r'<div class="math notranslate nohighlight"', r'\g<0> tabindex="0"'),
    (r'<div class="table-wrapper [^"]*"', r'\g<0> tabindex="0"'),
    (r'(<p class="caption" role="heading")>', r'\1 aria-level="2">'),
    (r'<summary aria-label="[^"]*">', '<summary>'),
]


def publish(folder):
    "Copy the rendered site to `folder`, less what differs between machines or serves nobody"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        HTML, folder, ignore=shutil.ignore_patterns('.buildinfo*', '.doctrees', 'objects.inv', '*.map', 'README.md')
    )
    (folder / '.nojekyll').touch()
    for page in folder.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        for pattern, new in FINISH:
            text = re.sub(pattern, new, text)
        page.write_text(text, encoding='utf-8')


def readme():
    "Write README.md, the home page with the outputs that are text or pictures, and its pictures beside the others"
    out, pictures = [], 0
    for c in read_nb(NBS / 'index.ipynb').cells:
        if c.cell_type == 'markdown':
            out.append(
                re.sub(r'(\]\()(?!https?:|#)([^)\s]+)', lambda m: m[1] + os.path.normpath(f'nbs/{m[2]}'), c.source)
            )
        elif not re.search(r'^#\| *hide', c.source, re.M):
            if not re.search(r'^#\| *(code-fold|echo: *false)', c.source, re.M):
                out.append(f'```python\n{c.source}\n```')
            for o in c.outputs:
                data = o.get('data', {})
                png, table = data.get('image/png'), data.get('text/markdown')
                text = o.get('text') or data.get('text/plain')
                if table:
                    out.append(''.join(table))
                elif png:
                    pictures += 1
                    path = f'nbs/images/home{pictures}.png'
                    (ROOT / path).write_bytes(b64decode(''.join(png)))
                    out.append(f'![{picture_text(c, out[-1])}]({path})')
                elif text:
                    out.append(f"```text\n{''.join(text).rstrip()}\n```")
    (ROOT / 'README.md').write_text('\n\n'.join(out) + '\n', encoding='utf-8')


def main(folder=DOCS):
    folder = Path(folder).resolve()
    os.chdir(ROOT)
    shutil.rmtree(ROOT / '_proc', ignore_errors=True)
    warnings.filterwarnings('error', message='Found cells containing imports and other code')
    # Only names of this package become links, whatever else is installed.
    nbdev.processors.NbdevLookup = nbdev.showdoc.NbdevLookup = partial(NbdevLookup, incl_libs='gradmax-nb')
    nbdev.showdoc.BasicMarkdownRenderer = Entry
    if folder == DOCS:
        readme()
    if not NbdevLookup(incl_libs='gradmax-nb').syms:
        sys.exit("gradmax-nb is not installed here: pip install -e '.[dev]'")
    problems = render(**write_pages())
    publish(folder)
    problems += [*PROBLEMS, *undocumented(), *check_pages.problems(folder)]
    for o in problems:
        print(o.replace(f'{SITE}{os.sep}', ''), file=sys.stderr)
    print(f"{folder.name}/: {len(list(folder.rglob('*.html')))} pages, {len(problems)} problems")
    return bool(problems)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
