"""A headless Chromium for the tests in this folder. They need Debian's `chromium` and `chromium-driver` and
`pip install selenium`; without them `browser` ends the script with exit code 77 and says what is missing."""

import shutil
import sys
import tempfile
from contextlib import contextmanager

FLAGS = [
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--disable-default-apps',
    '--disable-extensions',
    '--disable-dev-shm-usage',
    '--hide-scrollbars',
    '--force-color-profile=srgb',
]
SKIPPED = 77


def missing():
    "What is not installed here"
    names = {
        'chromium': shutil.which('chromium') or shutil.which('chromium-browser'),
        'chromedriver': shutil.which('chromedriver'),
    }
    try:
        import selenium  # noqa: F401
    except ImportError:
        names['selenium'] = None
    return [k for k, v in names.items() if not v]


@contextmanager
def browser(width=1280, height=900, dark=False):
    "A Selenium driver with a profile of its own; the console is logged"
    if missing():
        print(
            f"skipped: not installed here: {', '.join(missing())} "
            '(apt-get install chromium chromium-driver; pip install selenium)'
        )
        sys.exit(SKIPPED)
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which('chromium') or shutil.which('chromium-browser')
        for o in [*FLAGS, f'--user-data-dir={profile}', f'--window-size={width},{height}']:
            options.add_argument(o)
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
        try:
            if dark:
                driver.execute_cdp_cmd(
                    'Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': 'dark'}]}
                )
            yield driver
        finally:
            driver.quit()
