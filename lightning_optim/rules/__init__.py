"""One algorithm, or one close family, per file. Importing this package imports them all, so the registry is whole."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
