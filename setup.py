"Hands the packaging facts of settings.ini to setuptools; everything else is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]


setup(install_requires=lines('requirements'), extras_require={'dev': lines('dev_requirements')},
      keywords=cfg['keywords'].split(), classifiers=lines('classifiers'), license_expression=cfg['license'],
      entry_points={'console_scripts': lines('console_scripts'), 'nbdev': ['gradmax_nb=gradmax_nb._modidx:d']})
