"""Drives GrowthDashboard in a real JupyterLab: `python tools/browser/dashboard.py [--pictures FOLDER] [--benchmark]`.

A headless Chromium starts a training, presses *Grow now*, *Pause*, *Resume* and *Stop*, and compares what it sees with
the model and the record: with the training in a thread and no subshells, and in a cell that blocks, with them. Needs
`pip install jupyterlab selenium` beside this package, and Debian's chromium and chromium-driver; exits with 77 where
there is no browser.
`--benchmark` measures instead what the dashboard costs, and writes nbs/experiments/results/dashboard.json."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from chrome import browser, missing, SKIPPED

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / 'nbs' / 'experiments' / 'results' / 'dashboard.json'
SETUP = '''
import json, warnings
from functools import partial
from pathlib import Path
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, SGD, TfmdDL, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from gradmax_nb.all import *
warnings.filterwarnings('ignore')
torch.set_num_threads(1)
set_seed(0)
x,y = load_digits(return_X_y=True)
x,y = torch.tensor(x/16-.3, dtype=torch.float32).view(-1,1,8,8), torch.tensor(y)
train = TfmdDL(TensorDataset(x[:1024].repeat(20,1,1,1),y[:1024].repeat(20)), bs=64, shuffle=True, num_workers=0)
dls = DataLoaders(train, TfmdDL(TensorDataset(x[1024:],y[1024:]), bs=512, num_workers=0))
convs = nn.Conv2d(1,2,3,padding=1), nn.ReLU(), nn.Conv2d(2,4,3,stride=2,padding=1), nn.ReLU()
model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(64,10))
learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD,mom=.9), lr=.005)
'''
WAYS = {'background': 'dash.background(learn.fit, 10_000);', 'blocking': 'learn.fit(10_000)'}
REPORT = '''
dash.wait()
check_optimizer(learn.opt, learn.model)
history = learn.growth.history[['step','site','old_width','new_width','method']].to_dict('records')
Path('report.json').write_text(json.dumps(dict(history=history,
    widths={s.name:s.width for s in find_sites(model, x[:8])[0]}, steps=learn.growth.steps)))
print('reported')
'''


def notebook(*sources):
    "A notebook with these code cells"
    cells = [
        dict(cell_type='code', id=f'c{i}', source=s.strip(), metadata={}, outputs=[], execution_count=None)
        for i, s in enumerate(sources)
    ]
    return dict(
        cells=cells,
        metadata={'kernelspec': dict(name='python3', display_name='python3', language='python')},
        nbformat=4,
        nbformat_minor=5,
    )


@contextmanager
def lab(folder, subshells):
    "JupyterLab serving `folder`, on a port of its own; yields its address"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    settings = folder / 'settings' / '@jupyterlab' / 'apputils-extension'
    settings.mkdir(parents=True)
    (settings / 'kernels-settings.jupyterlab-settings').write_text(
        json.dumps({'commsOverSubshells': 'perCommTarget' if subshells else 'disabled'})
    )
    (settings / 'notification.jupyterlab-settings').write_text(
        json.dumps({'fetchNews': 'false', 'checkForUpdates': False})
    )
    env = {
        **os.environ,
        'JUPYTER_CONFIG_DIR': str(folder / 'config'),
        'JUPYTER_DATA_DIR': str(folder / 'data'),
        'PYTHONPATH': str(ROOT),
        'OMP_NUM_THREADS': '1',
        'IPYTHONDIR': str(folder / 'ipython'),
    }
    cmd = [
        sys.executable,
        '-m',
        'jupyterlab',
        '--no-browser',
        '--allow-root',
        f'--ServerApp.port={port}',
        '--IdentityProvider.token=',
        f'--ServerApp.root_dir={folder}',
        f'--LabApp.user_settings_dir={folder / "settings"}',
        f'--LabApp.workspaces_dir={folder / "workspaces"}',
        '--LabApp.expose_app_in_browser=True',
        '--LabApp.news_url=',
    ]
    with open(folder / 'lab.log', 'w') as log:
        server = subprocess.Popen(cmd, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: urllib.request.urlopen(f'http://127.0.0.1:{port}/api').status == 200, 'JupyterLab', 60)
        yield f'http://127.0.0.1:{port}/lab/tree/test.ipynb?reset'
    finally:
        server.terminate()
        server.wait(20)


def until(condition, what, seconds=60):
    "Wait until `condition()` is true; returns what it gave"
    end, error = time.time() + seconds, None
    while time.time() < end:
        try:
            if value := condition():
                return value
        except Exception as e:
            error = e
        time.sleep(0.1)
    raise SystemExit(f'FAILED: {what} did not happen within {seconds} s ({error!r})')


class Page:
    "The notebook in the browser, as a person sees it"

    def __init__(self, driver, pictures):
        self.driver, self.pictures = driver, pictures

    def css(self, selector):
        return self.driver.find_elements('css selector', selector)

    def button(self, name):
        return next(b for b in self.css('.jp-OutputArea .jupyter-button') if b.text.strip() == name)

    def press(self, name):
        until(lambda: self.button(name).click() or True, f'pressing {name!r}')

    def text(self):
        return ' '.join(o.text for o in self.css('.jp-OutputArea .widget-html-content'))

    def step(self):
        return int(self.text().split('step ')[1].split()[0])

    def images(self):
        return [o.get_attribute('src') for o in self.css('.jp-OutputArea img.widget-image')]

    def run(self, command):
        self.driver.execute_script('window.jupyterapp.commands.execute(arguments[0])', command)

    def run_cell(self, i):
        self.css('.jp-Notebook .jp-CodeCell')[i].find_element('css selector', '.jp-InputPrompt').click()
        self.run('notebook:run-cell')
        time.sleep(0.5)

    def picture(self, name):
        if self.pictures:
            self.driver.save_screenshot(str(self.pictures / f'{name}.png'))

    def choose(self, label, value):
        from selenium.webdriver.support.select import Select

        row = next(o for o in self.css('.jp-OutputArea .widget-dropdown') if label in o.text)
        Select(row.find_element('tag name', 'select')).select_by_visible_text(value)

    def type(self, label, value):
        from selenium.webdriver.common.keys import Keys

        row = next(o for o in self.css('.jp-OutputArea .widget-text') if label in o.text)
        box = row.find_element('tag name', 'input')
        box.send_keys(Keys.CONTROL, 'a', Keys.NULL, str(value), Keys.ENTER)


def open_notebook(page, url):
    "Open the notebook and wait until it can be run"
    page.driver.get(url)
    until(
        lambda: page.css('.jp-Notebook .jp-Cell') and page.driver.execute_script('return !!window.jupyterapp'),
        'JupyterLab in the browser',
        90,
    )
    time.sleep(3)


def steer(page, way):
    "Grow, pause, grow while paused, resume, change, grow, stop; each step is seen on the page before the next"
    until(lambda: page.step() > 20, 'a training that shows its steps', 120)
    until(lambda: len([o for o in page.images() if o and len(o) > 30]) == 2, 'two pictures', 120)
    page.picture(f'{way}-1-training')
    before = page.images()
    page.choose('site', '2')
    page.press('Grow now')
    until(lambda: '2: 5' in page.text(), 'site 2 growing from 4 to 5', 30)
    until(lambda: page.images()[1] != before[1], 'a new picture of the widths', 30)
    page.picture(f'{way}-2-grown')
    page.press('Pause')
    until(lambda: '(paused)' in page.text(), 'the pause', 30)
    at = page.step()
    time.sleep(2)
    assert page.step() == at, 'the training went on while paused'
    page.choose('site', '0')
    page.type('neurons', 3)
    page.press('Grow now')
    until(lambda: '0: 5' in page.text(), 'site 0 growing from 2 to 5 while paused', 30)
    assert page.step() == at
    page.picture(f'{way}-3-paused')
    page.press('Resume')
    until(lambda: page.step() > at, 'going on', 30)
    page.choose('method', 'RandomGrowth')
    page.choose('site', '2')
    page.press('Grow now')
    until(lambda: '2: 8' in page.text(), 'site 2 growing from 5 to 8', 30)
    page.choose('method', 'GradMax')
    page.type('neurons', 500)
    page.press('Grow now')
    until(lambda: 'not grown' in page.text(), 'the refusal of more neurons than there are directions', 30)
    page.press('Stop')
    until(lambda: not page.css('.jp-OutputArea .jupyter-button'), 'the panel closing', 60)
    until(lambda: page.css('.jp-OutputArea .jp-RenderedImage img'), 'a static figure in its place', 30)
    page.picture(f'{way}-4-stopped')
    return at


def check(report, at):
    "Compare the record with what was seen"
    rows = [(r['site'], r['old_width'], r['new_width'], r['method'].split('(')[0]) for r in report['history']]
    print('history:', *rows, sep='\n  ')
    assert rows == [('2', 4, 5, 'BoundMax'), ('0', 2, 5, 'BoundMax'), ('2', 5, 8, 'RandomGrowth')], rows
    assert report['history'][1]['step'] == at, (report['history'][1]['step'], at)
    assert report['widths']['0'] == 5 and report['widths']['2'] == 8
    assert report['steps'] > at


def drive(way, pictures):
    "One complete run"
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        (folder / 'test.ipynb').write_text(
            json.dumps(notebook(SETUP, f'dash = GrowthDashboard(learn)\n{WAYS[way]}', REPORT))
        )
        with lab(folder, subshells=way == 'blocking') as url, browser(1200, 1300) as driver:
            page = Page(driver, pictures)
            open_notebook(page, url)
            for i in range(2):
                page.run_cell(i)
            try:
                at = steer(page, way)
            except BaseException:
                page.picture(f'{way}-failed')
                print(page.text())
                raise
            page.run_cell(2)
            until(lambda: (folder / 'report.json').exists() and (folder / 'report.json').read_text(), 'the report', 60)
            page.run('docmanager:save')
            time.sleep(3)
            saved = json.loads((folder / 'test.ipynb').read_text())['cells'][1]['outputs']
            kinds = [k for o in saved for k in o.get('data', {})]
            assert 'image/png' in kinds and 'application/vnd.jupyter.widget-view+json' not in kinds, kinds
            report = json.loads((folder / 'report.json').read_text())
            check(report, at)
            print(f'ok: {way}: stopped after {report["steps"]} steps')


BENCHMARK = """
import platform, time, matplotlib, ipykernel, ipywidgets, fastai
import gradmax_nb.show.dashboard as D
D.Ledger.__init__.__defaults__ = (time.process_time,)
def wide(a, b):
    convs = nn.Conv2d(1,a,3,padding=1), nn.Conv2d(a,b,3,padding=1), nn.Conv2d(b,b,3,stride=2,padding=1)
    return nn.Sequential(*(m for c in convs for m in (c,nn.ReLU())), nn.Flatten(), nn.Linear(16*b,10))
