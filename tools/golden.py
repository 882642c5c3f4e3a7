"""The golden record: numbers of this project that must not change by accident.

`python tools/golden.py` measures them again and says in words what differs from the record; `--write PATH` makes a
record, `--accept-at PLACES --why TEXT` takes over what was meant to change, and notes old value, new value and reason.
What is asked of the package stands in `golden_adapter.py`; this file knows nothing of the package."""
import importlib.metadata
import json
import os
import platform
import sys
import time
from fnmatch import fnmatchcase
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.nn.functional as F
from fastcore.script import call_parse, store_true
from torch import nn

HERE = Path(__file__).resolve().parent
RECORD = HERE.parent/'nbs/promises/results/golden.json'
QUICK = 'demo_start', 'wrn', 'sites', 'flops'


def load_adapter(path=HERE/'golden_adapter.py'):
    "The module at `path`"
    spec = spec_from_file_location(Path(path).stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Kinds of sites: a model and the shape of its input, one thing varied at a time

def pair(*path, **first):
    "Two 3x3 convolutions with `path` between them; `first` changes the producer"
    return nn.Sequential(nn.Conv2d(3, 4, **{'kernel_size': 3, 'padding': 1, **first}), *path,
                         nn.Conv2d(4, 5, 3, padding=1))


class TwoConsumers(nn.Module):
    "One convolution whose output goes to another one and, behind pooling and flatten, to a Linear"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2), nn.Linear(4*16, 5)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h).mean((2, 3)) + self.c(F.max_pool2d(h, 2).flatten(1))


def layer_kinds():
    seq, flat, small = nn.Sequential, (16, 6), (6, 3, 8, 8)
    return {
        'Linear': (seq(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5)), flat),
        'Linear, 3-D input': (seq(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 5)), (4, 5, 6)),
        'Linear, no bias': (seq(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 5, bias=False)), flat),
        'Conv1d': (seq(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 2)), (6, 3, 9)),
        'Conv2d': (pair(nn.ReLU()), small),
        'Conv3d': (seq(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 5, 2)), (3, 2, 5, 5, 5)),
        'conv -> flatten -> Linear': (seq(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*36, 5)), small),
        'two consumers': (TwoConsumers(), small)}


def geometry_kinds():
    seq, small, odd = nn.Sequential, (6, 3, 8, 8), (6, 3, 9, 9)
    strided, bare = nn.Conv2d(4, 5, 3, stride=2), dict(kernel_size=3, bias=False)
    return {
        'stride 2': (pair(nn.ReLU(), stride=2), odd),
        'stride 2 in the consumer': (seq(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), strided), odd),
        'dilation 2': (pair(nn.ReLU(), dilation=2, padding=2), odd),
        'no padding': (pair(nn.ReLU(), padding=0), odd),
        "padding 'same'": (pair(nn.ReLU(), kernel_size=4, padding='same'), small),
        'reflected padding': (pair(nn.ReLU(), padding_mode='reflect'), small),
        'oblong kernel': (pair(nn.ReLU(), kernel_size=(1, 5), padding=(0, 2)), small),
        'no bias': (seq(nn.Conv2d(3, 4, **bare), nn.ReLU(), nn.Conv2d(4, 5, **bare)), small),
        'channels_last': (pair(nn.ReLU()).to(memory_format=torch.channels_last), small)}


def path_kinds():
    seq, flat, small, relu6 = nn.Sequential, (16, 6), (6, 3, 8, 8), nn.ReLU6
    depthwise, pooled = nn.Conv2d(4, 4, 3, padding=1, groups=4), (nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return {
        'BatchNorm2d': (pair(nn.BatchNorm2d(4), nn.ReLU(), bias=False), small),
        'BatchNorm2d, not affine': (pair(nn.BatchNorm2d(4, affine=False), nn.ReLU()), small),
        'BatchNorm1d': (seq(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5)), flat),
        'InstanceNorm2d': (pair(nn.InstanceNorm2d(4), nn.ReLU()), small),
        'InstanceNorm2d, affine': (pair(nn.InstanceNorm2d(4, affine=True), nn.SiLU()), small),
        'depthwise convolution': (pair(relu6(True), depthwise, nn.BatchNorm2d(4), relu6(True)), small),
        'MaxPool2d': (pair(nn.ReLU(), nn.MaxPool2d(2)), small),
        'AvgPool2d': (pair(nn.ReLU(), nn.AvgPool2d(2)), small),
        'AdaptiveAvgPool2d, flatten': (seq(nn.Conv2d(3, 4, 3), nn.ReLU(), *pooled, nn.Linear(16, 5)), small),
        'PReLU': (pair(nn.PReLU()), small),
        'PReLU per channel': (pair(nn.PReLU(4)), small),
        'Dropout': (pair(nn.ReLU(), nn.Dropout(.5)), small),
        'Sigmoid': (seq(nn.Conv2d(3, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 5, 3)), small)}


