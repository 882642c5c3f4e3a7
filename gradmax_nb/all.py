from .theory import *
from .model.surgery import *
from .model.optim import *
from .model.untouched import restore_rng, rng_state, untouched
from .train.rates import *
from .core.sites import Refusal, Site, check_site, declare_site, find_sites, register_pointwise
from .core.measure import Measurement, Side, measure
from .methods import *
from .train.growth import *
from .train.schedules import *
from .train.flops import *
from .train.batches import *
from .train.by_hand import *
from .train.callback import *
from .train.watching import *
from .train.young_rates import *
from .train.checkpoint import *
from .train.resume import *
from .train.learner import *
from .show.figures import *
from .show.dashboard import *