def train(watched, widths, epochs):
    set_seed(0)
    learn = Learner(dls, wide(*widths), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD,mom=.9), lr=.005)
    dash = GrowthDashboard(learn) if watched else None
    start = time.process_time()
    grow = GrowthCallback(BoundMax(), EveryN(320*epochs//4, times=3))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=grow)
    return time.process_time()-start, dash
def measure_cost(name, widths, epochs, pairs):
    runs = [train(i%2, widths, epochs) for i in range(2*pairs)]
    plain,watched = ([s for s,_ in runs[i::2]] for i in (0,1))
    shares,pictures = [d.ledger.spent/s for s,d in runs[1::2]],[d.ledger.pictures for _,d in runs[1::2]]
    seconds = dict(without=[round(s,2) for s in plain], watched=[round(s,2) for s in watched])
    return dict(name=name, steps=320*epochs, step_ms=round(1000*min(plain)/320/epochs,2), pairs=pairs,
                pictures=min(pictures), share=round(max(shares),4), cpu_change=round(min(watched)/min(plain)-1,4),
                cpu_seconds=seconds)
"""
MEASURE = """
runs = [measure_cost('small network', (2,4), 50, 2), measure_cost('larger network', (16,32), 20, 2)]
info = Path('/proc/cpuinfo')
named = [l.split(':')[1].strip() for l in info.open() if l.startswith('model name')] if info.exists() else []
cpu = (named or [platform.processor()])[0]
modules = torch,fastai,matplotlib,ipykernel,ipywidgets
versions = dict(python=platform.python_version(), **{m.__name__:m.__version__ for m in modules})
Path('report.json').write_text(json.dumps(dict(hardware=f'{cpu}, 1 thread', versions=versions, runs=runs)))
"""


def benchmark():
    "The same trainings with and without a dashboard, in turn, in a JupyterLab that shows it; writes RESULT"
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        (folder / 'test.ipynb').write_text(json.dumps(notebook(SETUP, BENCHMARK, MEASURE)))
        with lab(folder, subshells=True) as url, browser(1200, 1300) as driver:
            page = Page(driver, None)
            open_notebook(page, url)
            for i in range(3):
                page.run_cell(i)
            until(
                lambda: (folder / 'report.json').exists() and (folder / 'report.json').read_text(),
                'the measurement',
                3600,
            )
            report = json.loads((folder / 'report.json').read_text())
    import importlib.metadata as m

    report['versions']['jupyterlab'] = m.version('jupyterlab')
    RESULT.write_text(json.dumps(report, indent=1) + '\n')
    for r in report['runs']:
        print(r)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--pictures', type=Path, help='folder for screenshots')
    parser.add_argument('--benchmark', action='store_true', help='measure what the dashboard costs')
    parser.add_argument('--ways', nargs='+', choices=WAYS, help='how the training is started; all of them if not given')
    args = parser.parse_args()
    if missing():
        print(
            f'skipped: not installed here: {", ".join(missing())} '
            '(apt-get install chromium chromium-driver; pip install selenium jupyterlab)'
        )
        return SKIPPED
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    if args.benchmark:
        return benchmark()
    for way in args.ways or WAYS:
        drive(way, args.pictures)


if __name__ == '__main__':
    sys.exit(main())