def site_kinds():
    "Name -> (model in double precision, shape of its input)"
    torch.manual_seed(0)
    kinds = {**layer_kinds(), **geometry_kinds(), **path_kinds()}
    return {n: (model.double(), shape) for n, (model, shape) in kinds.items()}


# Measurements: each takes an adapter and returns plain values

def rounded(values, digits):
    "The numbers of a list to so many digits"
    return [float(f'{v:.{digits}g}') for v in values]


def weight_summary(model, grown):
    "Lengths of the new neurons' weights, and one number that every parameter enters, whatever the signs"
    a, b, spreads = grown['old_width'], grown['new_width'], grown['features_per_channel']
    incoming = model.get_submodule(grown['site']).weight.detach()[a:b].flatten(1)
    columns = [model.get_submodule(n).weight.detach()[:, a*s:b*s].unflatten(1, (b-a, s)).transpose(0, 1).flatten(1)
               for n, s in zip(grown['consumers'], spreads)]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).abs()
    total = flat@(1+torch.arange(len(flat), dtype=flat.dtype).cos())
    return dict(incoming=rounded(incoming.norm(dim=1), 12), outgoing=rounded(torch.cat(columns, 1).norm(dim=1), 12),
                all_weights=float(f'{total:.12g}'))


def one_site(api, name, training, method):
    "What one growth of a fresh model of kind `name` does"
    model, shape = site_kinds()[name]
    model.train(training)
    draw = [torch.Generator().manual_seed(i) for i in (1, 2)]
    x = torch.randn(*shape, generator=draw[0]).double()
    torch.manual_seed(4)
    y = torch.randn(model(x).shape, generator=draw[1]).double()
    grown = api.grow_first_site(model, x, y, method, 2)
    for k in ('loss', 'predicted', 'measured'):
        grown[k] = float(f'{grown[k]:.12g}')
    return {**grown, 'sigma': rounded(grown['sigma'], 12), **weight_summary(model, grown)}


def sites(api):
    "30 kinds of sites, in training and in evaluation mode; dropout draws anew in training, so only in evaluation"
    trials = [(kind, mode) for kind in site_kinds() for mode in ('train', 'eval')]
    trials.remove(('Dropout', 'train'))
    return {f'{kind}, {mode}, {n}': one_site(api, kind, mode == 'train', method)
            for kind, mode in trials for n, method in api.methods().items()}


def demo_start(api, steps=100):
    "The first steps of every contender on the digits, seed 0"
    keep = 'losses', 'events', 'growth_flops', 'flops_3_forward', 'flops_exact'
    runs = {n: api.demo_run(n, 0, steps) for n in api.demo_names()}
    return {n: {k: r[k] for k in keep if k in r} for n, r in runs.items()}


def demo(api, seeds=8):
    "Whole trainings of every contender: seed 0 one by one, and the table over all seeds"
    runs = [api.demo_run(n, s) for s in range(seeds) for n in api.demo_names()]
    drop = 'losses', 'method', 'seed'
    first = {r['method']: {k: v for k, v in r.items() if k not in drop} for r in runs if r['seed'] == 0}
    return dict(seed_0=first, table=api.demo_table(runs))


def wrn(api):
    "A tiny Wide-ResNet on patterns, without and with BatchNorm inside the grown pairs"
    out = {f'{n}{", norm" if norm else ""}': api.wrn_run(n, norm) for n in api.wrn_names() for norm in (False, True)}
    for r in out.values():
        # Growth is over after 15 steps. Of so few test pictures each is more than half a point of accuracy.
        r['losses'], r['late_losses'] = r['losses'][:15], r['losses'][15:]
        r['right_of_160'] = round(1.6*r.pop('accuracy'))
    return out


def flops(api):
    "FLOPs of a forward pass and of a training step"
    out = {}
    for name, (build, shape, size) in api.networks().items():
        model = build().train()
        out[name] = dict(forward=api.forward_flops(model, torch.zeros(2, *shape)),
                         step=api.step_flops(model, shape, size), parameters=sum(p.numel() for p in model.parameters()))
    return {**out, **api.student_flops()}


