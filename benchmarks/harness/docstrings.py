"""Real texts that exist on every machine: docstrings of the Python standard library."""

from __future__ import annotations

import importlib
import inspect

MODULES = (
    "argparse ast asyncio base64 bisect calendar collections concurrent.futures configparser contextlib csv ctypes "
    "dataclasses datetime decimal difflib email.message enum fractions functools gettext heapq http.client imaplib "
    "inspect io itertools json logging mailbox math multiprocessing.pool optparse os pathlib pickle platform random "
    "re sched shelve shlex shutil smtplib socket sqlite3 ssl statistics string subprocess tarfile tempfile textwrap "
    "threading timeit tkinter traceback turtle typing unittest.case unittest.mock urllib.parse urllib.request uuid "
    "warnings weakref xml.etree.ElementTree zipfile"
).split()


def docstrings(count: int) -> list[str]:
    """`count` different docstrings of at least 20 characters, in the order the modules define them."""
    found: dict[str, None] = {}
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # a build of Python may lack tkinter, sqlite3 or ssl
            continue
        for thing in [module, *(vars(module)[key] for key in sorted(vars(module)))]:
            members = [thing]
            if inspect.isclass(thing):
                members += [vars(thing)[key] for key in sorted(vars(thing))]
            for member in members:
                text = getattr(member, "__doc__", None)
                if isinstance(text, str) and len(text.strip()) >= 20:
                    found[inspect.cleandoc(text)] = None
    texts = list(found)
    # every k-th, so that a small sample still spans all modules
    step = max(1, len(texts) // count)
    return texts[::step][:count]
