"""Renders the notebooks of nbs/ to the static site in docs/: `python build_site.py`.

nbdev runs imports, exports and `show_doc`; this script rewrites the result for Sphinx (myst-nb, furo) and checks the pages.
All other outputs are the ones stored in the notebooks, and the same notebooks always give the same bytes."""
import json
import os
import re
import shutil
import sys
import warnings
from functools import partial
from html import escape
from io import StringIO
from pathlib import Path

os.environ.setdefault('SOURCE_DATE_EPOCH', '315532800')
os.environ['IN_TEST'] = '1'

import nbdev.processors
import nbdev.showdoc
from bs4 import BeautifulSoup
from fastcore.nbio import read_nb
from nbdev.config import nbpath2html
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.frontmatter import FrontmatterProc
from sphinx.application import Sphinx
from sphinx.util.console import nocolor

ROOT = Path(__file__).resolve().parent
NBS, DOCS, SITE, HTML = ROOT/'nbs', ROOT/'docs', ROOT/'_proc'/'site', ROOT/'_proc'/'html'
SECTIONS = {'Learn': '.', 'Tutorials': 'tutorials', 'Experiments': 'experiments'}
WIDGETS = 'application/vnd.jupyter.widget-state+json'
METADATA = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'},
            'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'}}


class Filter(nbdev.processors.FilterDefaults):
    "nbdev's processing, less the front matter (it drops the prose below a title)"
    def base_procs(self):
        skip = FrontmatterProc, nbdev.processors.insert_warning
        return [o for o in super().base_procs() if o not in skip]


def process(path):
    "The notebook at `path` with its `show_doc` cells executed and its hidden cells removed"
    nb = read_nb(path)
    for c in nb.cells:  # exported definitions are shown, folded, below their signature
        if re.search(r'^(def|class) ', c.source, re.M): c.set_source(re.sub(r'^#\| *export *$', '#| exports', c.source, flags=re.M))
    try: Filter()(nb)
    except Exception as e: sys.exit(f'{path.relative_to(ROOT)}: {e}')
    return nb


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
    (r'(?:\A|(?<=\n\n))\\begin\{(align|gather)\*?\}((?s:.*?))\\end\{\1\*?\}(?=\n\n|\Z)', r'$$\\begin{\1ed}\2\\end{\1ed}$$'),
    (r'(?<![\w`])@(eq-[\w-]*\w)', r'{eq}`\1`'),
    (r'(?<![\w`])@(sec-[\w-]*\w)', r'{ref}`\1`'),
    (r'(\]\([^()\s]*?)\d+[a-zA-Z0-9]*_([^()/\s]+\.ipynb)', r'\1\2'),
]


def relink(text, page, known):
    "Links of nbdev and links that leave nbs/, made relative to `page`"
    up = '../'*(len(page.parts)-1)

    def api(m):
        label, target, name = m.groups()
        name = next((o for o in (name, name.split('.')[0]) if o in known.get(target, ())), None)
        return f'[{label}](/{target}.ipynb#{name})' if name else label

    def outside(m):
        inside = (NBS/page.parent/m[2].split('#')[0]).resolve().is_relative_to(NBS)
        return m[0] if inside else f'<a href="{escape(m[2])}">{m[1]}</a>'

    text = re.sub(r'\[source\]\(/blob/main/([\w/]+\.py)#L\w+\)\{.*?\}', rf'<a class="src" href="{up}../\1">source</a>', text)
    text = re.sub(r'\[(`[^`]*`)\]\(/([\w/]+)\.html#([^)\s]+)\)', api, text)
    return re.sub(r'(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)\s]+)\)', outside, text)


def markdown(text, page, known):
    "`text` in MyST syntax; fenced code blocks stay as they are"
    parts = re.split(r'(^```.*?^```$)', text, flags=re.M | re.S)
    for pattern, new in SYNTAX: parts[::2] = [re.sub(pattern, new, o, flags=re.M) for o in parts[::2]]
    parts[::2] = [relink(o, page, known) for o in parts[::2]]
    return re.sub(r'^```python\ndef (?=[A-Z]\w*\()', '```python\nclass ', ''.join(parts), flags=re.M)


def code(cell):
    "A code cell without directives; those that hide something become tags"
    options = dict(re.findall(r'^#\| *([\w-]+): *(.*?) *$', cell.source, re.M))
    if options.get('include') == 'false': return None
    tags = ['remove-input']*(options.get('echo') == 'false') + ['hide-input']*('code-fold' in options)
    tags += ['remove-output']*(options.get('output') == 'false')
    for o in cell.outputs:
        html = o.get('data', {}).get('text/html')
        if html: o['data']['text/html'] = re.sub(r'<link[^>]*https?://[^>]*>', '', ''.join(html))
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    return dict(cell_type='code', source=source, outputs=cell.outputs, execution_count=None, metadata={'tags': tags})


def rewrite(nb, page, known):
    "The processed notebook `nb` as a valid notebook for myst-nb"
    cells = []
    for c in nb.cells:
        if not c.get('source') or c.cell_type == 'raw': continue
        text = show_doc_text(c) or (c.source if c.cell_type == 'markdown' else None)
        cells.append(code(c) if text is None else dict(cell_type='markdown', source=markdown(text, page, known), metadata={}))
    state = {WIDGETS: nb.metadata['widgets'][WIDGETS]} if widget_state(nb) else None
    return dict(cells=[{'id': f'c{i}', **c} for i, c in enumerate(filter(None, cells))],
                metadata={**METADATA, **({'widgets': state} if state else {})}, nbformat=4, nbformat_minor=5)


