"""The private parts of Ray Tune; as ray_internals.py, which has all others."""

import copy
from collections.abc import Mapping
from typing import Any


def keep_credentials() -> None:
    """Have Tune leave the keys of AWS where they are: in the environment of this process, and of each node.

    Ray 2.60, tune/execution/class_cache.py: Tune copies them from this process into the description of each trial's
    process, which Ray shows to whoever asks it, and writes into the log of each node in clear.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def go_on_with(tuner: Any, folder: str, most: int, scheduler: Any) -> None:
    """Let a restored Tuner run so many trials at the same time, in the folder where the search lies now.

    Ray 2.60, tune/impl/tuner_internal.py and tune/search: tuner.pkl has the number of the first attempt, and so have
    the states from which the searchers restore all that they are. These also say where the search lay then: the trials
    that were made before are told of today's place, and those that are made now were not. So does the scheduler of
    tuner.pkl, which is as new as `scheduler`: Tune keeps nothing of what one has learned.
    """
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
    from ray.tune.search.search_generator import SearchGenerator

    settings = tuner._local_tuner._tune_config
    if settings.search_alg is None:
        settings.search_alg = _placed(_limited(BasicVariantGenerator, most), folder)(max_concurrent=most)
    else:
        limited = _limited(ConcurrencyLimiter, most)(settings.search_alg, max_concurrent=most)
        settings.search_alg = _placed(SearchGenerator, folder)(limited)
    settings.max_concurrent_trials = None  # as the searcher says
    settings.scheduler = scheduler


def _limited(kind: Any, most: int) -> Any:
    """The kind of searcher, which keeps its limit when it is restored; its state is found by the kind's name."""

    def set_state(self: Any, state: Mapping[str, Any]) -> None:
        kind.set_state(self, {**state, "max_concurrent": most})

    return type(kind.__name__, (kind,), {"set_state": set_state})


def _placed(kind: Any, folder: str) -> Any:
    """The kind of searcher, whose trials write below a folder, path or URI."""
    from ray.train._internal.storage import get_fs_and_path

    def next_trial(self: Any) -> Any:
        trial = kind.next_trial(self)
        if trial is not None:
            place = copy.copy(trial.storage)
            place.storage_filesystem, place.storage_fs_path = get_fs_and_path(folder)
            trial.set_storage(place)
        return trial

    return type(kind.__name__, (kind,), {"next_trial": next_trial})
