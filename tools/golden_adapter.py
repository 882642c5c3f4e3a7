"""What the golden record asks of the package: the only file of the two that knows names and places in it.

`golden.py` turns the answers into a record. Every answer is made of plain numbers, lists and dicts, except for
methods, networks and models, which `golden.py` only hands on. Training FLOPs may be given by either definition, or by
both: under `..._3_forward` three times the forward pass, under `..._exact` forward and backward by torch's counter."""
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from gradmax_nb.experiments import demo, training, zoo
from gradmax_nb.experiments import teacher_student as students
from gradmax_nb.experiments.cifar import wrn_recipe
from gradmax_nb.growth import count_flops, grow, measured_norm
from gradmax_nb.methods import BoundMax, GradMax
from gradmax_nb.sites import find_sites


# Growing

def methods():
    "The methods that are tried at every kind of site, by name"
    return {'GradMax': GradMax(), 'BoundMax': BoundMax()}


def grow_first_site(model, x, y, method, k):
    "Grow the first site of `model` by `k` neurons on the mean squared error, and say what was found and predicted"
    site = find_sites(model, x)[0][0]
    rec = grow(model, site, k, method, (x, y), F.mse_loss)
    return dict(site=site.name, consumers=[r.name for r in site.readers],
                features_per_channel=[r.spread for r in site.readers], old_width=rec.old_width, new_width=rec.new_width,
                zero='outgoing' if rec.mirror else 'incoming', sigma=rec.sigma.tolist(), loss=rec.loss,
                predicted=rec.predicted, measured=measured_norm(rec, (x, y), F.mse_loss))


# FLOPs

def forward_flops(model, xb): return count_flops(model, xb)


def step_flops(model, shape, batch_size): return training.step_flops(model, shape, batch_size)


def networks():
    "Name -> (function that builds the network, shape of a picture, batch size)"
    norm, build = nn.BatchNorm2d, partial
    small, large, imagenet = (3, 16, 16), (3, 32, 32), (3, 64, 64)
    return {
        **{f'demo {w}': (build(demo.small_net, w, 1, 8, 10), (1, 8, 8), 64) for w in ((1, 2), (4, 8), (7, 14))},
        'demo, 32 pixels': (build(demo.small_net, (8, 8), 3, 32, 10), large, 64),
        **{f'wrn-10 {w}': (build(zoo.wide_resnet, w, 4, depth=10), small, 32) for w in (.25, 1.)},
        **{f'wrn-28 {w}': (build(zoo.wide_resnet, w), large, 128) for w in (.25, .5, 1.)},
        'wrn-28 0.25, norm': (build(zoo.wide_resnet, .25, 10, norm), large, 128),
        **{f'vgg-11 {w}': (build(zoo.vgg11, w), large, 128) for w in (.25, 1.)},
        'vgg-11 0.25, norm': (build(zoo.vgg11, .25, 10, norm), large, 128),
        **{f'mobilenet {w}': (build(zoo.mobilenet, w, 100), imagenet, 32) for w in (.25, .5, 1.)},
        'mobilenet 0.25, norm': (build(zoo.mobilenet, .25, 100, norm), imagenet, 32)}


# The demo: digits

class Enough(Exception):
    "So many steps were asked for."


@cache
def _digits(): return demo.Digits()


def demo_names(): return list(demo.contenders(demo.Recipe()))


def _watched(run, steps):
    "Note before every step what it costs by both definitions; raise `Enough` after `steps` steps"
    inner, cost, exact = run.step, dict(steps=0, exact=0), {}
    shape, size = run.data.x.shape[1:], min(run.recipe.batch_size, len(run.data.x))

    def step():
        if run.t == steps:
            raise Enough
        width = tuple(p.shape for p in run.model.parameters())
        if width not in exact:
            exact[width] = step_flops(run.model, tuple(shape), size)
        cost['steps'] += run.step_flops
        cost['exact'] += exact[width]
        inner()
    run.step = step
    return cost


def _relative(run, cost):
    "Training FLOPs as a share of Baseline-Big's, by both definitions"
    r, x = run.recipe, run.data.x[:run.recipe.batch_size]
    big = demo.small_net(r.full_widths, x.shape[1], x.shape[-1], run.data.classes)
    growth = run.flops-cost['steps']
    return dict(relative_flops_3_forward=run.flops/(3*forward_flops(big, x)*r.steps),
                relative_flops_exact=(cost['exact']+growth)/(step_flops(big, tuple(x.shape[1:]), len(x))*r.steps))


