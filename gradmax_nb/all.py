from .theory import *
from .surgery import *
from .optim import *
from .rates import *
from .sites import Refusal, Site, check_site, declare_site, find_sites, register_pointwise
from .measure import Measurement, measure
from .methods import *
from .growth import *
from .schedule import *
from .callback import *
from .checkpoint import *
from .viz import *
from .dashboard import *