def student_teacher(api):
    "Three students of one teacher, some contenders"
    out = {n: api.student_run(n) for n in api.student_names()}
    return {n: {**r, 'final': rounded(r['final'], 6)} for n, r in out.items()}


measurements = dict(sites=sites, flops=flops, demo_start=demo_start, wrn=wrn,
                    student_teacher=student_teacher, demo=demo)


def measure(
    names=tuple(measurements), # Which measurements
    api=None,                  # Adapter; None: that of the present package
    threads=1                  # The record was made with one
):                             # Name -> plain values, as they come out of a JSON file
    "What the present code gives"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        api = load_adapter() if api is None else api
        with torch.random.fork_rng():
            return json.loads(json.dumps({n: measurements[n](api) for n in names}))
    finally:
        torch.set_num_threads(before)


# Comparison

# Name of a value -> (relative, absolute) tolerance. What has no name here is compared exactly.
# A changed last bit grows to 1e-3 within some hundred steps, so whole trainings are held to less than first steps.
DIGITS = 'losses', 'sigma', 'loss', 'predicted', 'measured', 'incoming', 'outgoing', 'all_weights'
SHARES = 'relative_flops', 'relative_flops_exact', 'relative_flops_3_forward'
TOLERANCES = {**dict.fromkeys(DIGITS, (1e-5, 1e-12)), **dict.fromkeys(SHARES, (1e-9, 0)),
              'late_losses': (1e-5, 0), 'norms': (1e-3, 0), 'later': (1e-3, 1e-6), 'final': (1e-3, 1e-6),
              'accuracy': (0, .5), 'right_of_160': (0, 2), 'accuracy_se': (0, .25), 'train_loss': (.05, .003),
              'train_loss_se': (0, .003), 'test_loss': (.05, .01)}
# What other vector instructions, or two threads, were seen to do: 2e-5 to losses, 2e-4 to the Wide-ResNet's last 15.
ELSEWHERE = {**TOLERANCES, 'losses': (1e-4, 1e-12), 'late_losses': (1e-3, 0)}


def number(v): return isinstance(v, (int, float)) and not isinstance(v, bool)


def twin(key):
    "The same quantity by the other definition of a step's FLOPs, or None"
    for a, b in (('_3_forward', '_exact'), ('_exact', '_3_forward')):
        if key.endswith(a):
            return key.removesuffix(a)+b
    return None


def differences(was, now, tolerances, place='', name=''):
    "Sentences on what differs, in order; one of two twins is enough; texts are compared where all is, to the last bit"
    if isinstance(was, dict) and isinstance(now, dict):
        for k in dict.fromkeys([*was, *now]):
            where = f'{place}, {k}' if place else k
            if k not in was:
                yield f'{where}: not in the record'
            elif k not in now:
                if twin(k) not in now:
                    yield f'{where}: is in the record, but was not measured'
            elif not (tolerances and k.startswith('text_')):
                yield from differences(was[k], now[k], tolerances, where, k if k in TOLERANCES else name)
    elif isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            yield f'{place}: {len(was)} values in the record, {len(now)} now'
        for i, (a, b) in enumerate(zip(was, now)):
            yield from differences(a, b, tolerances, f'{place} [{i}]', name)
    elif number(was) and number(now):
        relative, absolute = tolerances.get(name, (0, 0))
        if not abs(was-now) <= absolute+relative*abs(was):
            share = f', {(now-was)/abs(was):+.1e} of it' if was else ''
            yield f'{place}: {was!r} in the record, {now!r} now{share}'
    elif was != now:
        yield f'{place}: {was!r} in the record, {now!r} now'


def compare(
    record,      # From `read_record`
    now,         # From `measure`
    exact=False, # True: every bit, which holds on the record's own kind of machine only
    threads=1    # With how many `now` was measured
):               # Sentences; none: nothing has changed
    "What differs between the record and the present code, for all that was measured now"
    made = record.get('made', dict(machine=machine(), threads=threads))
    usual = TOLERANCES if (made['machine'], made['threads']) == (machine(), threads) else ELSEWHERE
    was = {n: v for n, v in record['measured'].items() if n in now}
    return list(differences(was, now, {} if exact else usual))


