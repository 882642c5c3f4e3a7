"""What can be wrong with the rendered pages: `tools/check_pages.py [FOLDER]` prints it and exits with 1, or with 0.

`build_site.py` runs the same checks, and those of the notebooks' names, on what it has built."""

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
URLS = 'href', 'src', 'srcset', 'poster', 'data', 'action'
COLUMNS = 88  # fit at 1280 px beside the navigation
REMOTE = re.compile(r'\s*(?:https?:|wss?:|ftp:)?//', re.I)


def attributes(soup):
    "Every (tag, attribute, address) of a page"
    for tag in soup.find_all(True):
        for name in URLS:
            for url in tag.get(name, '').split(',') if name == 'srcset' else [tag.get(name)]:
                if url:
                    yield tag, name, url.split()[0] if name == 'srcset' else url


def broken(page, soup, ids, folder):
    "Links and pictures of `page` without a target; `ids`: path -> names of its anchors"
    for _, _, url in attributes(soup):
        if REMOTE.match(url) or re.match(r'(data|mailto|javascript):', url):
            continue
        path, _, name = url.partition('#')
        target = (page.parent / path.split('?')[0]).resolve() if path else page.resolve()
        if not target.is_relative_to(folder):  # a file of the repository, wherever the site was built
            target = (ROOT / 'docs' / page.relative_to(folder).parent / path).resolve()
        if not target.exists():
            yield f'no file for {url}'
        elif name and target in ids and name not in ids[target]:
            yield f'no anchor for {url}'


def remote(soup):
    "What a page would load from another host; a link that people follow is no load"
    for tag, name, url in attributes(soup):
        if REMOTE.match(url) and not (tag.name == 'a' and name == 'href'):
            yield f'loads {url}'
    for style in [t.get('style', '') for t in soup.find_all(style=True)] + [t.text for t in soup.find_all('style')]:
        yield from remote_css(style)
    for script in soup.find_all('script'):
        for url in re.findall(r'''(?:import\s*\(?|fetch\(|src\s*=)\s*["'](?:https?:)?//[^"']+''', script.text):
            yield f'loads {url}'


def remote_css(text):
    "What a style sheet would load from another host"
    for url in re.findall(r'(?:url\(\s*|@import\s+)["\']?((?:https?:)?//[^"\')\s]+)', text, re.I):
        yield f'loads {url}'


def traces(soup):
    "Stored tracebacks"
    for o in soup.find_all(class_='traceback'):
        yield f'shows a traceback: {o.text.strip()[:80]}'
    for o in soup.find_all('pre'):
        if 'Traceback (most recent call last)' in o.text and o.find_parent(class_='cell_output'):
            yield f'shows a traceback: {o.text.strip().splitlines()[-1][:80]}'


def raw(soup):
    "Text that the builder should have turned into something else"
    for o in soup.find_all(['code', 'pre', 'script', 'style']):
        o.clear()
    for o in soup.find_all(class_='math'):
        o.clear()
    text = soup.get_text(' ')
    for pattern, what in (
        (r'\$[^$\n]{0,40}\$?', 'a formula'),
        (r':::+ *\{', 'a call-out'),
        (r'\{#[\w-]+\}', 'an anchor'),
        (r'@(?:eq|sec)-[\w-]+', 'a reference'),
    ):
        for o in re.findall(pattern, text):
            yield f'shows {what} as typed: {o}'


def unnamed(soup):
    "Pictures without a text for people who do not see them"
    for o in soup.find_all('img'):
        if not o.get('alt', '').strip() and o.get('role') != 'presentation':
            yield f'a picture without a text: {o.get("src", "")[:60]}'


def wide(soup):
    "Lines of visible code that have to be wrapped or scrolled beside the navigation; folded code may be wide"
    for o in soup.select('.cell_input pre, div[class*=highlight-] pre'):
        if o.find_parent('details') or o.find_parent(class_='cell_output'):
            continue
        for line in o.text.splitlines():
            if len(line) > COLUMNS:
                yield f'a line of code with {len(line)} columns: {line.strip()[:60]}'


def empty(soup):
    "Tables with nothing below their head, and tables of parameters that explain none"
    for o in soup.find_all('table'):
        head, *rows = [[c.text.strip() for c in r.find_all(['td', 'th'])] for r in o.find_all('tr')] or [[]]
        if not rows or head[:1] == ['parameter'] and not any(r[-1] for r in rows):
            yield f'an empty table: {" ".join(head)}'


def problems(folder):
    "Everything that is wrong with the pages below `folder`, as `page: what`"
    folder = Path(folder).resolve()
    soups = {p: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in sorted(folder.rglob('*.html'))}
    ids = {p: {t['id'] for t in s.find_all(id=True)} for p, s in soups.items()}
    for page, soup in soups.items():
        links = broken(page, soup, ids, folder)
        for o in (*links, *remote(soup), *traces(soup), *unnamed(soup), *wide(soup), *empty(soup), *raw(soup)):
            yield f'{page.relative_to(folder)}: {o}'
    for sheet in sorted(folder.rglob('*.css')):
        for o in remote_css(sheet.read_text(encoding='utf-8')):
            yield f'{sheet.relative_to(folder)}: {o}'


def words(text):
    return set(re.findall(r'[A-Za-z_]\w*', text))


@cache
def words_outside():
    "Names of the libraries we write about"
    import torch

    out = {
        n
        for m in (
            torch,
            torch.nn,
            torch.nn.functional,
            torch.optim,
            torch.optim.swa_utils,
            torch.utils.data,
            torch.Tensor,
            torch.nn.Module,
        )
        for n in dir(m)
    }
    for p in [*Path(find_spec('fastai').origin).parent.rglob('*.py'), *Path(torch.optim.__file__).parent.rglob('*.py')]:
        out |= words(p.read_text(encoding='utf-8'))
    return out


def unresolved(text, known):
    "Names in backticks in the markdown `text` that look like code of ours, but are not in `known`, torch or fastai"
    text = re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)
    for span in re.findall(r'(?<!`)`([^`\n]+)`(?!`)', text):
        for name in sorted(words(re.sub(r"'[^']*'|\"[^\"]*\"", '', span))):
            ours = '_' in name.strip('_') or re.search(r'[a-z][A-Z]', name)
            if ours and name not in known and name not in words_outside():
                yield f'`{span}`: there is no {name}'


def main(folder=ROOT / 'docs'):
    found = list(problems(folder))
    for o in found:
        print(o)
    print(f'{len(found)} problems')
    return bool(found)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
