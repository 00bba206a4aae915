"""Lets Python run the sitecustomize that this one hides, then sets up the fault of OLORA_FAULT, if there is one."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def run_the_next() -> None:
    here = os.path.dirname(__file__)
    after = sys.path[len(sys.path) - sys.path[::-1].index(here) :] if here in sys.path else []
    spec = PathFinder.find_spec(__name__, after)
    if spec is None or spec.loader is None:
        return
    sys.modules[__name__] = module = module_from_spec(spec)  # the next may look for itself there
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if error.name != __name__:  # its own way to say that there is none after it
            raise


run_the_next()
if "OLORA_FAULT" in os.environ:
    import olora_fault_points

    olora_fault_points.install()
