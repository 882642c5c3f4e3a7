"""Grow neural networks while they train: GradMax and its neighbours for plain PyTorch and fastai"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_rooms = {
    'core.sites': 'find_sites declare_site',
    'model.outputs': 'grow_output',
    'methods.gradmax': 'GradMax',
    'methods.mirrored': 'MirrorGradMax BoundMax MirrorRandom',
    'methods.searched': 'RandomGrowth Firefly',
    'train.growth': 'grow',
    'train.schedules': 'EveryN OnPlateau AllSites Named RoundRobin OfSeed Towards',
    'train.flops': 'count_flops',
    'train.checkpoint': 'save_grown load_grown',
    'train.grower': 'Grower',
    'train.summary': 'summary',
}
_room_of = {name: room for room, names in _rooms.items() for name in names.split()}
__all__ = [*_room_of]

if TYPE_CHECKING:  # the same names for editors and type checkers, which do not run `__getattr__`
    from .core.sites import declare_site, find_sites  # noqa: F401
    from .methods.gradmax import GradMax  # noqa: F401
    from .methods.mirrored import BoundMax, MirrorGradMax, MirrorRandom  # noqa: F401
    from .methods.searched import Firefly, RandomGrowth  # noqa: F401
    from .model.outputs import grow_output  # noqa: F401
    from .train.checkpoint import load_grown, save_grown  # noqa: F401
    from .train.flops import count_flops  # noqa: F401
    from .train.grower import Grower  # noqa: F401
    from .train.growth import grow  # noqa: F401
    from .train.schedules import AllSites, EveryN, Named, OfSeed, OnPlateau, RoundRobin, Towards  # noqa: F401
    from .train.summary import summary  # noqa: F401


def __getattr__(name):
    "One of the names in `__all__`, imported now."
    if name not in _room_of:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'.{_room_of[name]}', __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