def widget_state(nb):
    "State of the widgets stored in `nb`, empty without widgets"
    return nb.metadata.get('widgets', {}).get(WIDGETS, {}).get('state', {})


def contents(pages):
    "The hidden tables of contents that make up the navigation"
    def tree(title, folder):
        names = [p.as_posix() for p in pages if p.parent == Path(folder) and p != Path('index')]
        return '\n'.join(['```{toctree}', ':hidden:', f':caption: {title}', '', *names, '```']) if names else ''
    return '\n\n'.join(tree(*o) for o in SECTIONS.items())


def write_pages():
    "Process and rewrite all notebooks into SITE; returns the Sphinx settings that depend on them"
    paths = sorted(nbglob(NBS, as_path=True))
    pages = {nbpath2html(p.relative_to(NBS)).with_suffix(''): process(p) for p in paths}
    if len(pages) < len(paths): sys.exit('two notebooks in one folder differ only in their number')
    known = {p.as_posix(): anchors(nb) for p, nb in pages.items()}
    shutil.copytree(NBS, SITE, ignore=shutil.ignore_patterns('_*', '.*', '*.ipynb', '*.md'))
    for page, nb in pages.items():
        out = rewrite(nb, page, known)
        if page == Path('index'): out['cells'].append(dict(id='toc', cell_type='markdown', source=contents(pages), metadata={}))
        (SITE/page).with_suffix('.ipynb').write_text(json.dumps(out), encoding='utf-8')
    return dict(nb_ipywidgets_js={'widgets/embed.js': {}} if any(map(widget_state, pages.values())) else {})


def render(**settings):
    "Run Sphinx on SITE; returns its warnings"
    log, title = StringIO(), 'gradmax_nb'
    nocolor()
    app = Sphinx(SITE, None, HTML, ROOT/'_proc'/'doctrees', 'html', status=None, warning=log, freshenv=True, confoverrides=dict(
        project=title, html_title=title, html_theme='furo', html_show_copyright=False, html_show_sphinx=False,
        html_copy_source=False, html_show_sourcelink=False, html_use_index=False,
        extensions=['myst_nb', 'sphinx.ext.mathjax'], suppress_warnings=['myst.header'],
        nb_execution_mode='off', nb_output_stderr='remove', nb_merge_streams=True, nb_code_prompt_show='Show the {type}',
        nb_code_prompt_hide='Hide the {type}',
        myst_enable_extensions=['dollarmath', 'colon_fence', 'attrs_inline', 'attrs_block', 'deflist'],
        myst_heading_anchors=4, myst_heading_slug_func='build_site.slug', myst_update_mathjax=False,
        html_static_path=[str(NBS/'_vendor')], html_css_files=['katex/katex.min.css', 'site.css'],
        html_js_files=['katex/katex.min.js', 'katex/auto-render.min.js'], mathjax_path='katex/init.js', **settings))
    app.build(force_all=True)
    return log.getvalue().splitlines()


def publish():
    "Copy the rendered site to docs/, less what differs between machines or serves nobody"
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.copytree(HTML, DOCS, ignore=shutil.ignore_patterns('.buildinfo*', '.doctrees', 'objects.inv', '*.map', 'README.md'))
    (DOCS/'.nojekyll').touch()
    for page in DOCS.rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        page.write_text(re.sub(r'<a href="https://github.com/pradyunsg/furo">(Furo)</a>', r'\1', text), encoding='utf-8')


def broken_links():
    "Local links and pictures without a target, and anything that a page would load from another host"
    soups = {p: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in sorted(DOCS.rglob('*.html'))}
    ids = {p: {t['id'] for t in s.find_all(id=True)} for p, s in soups.items()}
    for page, soup in soups.items():
        for tag in soup.find_all(lambda t: t.get('href') or t.get('src')):
            url = tag.get('href') or tag['src']
            if re.match(r'https?:|//', url):
                if tag.name != 'a': yield f'{page.relative_to(ROOT)}: loads {url}'
            elif not re.match(r'data:|mailto:', url):
                path, _, name = url.partition('#')
                target = (page.parent/path.split('?')[0]).resolve() if path else page
                if not target.exists() or (name and target in ids and name not in ids[target]):
                    yield f'{page.relative_to(ROOT)}: no target for {url}'


def main():
    os.chdir(ROOT)
    shutil.rmtree(ROOT/'_proc', ignore_errors=True)
    warnings.filterwarnings('error', message='Found cells containing imports and other code')
    # Only names of this package become links, whatever else is installed.
    nbdev.processors.NbdevLookup = nbdev.showdoc.NbdevLookup = partial(NbdevLookup, incl_libs='gradmax-nb')
    if not NbdevLookup(incl_libs='gradmax-nb').syms: sys.exit("gradmax-nb is not installed here: pip install -e '.[dev]'")
    problems = render(**write_pages())
    publish()
    problems += broken_links()
    for o in problems: print(o.replace(f'{SITE}{os.sep}', ''), file=sys.stderr)
    print(f"docs/: {len(list(DOCS.rglob('*.html')))} pages, {len(problems)} problems")
    return bool(problems)


if __name__ == '__main__': sys.exit(main())
