"How new neurons get their weights: the rooms of this wing, and all their names."
# ruff: noqa: F403
from . import by_name, gradmax, lengths, mirrored, proposal, searched
from .proposal import *
from .lengths import *
from .gradmax import *
from .mirrored import *
from .searched import *
from .by_name import *

# Only names of the rooms, not the rooms themselves, go on to `from gradmax_nb.methods import *`.
__all__ = [*proposal.__all__, *lengths.__all__, *gradmax.__all__, *mirrored.__all__, *searched.__all__,
           *by_name.__all__]
