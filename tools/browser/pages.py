"""Opens every page of the site in a headless Chromium, from the files: `pages.py [FOLDER] [--pictures FOLDER]`.

Each page in light, dark and at a width of 390 px: nothing on the console, no request to another host, no horizontal
overflow, no box of code that scrolls sideways beside the navigation, tables that scroll on their own, formulas drawn,
sliders that move their figures, no serious finding of axe-core; and the search finds what it should.
Needs Debian's chromium and chromium-driver, `pip install selenium`, and npm for axe-core; exits with 77 where there
is no browser."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from chrome import browser

ROOT = Path(__file__).resolve().parents[2]
AXE = 'axe-core@4.14.1'
MODES = {'light': (1280, 900, 'light'), 'dark': (1280, 900, 'dark'), 'phone': (390, 844, 'light')}
SEARCHES = {'GradMax': 'GradMax', 'find_sites': 'find_sites', 'sign': 'sign'}
PAGE = '''
const done = arguments[arguments.length - 1];
document.fonts.ready.then(() => setTimeout(() => done(look()), 100));
function look() {
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth, out = [];
if (wide > 1) {
  const beyond = o => o.getBoundingClientRect().right > innerWidth + 1 && !o.closest('pre, .table-wrapper, .math');
  const worst = [...document.querySelectorAll('article *')].filter(beyond).slice(0, 3);
  out.push(`is ${wide} px wider than the window: ${worst.map(o => o.tagName + '.' + o.className).join(' ')}`);
}
const scrolls = o => o.clientWidth > 0 && o.scrollWidth > o.clientWidth + 1;
const boxes = innerWidth < 1000 ? [] : [...document.querySelectorAll('article pre')].filter(scrolls);
const begin = o => o.textContent.trim().slice(0, 60);
if (boxes.length) out.push(`has ${boxes.length} boxes that scroll sideways: ${begin(boxes[0])}`);
const barred = o => o && (['auto', 'scroll'].includes(getComputedStyle(o).overflowX) || barred(o.parentElement));
const cut = o => o.getBoundingClientRect().right > innerWidth + 1 && !barred(o.parentElement);
for (const o of [...document.querySelectorAll('article table')].filter(cut))
  out.push(`has a table without a scroll bar of its own: ${begin(o)}`);
const math = [...document.querySelectorAll('.math')], drawn = math.filter(o => o.querySelector('.katex'));
if (drawn.length < math.length) out.push(`draws ${drawn.length} of ${math.length} formulas`);
for (const o of document.querySelectorAll('.katex-error'))
  out.push(`has a formula with an error: ${o.title || o.textContent.slice(0, 60)}`);
const copy = document.querySelector('article').cloneNode(true);
copy.querySelectorAll('pre, code, script, style, .math, .katex').forEach(o => o.remove());
const raw = copy.textContent.match(/[$].{0,40}/);
if (raw) out.push(`shows a formula as typed: ${raw[0].slice(0, 60)}`);
const missing = o => (!o.complete || !o.naturalWidth) && getComputedStyle(o).display != 'none';
for (const o of [...document.querySelectorAll('article img')].filter(missing))
  out.push(`has an image that does not load: ${o.src.slice(0, 80)}`);
return out;
}
'''
SLIDE = '''
const out = [], shown = o => getComputedStyle(o).display != 'none';
const seen = f => [...f.querySelectorAll('img')].filter(shown).map(o => o.src).join();
for (const s of document.querySelectorAll('article input[type=range]')) {
  const f = s.closest('figure'), pictures = new Set();
  for (const v of [s.min, s.max]) {
    s.value = v;
    s.dispatchEvent(new Event('input', {bubbles: true}));
    pictures.add(seen(f));
  }
  if (pictures.size < 2) out.push(`has a slider that moves nothing: ${s.getAttribute('aria-label')}`);
}
return [out, document.querySelectorAll('article input[type=range]').length];
'''
CHECK = '''
const done = arguments[arguments.length - 1];
const grave = v => ['serious', 'critical'].includes(v.impact);
const where = n => `${n.target.join(' ')} ${n.html.slice(0, 120)} ${(n.any[0] || {}).message || ''}`;
const said = v => `${v.impact}: ${v.id} (${v.nodes.length} times): ${where(v.nodes[0])}`;
axe.run(document, {resultTypes: ['violations'], preload: false})
  .then(r => done(r.violations.filter(grave).map(said)), e => done([`axe: ${e}`]));
'''


def axe_source(folder):
    "The script of axe-core, fetched by npm into `folder`"
    subprocess.run(
        ['npm', 'install', '--silent', '--no-audit', '--no-fund', '--prefix', folder, AXE],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return (Path(folder) / 'node_modules' / 'axe-core' / 'axe.min.js').read_text(encoding='utf-8')


def noise(driver):
    "What the console says, and requests that do not stay on this machine"
    for o in driver.get_log('browser'):
        if o['level'] in ('SEVERE', 'WARNING'):
            yield f"console: {o['message'][:200]}"
    for o in driver.get_log('performance'):
        message = json.loads(o['message'])['message']
        url = (
            message.get('params', {}).get('request', {}).get('url', '')
            if message['method'] == 'Network.requestWillBeSent'
            else ''
        )
        if url and not url.startswith(('file:', 'data:', 'blob:', 'chrome:', 'about:')):
            yield f'asks for {url}'


def set_mode(driver, width, height, scheme):
    driver.execute_cdp_cmd(
        'Emulation.setDeviceMetricsOverride', dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    )
    driver.execute_cdp_cmd(
        'Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]}
    )


def search(driver, folder, query, expected):
    "Results of the search for `query`, as a person gets them"
    import time

    driver.get(f'{(folder / "search.html").as_uri()}?q={query}')
    for _ in range(100):
        titles = [o.text for o in driver.find_elements('css selector', '#search-results li a')]
        done = (
            'Search finished' in driver.find_element('css selector', '#search-results').text
            or 'finished' in driver.page_source
        )
        if titles and done:
            break
        time.sleep(0.1)
    print(f'search for {query!r}: {len(titles)} results, first {titles[:3]}')
    if not any(expected.lower() in t.lower() for t in titles):
        yield f'search: {query} gives {titles[:10]}'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folder', nargs='?', type=Path, default=ROOT / 'docs', help='the built site')
    parser.add_argument('--pictures', type=Path, help='folder for screenshots')
    parser.add_argument('--only', nargs='+', help='pages whose path contains one of these')
    args = parser.parse_args()
    folder, found, sliders = args.folder.resolve(), [], 0
    pages = [
        p
        for p in sorted(folder.rglob('*.html'))
        if not args.only or any(o in str(p.relative_to(folder)) for o in args.only)
    ]
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    with browser() as driver, tempfile.TemporaryDirectory() as tmp:
        axe = axe_source(tmp)
        driver.set_script_timeout(120)
        for mode, size in MODES.items():
            set_mode(driver, *size)
            for page in pages:
                name = page.relative_to(folder).as_posix()
                driver.get(page.as_uri())
                problems = [*driver.execute_async_script(PAGE), *noise(driver)]
                if args.pictures and (
                    args.only or name in ('index.html', 'theory.html', 'growth.html', 'viz.html', 'api.html')
                ):
                    driver.save_screenshot(str(args.pictures / f'{name.replace("/", "-")[:-5]}-{mode}.png'))
                moved, n = driver.execute_script(SLIDE)
                sliders += n
                driver.execute_script(axe)
                problems += [*moved, *driver.execute_async_script(CHECK)]
                found += [f'{name} ({mode}): {o}' for o in problems]
            print(f'{mode}: {len(pages)} pages seen', flush=True)
        set_mode(driver, *MODES['light'])
        for query, expected in SEARCHES.items():
            found += search(driver, folder, query, expected)
    for o in found:
        print(o)
    print(f'{len(pages)} pages in {len(MODES)} modes, {sliders} sliders moved, {len(found)} problems')
    return bool(found)


if __name__ == '__main__':
    sys.exit(main())
