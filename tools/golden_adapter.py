"""What the golden record asks of the package: the only file of the two that knows names and places in it.

`golden.py` turns the answers into a record. Every answer is made of plain numbers, lists and dicts, except for
methods, networks and models, which `golden.py` only hands on. FLOPs of training are those of forward and backward
passes; the record has them under `..._exact`, beside three times the forward pass, an older definition."""
from dataclasses import replace
from functools import cache, partial

import pandas as pd
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from torch import nn

from gradmax_nb.core.sites import find_sites
from gradmax_nb.experiments import demo, zoo
from gradmax_nb.experiments import student_teacher as students
from gradmax_nb.experiments.data import Digits, Patterns
from gradmax_nb.experiments.recipe import Growing, Setup, wrn_recipe
from gradmax_nb.experiments.run import learner_of
from gradmax_nb.methods import BoundMax, GradMax
from gradmax_nb.show.figures import mean_and_error
from gradmax_nb.train import flops
from gradmax_nb.train.batches import growth_log
from gradmax_nb.train.growth import grow, measured_norm


# Growing

def methods():
    "The methods that are tried at every kind of site, by name"
    return {'GradMax': GradMax(), 'BoundMax': BoundMax()}


def grow_first_site(model, x, y, method, k):
    "Grow the first site of `model` by `k` neurons on the mean squared error, and say what was found and predicted"
    site = find_sites(model, x)[0][0]
    rec = grow(model, site, k, method, (x, y), F.mse_loss)
    return dict(site=site.name, consumers=[r.name for r in site.links],
                features_per_channel=[r.features for r in site.links], old_width=rec.old_width, new_width=rec.new_width,
                zero=rec.zero.value, sigma=rec.sigma.tolist(), loss=rec.loss,
                predicted=rec.predicted, measured=measured_norm(rec, (x, y), F.mse_loss))


# FLOPs

def forward_flops(model, xb): return flops.count_flops(model, xb)


def step_flops(model, shape, batch_size): return flops.step_flops(model, torch.empty(batch_size, *shape))


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

class StopAfter(Callback):
    "Ends a training after so many steps."
    order = 10_000
    def __init__(self, steps): self.steps = steps

    def after_batch(self):
        if self.learn.training and self.learn.train_iter == self.steps:
            raise CancelFitException


@cache
def _digits(): return Digits()


def demo_names(): return list(demo.contenders())


def _events(rows):
    "Widths after each growth event, from the rows of the sites"
    events = {}
    for row in rows:
        events.setdefault(row['step'], {})[row['site']] = row['new_width']
    return [[step, widths] for step, widths in events.items()]


def demo_run(name, seed, steps=None):
    "Train one contender on the digits, to the end or for the first `steps` steps of the same training"
    recipe, data = demo.Recipe(), _digits().split(seed)
    learn = demo.demo_learner(demo.contenders()[name], data, recipe, seed)
    demo.fit_demo(learn, [] if steps is None else [StopAfter(steps)])
    rows = growth_log(learn).rows
    out = dict(method=name, seed=seed, losses=learn.step_losses.values, events=_events(rows),
               fallbacks=sum(r['method'].split('(')[0] != name for r in rows), growth_flops=learn.flops.of_growth,
               flops_exact=learn.flops.total)
    if steps is not None:
        return out
    keep = 'parameters', 'accuracy', 'train_loss', 'test_loss'
    budget = step_flops(demo.demo_net(data, recipe.full_widths), data.shape, recipe.batch_size)*recipe.steps
    result = demo.result_of(learn)
    return dict(out, relative_flops_exact=learn.flops.total/budget, **{k: result[k] for k in keep})


def demo_table(runs):
    "Method -> its row"
    out = {}
    for name, d in pd.DataFrame(runs).groupby('method', sort=False):
        (accuracy, error), (loss, loss_error) = (mean_and_error(d[k].tolist()) for k in ('accuracy', 'train_loss'))
        out[name] = dict(runs=len(d), parameters=int(d.parameters.iloc[0]), accuracy=accuracy, accuracy_se=error,
                         train_loss=loss, train_loss_se=loss_error, relative_flops_exact=d.relative_flops_exact.mean())
    return out


# A tiny Wide-ResNet on patterns

def wrn_names():
    return ['BoundMax', 'GradMax', 'MirrorRandom-RMS', 'Baseline-Big', 'Baseline-Small',
            'RandomGrowth', 'MirrorGradMax']


def _tiny_wrn(width, classes, norm):
    return zoo.wide_resnet(width, classes, nn.BatchNorm2d if norm else None, depth=10)


def wrn_run(name, norm, seed=1):
    "Three epochs of ten steps with four growth events"
    recipe = replace(wrn_recipe(), build=_tiny_wrn, epochs=3, batch_size=32, growing=Growing(.2, .1, 4),
                     growth_batch=64, lr=.1)
    learn = learner_of(Setup(recipe, name, seed=seed, norm=norm), Patterns(size=16))
    log = learn.run_log
    plan = log.course.plan
    learn.fit(log.course.epochs)
    result, events = log.result(), log.rows['growth']
    keep = ('growth_flops', 'flops', 'relative_flops', 'parameters', 'new_neurons', 'moved', 'fires', 'accuracy',
            'train_loss')
    return dict(losses=learn.step_losses.values,
                events=[[e['step'], {s['site']: s['new_width'] for s in e['sites']}] for e in events],
                norms=[[s['predicted'] for s in e['sites']] for e in events],
                plan=dict(steps=plan.steps, first_step_flops=plan.flops, flops=plan.total(),
                          events=[[e.step, e.widths, e.flops] for e in plan.events]),
                **{k: result[k] for k in keep})


# Students and their teacher

# Names in the record -> names of today
STUDENTS = {**{n: n for n in ('Baseline-Small', 'Baseline-Big', 'MirrorGradMax', 'BoundMax')},
            'GradMax': 'GradMax(AsComputed())', 'GradMax, sign rule': 'GradMax'}


def student_names(): return list(STUDENTS)


def student_run(name, teacher=0, seeds=3):
    "The small task: losses of each student after some steps, the first growth being after 200, and in the end"
    task = students.Task(students.SMALL, teacher)
    course = students.travel(task, students.contenders(students.SMALL)[STUDENTS[name]], seeds)
    notes = {t: (width, loss.tolist()) for t, width, loss, _ in course.notes}
    return dict(losses={str(t): notes[t][1] for t in (0, 25, 50, 75, 100)},
                later={str(t): notes[t][1] for t in (225, 300)},
                events=[[e[0], notes[e[0]][0]] for e in course.events], width=course.students.width,
                flops=course.flops, final=students.student_losses(course.students, task.x, task.y).tolist())


def student_flops():
    "FLOPs of one training step of one student"
    tasks = students.SMALL, students.LARGE
    return {f'student, {s.name} {w}': students.student_flops(s, w) for s in tasks for w in (s.seed, s.width)}