def taken_over(was, now, places, why, place='', name=''):
    "Put today's values into the record `was` where they differ at `places`, a pattern; one dict for each"
    for k in range(len(was)) if isinstance(was, list) else list(was):
        where = f'{place} [{k}]' if isinstance(was, list) else f'{place}, {k}' if place else k
        if isinstance(was, dict) and k not in now:
            if fnmatchcase(where, places) and twin(k) not in now:
                yield dict(what=where, old=f'{count(was.pop(k))} values', new='not measured any more', why=why)
            continue
        a, b, kind = was[k], now[k], k if k in TOLERANCES else name
        if type(a) is type(b) and (isinstance(a, dict) or isinstance(a, list) and len(a) == len(b)):
            yield from taken_over(a, b, places, why, where, kind)
        elif fnmatchcase(where, places) and list(differences(a, b, TOLERANCES, where, kind)):
            was[k] = b
            yield dict(what=where, old=a, new=b, why=why)


def count(values):
    "How many values there are"
    if isinstance(values, (dict, list)):
        return sum(map(count, values.values() if isinstance(values, dict) else values))
    return 1


# The record

def machine():
    "What the last bits depend on"
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    processor = next((o.split(':', 1)[1].strip() for o in lines if o.startswith('model name')), platform.machine())
    return dict(processor=processor, instructions=torch.backends.cpu.get_cpu_capability(), system=platform.system(),
                torch=str(torch.__version__))


def read_record(path=RECORD): return json.loads(Path(path).read_text(encoding='utf-8'))


def packed(o, depth=0, open_levels=3):
    "JSON with a line for each entry of the outer levels"
    if isinstance(o, list) and o and isinstance(o[0], dict) and depth < open_levels:
        return '[\n'+',\n'.join(packed(v, open_levels) for v in o)+'\n]'
    if isinstance(o, dict) and o and depth < open_levels:
        pad = ' '*(depth+1)
        rows = [f'{pad}{json.dumps(k)}: {packed(v, depth+1, open_levels)}' for k, v in o.items()]
        return '{\n'+',\n'.join(rows)+'\n'+' '*depth+'}'
    return json.dumps(o, ensure_ascii=False, separators=(',', ':'))


def write_text(path, text):
    "Replace the file at `path` as a whole"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f'.{path.name}.new')
    new.write_text(text, encoding='utf-8')
    os.replace(new, path)


def write_record(path, measured, code):
    "Replace the record at `path`"
    libraries = ('torch', 'numpy', 'scipy', 'scikit-learn', 'fastai', 'fastcore')
    versions = {n: importlib.metadata.version(n) for n in libraries}
    seeds = dict(demo_start=0, demo=[*range(8)], wrn=1, sites=dict(models=0, x=1, y=2, draws=4),
                 student_teacher=dict(teacher=0, students=3))
    versions = dict(python=platform.python_version(), **versions)
    made = dict(code=code, versions=versions, machine=machine(), threads=1, seeds=seeds)
    write_text(Path(path), packed(dict(made=made, measured=measured))+'\n')


def accept(path, now, places, why):
    "Take over into the record at `path` what differs at `places`; its `expected_changes` say what and why"
    if not why:
        raise SystemExit("a record changes for a reason only: give it with --why")
    record = read_record(path)
    measured = {n: v for n, v in record['measured'].items() if n in now}
    found = list(taken_over(measured, now, places, why))
    record.setdefault('expected_changes', []).extend(found)
    write_text(Path(path), packed(record)+'\n')
    return found


@call_parse
def main(
    write:str='',          # Write a record to this path instead of comparing
    record:str=str(RECORD),# The record to compare with
    parts:str='',          # Measurements, separated by commas; all if left out; 'quick' for those of the page
    adapter:str='',        # Another file in the place of golden_adapter.py
    against:str='',        # Adapter of other code that runs in this process in the place of the record
    code:str='',           # With --write: which code this is, in words
    accept_at:str='',      # Take over what differs at these places; * stands for anything
    why:str='',            # With --accept-at: the reason
    threads:int=1,         # Threads of torch
    exact:store_true=False # Compare every bit
):
    "Compare the present code with the golden record, or write one."
    names = {'': tuple(measurements), 'quick': QUICK}.get(parts) or tuple(parts.split(','))
    began, now = time.process_time(), measure(names, load_adapter(adapter) if adapter else None, threads)
    if write:
        write_record(write, now, code)
        print(f'{write}: {count(now)} values')
        return
    if accept_at:
        print('\n'.join(f"{c['what']}: {c['old']} -> {c['new']}" for c in accept(record, now, accept_at, why)))
        return
    was = dict(measured=measure(names, load_adapter(against), threads)) if against else read_record(record)
    found = compare(was, now, exact, threads)
    print('\n'.join(found))
    took = time.process_time()-began
    print(f'{count(now)} values measured, {len(found)} differences, {took:.0f} s of processor time')
    if found:
        sys.exit(1)
