"""Tests of check_pages.py on small pages: each fault is found, without it a page passes. Ends with `N passed`."""

import sys
import tempfile
from pathlib import Path

import check_pages

GOOD = {
    'a.html': '<p id="x">a <a href="sub/b.html#y">b</a> <a href="https://example.org">out</a> '
    '<img src="p.png" alt="a dot"> <img src="data:image/png;base64,AA" alt="another"></p>',
    'sub/b.html': '<p id="y"><a href="../a.html#x">a</a> <a href="#y">here</a> <code>$x$</code></p>'
    '<div class="cell_output"><pre>fine</pre></div>'
    f'<details><div class="cell_input"><pre>{"folded " * 20}</pre></div></details>'
    '<table><tr><th>parameter</th></tr><tr><td>x</td></tr></table>'
    '<span class="math">\\(x\\)</span>',
    'p.png': '',
    'site.css': '@import "other.css"; a { background: url(p.png) } /* https://example.org */',
}
FAULTS = {  # what is added to a page, and the message it must cause
    'a link to no file': ('a.html', '<a href="c.html">c</a>', 'no file for c.html'),
    'a link to no anchor': ('a.html', '<a href="sub/b.html#z">b</a>', 'no anchor for sub/b.html#z'),
    'a missing image': ('sub/b.html', '<img src="q.png" alt="q">', 'no file for q.png'),
    'a missing image in a srcset': ('a.html', '<img src="p.png" srcset="q.png 2x" alt="q">', 'no file for q.png'),
    'a script from another host': (
        'a.html',
        '<script src="https://cdn.example.org/a.js"></script>',
        'loads https://cdn.example.org/a.js',
    ),
    'a script without a scheme': (
        'a.html',
        '<script src="//cdn.example.org/a.js"></script>',
        'loads //cdn.example.org/a.js',
    ),
    'a style sheet from another host': (
        'a.html',
        '<link rel="stylesheet" href="http://example.org/a.css">',
        'loads http://example.org/a.css',
    ),
    'an image from another host': (
        'a.html',
        '<img src="https://example.org/a.png" alt="a">',
        'loads https://example.org/a.png',
    ),
    'a background from another host': (
        'a.html',
        '<p style="background: url(\'https://example.org/a.png\')">',
        'loads https://example.org/a.png',
    ),
    'a font in a style sheet': (
        'site.css',
        '@font-face { src: url("https://example.org/f.woff2") }',
        'loads https://example.org/f.woff2',
    ),
    'an import in a script': (
        'a.html',
        '<script type="module">import "https://example.org/a.js"</script>',
        'https://example.org/a.js',
    ),
    'a traceback': (
        'sub/b.html',
        '<div class="cell_output"><pre>Traceback (most recent call last)\nNameError: x</pre></div>',
        'shows a traceback: NameError: x',
    ),
    'an error output': (
        'a.html',
        '<div class="output traceback"><pre>ValueError</pre></div>',
        'shows a traceback: ValueError',
    ),
    'a formula as typed': ('a.html', '<p>the norm $\\lVert x\\rVert$</p>', 'shows a formula as typed'),
    'a wide line of code': (
        'a.html',
        f'<div class="cell_input"><pre>x = {"1 + " * 22}1</pre></div>',
        'a line of code with 93 columns',
    ),
    'a table without rows': ('a.html', '<table><tr><th>parameter</th></tr></table>', 'an empty table: parameter'),
    'parameters without a meaning': (
        'a.html',
        '<table><tr><th>parameter</th><th>meaning</th></tr><tr><td>x</td><td></td></tr></table>',
        'an empty table: parameter meaning',
    ),
    'a picture without a text': ('a.html', '<img src="p.png">', 'a picture without a text'),
}
KNOWN = {'grow', 'find_sites', 'GrowthCallback', 'learn'}
NAMES = {
    'see `find_sites` and `GrowthCallback(...)`': None,
    '`nn.ReLU`, `log_softmax`, `lr_find`, `plain`': None,
    "`open('no_such_name')`": None,
    '```\nfind_site\n```': None,
    'see `find_site`': 'there is no find_site',
    '`GrowCallback` does it': 'there is no GrowCallback',
    'call `learn.growth_of(x)`': 'there is no growth_of',
}


def found(pages):
    "The problems of a folder with these files"
    with tempfile.TemporaryDirectory() as tmp:
        for name, text in pages.items():
            (Path(tmp) / name).parent.mkdir(exist_ok=True)
            (Path(tmp) / name).write_text(text)
        return list(check_pages.problems(tmp))


def main():
    assert found(GOOD) == [], found(GOOD)
    for what, (page, extra, message) in FAULTS.items():
        out = found({**GOOD, page: GOOD[page] + extra})
        assert len(out) == 1 and out[0].startswith(f'{page}: ') and message in out[0], f'{what}: {out}'
    for text, message in NAMES.items():
        out = list(check_pages.unresolved(text, KNOWN))
        assert out == [] if message is None else len(out) == 1 and message in out[0], f'{text}: {out}'
    print(f'{1 + len(FAULTS) + len(NAMES)} passed')


if __name__ == '__main__':
    sys.exit(main())