def demo_run(name, seed, steps=None):
    "Train one contender on the digits, to the end or for the first `steps` steps of the same training"
    recipe = demo.Recipe()
    run = demo.Run(demo.contenders(recipe)[name], _digits().split(seed), recipe, seed)
    cost, events = _watched(run, steps), {}
    try:
        run.fit()
    except Enough:
        pass
    result = run.result()
    for row in result['growth']:
        events.setdefault(row['step'], {})[row['site']] = row['new_width']
    growth = run.flops-cost['steps']
    return dict(method=name, seed=seed, losses=run.losses, events=[[s, w] for s, w in events.items()],
                fallbacks=sum(type(r.method).__name__ != name for r in run.records),
                growth_flops=growth, flops_3_forward=run.flops, flops_exact=cost['exact']+growth,
                parameters=result['parameters'], accuracy=result['accuracy'], train_loss=result['train_loss'],
                test_loss=result['test_loss'], **_relative(run, cost))


def demo_table(runs):
    "Method -> its row, and the table as text, by each definition of FLOPs on offer"
    out = {}
    for kind in ('3_forward', 'exact'):
        rows = demo.summary([{**r, 'relative_flops': r[f'relative_flops_{kind}']} for r in runs])
        for r in rows:
            out.setdefault(r['method'], {k: v for k, v in r.items() if k not in ('method', 'relative_flops')})
            out[r['method']][f'relative_flops_{kind}'] = r['relative_flops']
        out[f'text_{kind}'] = demo.table_text(rows)
    return out


# A tiny Wide-ResNet on patterns

def wrn_names():
    return ['BoundMax', 'GradMax', 'MirrorRandom-RMS', 'Baseline-Big', 'Baseline-Small',
            'RandomGrowth', 'MirrorGradMax']


def _tiny_wrn(width, classes, norm):
    return zoo.wide_resnet(width, classes, nn.BatchNorm2d if norm else None, depth=10)


def wrn_run(name, norm, seed=1):
    "Three epochs of ten steps with four growth events"
    recipe = replace(wrn_recipe(), build=_tiny_wrn, epochs=3, batch_size=32, growing=training.Growing(.2, .1, 4),
                     growth_batch=64, lr=.1)
    run = training.Run(training.Setup(recipe, name, seed=seed, norm=norm), training.Patterns(size=16))
    losses, inner, plan = [], run.step, run.plan

    def step(xb, yb):
        # From zero, so that the sum is this step's loss to the last bit.
        so_far, run.loss_sum = run.loss_sum, torch.zeros_like(run.loss_sum)
        inner(xb, yb)
        losses.append(run.loss_sum.item())
        run.loss_sum += so_far
    run.step = step
    result, events = run.fit(), run.log['growth']
    return dict(losses=losses, events=[[e['step'], {s['site']: s['new_width'] for s in e['sites']}] for e in events],
                norms=[[s['predicted'] for s in e['sites']] for e in events],
                plan=dict(steps=plan.steps, first_step_flops=plan.flops, flops=plan.total(),
                          events=[[e.step, e.widths, e.flops] for e in plan.events]),
                growth_flops=result['growth_flops'], flops=result['flops'], relative_flops=result['relative_flops'],
                parameters=result['parameters'], new_neurons=result['new_neurons'], moved=result['moved'],
                fires=result['fires'], accuracy=result['accuracy'], train_loss=result['train_loss'])


# Students and their teacher

def student_names():
    "The last one draws new neurons for all students from one generator, so it holds for stacks of students only"
    return ['Baseline-Small', 'Baseline-Big', 'GradMax', 'GradMax, sign rule', 'MirrorGradMax', 'BoundMax', 'Random']


def student_run(name, teacher=0, seeds=3):
    "The small task: losses of each student after some steps, the first growth being after 200, and in the end"
    task = students.Task(students.SMALL, teacher)
    course = students.travel(task, students.contenders(students.SMALL)[name], seeds)
    notes = {t: (width, loss.tolist()) for t, width, loss, _ in course.notes}
    return dict(losses={str(t): notes[t][1] for t in (0, 25, 50, 75, 100)},
                later={str(t): notes[t][1] for t in (225, 300)},
                events=[[e[0], notes[e[0]][0]] for e in course.events], width=course.students.width,
                flops=course.flops, final=course.students.loss(task.x, task.y).tolist())


def student_flops():
    "FLOPs of one training step of one student"
    tasks = students.SMALL, students.LARGE
    return {f'student, {s.name} {w}': students.step_flops(s, w) for s in tasks for w in (s.seed, s.width)}
