# Everything one writes down in a training with fastai, by wing: `from gradmax_nb.all import *`.
# Names that other libraries have too (`Lookahead`, `Sequential`) or might have (`Named`, `Times`), and what only
# methods and callbacks of one's own need, are imported from their modules. (A docstring here would start an llms.txt.)

from .core.sites import Refusal, Site, declare_site, find_sites, register_pointwise
from .core.measure import Measurement, Side, measure

from .model.outputs import grow_output
from .model.surgery import fit_to
from .model.untouched import restore_rng, rng_state

from .methods.lengths import ActivationRMS, CurvatureBudget, FixedLength, MeanNorm, SigmaWeighted
from .methods.gradmax import AsComputed, GradMax, SignRule
from .methods.mirrored import Ascent, BoundMax, MirrorGradMax, MirrorRandom
from .methods.searched import Firefly, GradMaxOpt, MirrorFirefly, MirrorGradMaxOpt, OfficialRandom, RandomGrowth
from .methods.by_name import methods_by_name

from .train.growth import Growth, grow, measured_norm
from .train.schedules import AllSites, AtSteps, EveryN, OfSeed, OnPlateau, RoundRobin, Towards
from .train.schedules import event_steps, planned_widths
from .train.flops import count_flops, step_flops
from .train.summary import summary
from .train.grower import Grower
from .train.rates import NormRatio, YoungRates
from .train.checkpoint import load_grown, peek_grown, save_grown
from .train.batches import GrowthLog, TrainBatches
from .train.by_hand import grow_learner, learner_sites
from .train.callback import GrowthCallback
from .train.watching import FlopsCallback, GrowthCheck
from .train.young_rates import YoungRatesCallback
from .train.resume import ResumeCallback
from .train.learner import KeepChannelsLast, LeanLearner

from .show.figures import draw_network, plot_budget, plot_compare, plot_dashboard, plot_growth, plot_spectrum
from .show.figures import plot_widths, spectrum_slider
from .show.dashboard import GrowthDashboard
